// The recurrences of vmamba_mm/ops/plain/recurrence.py along the first dimension, as ops of torch for
// the CPU: what a .pt2 file calls. A program that runs one opens this library first.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t TOGETHER = 1024;  // numbers of a step whose states stay in the cache

// Calls step(first, count, t) for each position t of time and each part of what is beside it, after
// begin(count) at the first one.
template <class Begin, class Step>
void run(int64_t length, int64_t beside, bool reverse, Begin begin, Step step) {
    at::parallel_for(0, (beside + TOGETHER - 1) / TOGETHER, 1, [&](int64_t from, int64_t to) {
        for (int64_t part = from; part < to; ++part) {
            const int64_t first = part * TOGETHER, count = std::min(TOGETHER, beside - first);
            auto states = begin(count);
            for (int64_t i = 0; i < length; ++i)
                step(states, first, count, reverse ? length - 1 - i : i);
        }
    });
}

struct Sizes {
    int64_t length, beside;
    explicit Sizes(const Tensor& x)
        : length(x.size(0)), beside(length ? x.numel() / length : 0) {}
};

Tensor last(const Tensor& x, bool reverse) { return x.select(0, reverse ? 0 : -1).clone(); }

// h_t = a_t h_(t-1) + x_t from zero, and the products of a; the states, the products, the last ones.
std::tuple<Tensor, Tensor, Tensor, Tensor> lines(const Tensor& a_, const Tensor& x_, bool reverse) {
    const Tensor x = x_.contiguous(), a = a_.expand_as(x).contiguous();
    Tensor states = at::empty_like(x), products = at::empty_like(x);
    const Sizes sizes(x);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "lines", [&] {
        using Float = at::opmath_type<scalar_t>;
        struct State { Float h[TOGETHER], p[TOGETHER]; };
        const scalar_t *const a_at = a.const_data_ptr<scalar_t>();
        const scalar_t *const x_at = x.const_data_ptr<scalar_t>();
        scalar_t *const h_at = states.mutable_data_ptr<scalar_t>();
        scalar_t *const p_at = products.mutable_data_ptr<scalar_t>();
        run(sizes.length, sizes.beside, reverse,
            [](int64_t count) {
                State s;
                std::fill_n(s.h, count, Float(0)), std::fill_n(s.p, count, Float(1));
                return s;
            },
            [&](State& s, int64_t first, int64_t count, int64_t t) {
                const int64_t at = t * sizes.beside + first;
                for (int64_t i = 0; i < count; ++i) {
                    const Float decay = a_at[at + i];
                    s.h[i] = decay * s.h[i] + Float(x_at[at + i]), s.p[i] *= decay;
                    h_at[at + i] = s.h[i], p_at[at + i] = s.p[i];
                }
            });
    });
    return {states, products, last(states, reverse), last(products, reverse)};
}

// The states of h_t = a_t h_(t-1) + x_t from zero: after each position, or BEFORE it.
template <bool BEFORE>
Tensor recur(const Tensor& a_, const Tensor& x_, bool reverse) {
    const Tensor x = x_.contiguous(), a = a_.expand_as(x).contiguous();
    Tensor states = at::empty_like(x);
    const Sizes sizes(x);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "recur", [&] {
        using Float = at::opmath_type<scalar_t>;
        struct State { Float h[TOGETHER]; };
        const scalar_t *const a_at = a.const_data_ptr<scalar_t>();
        const scalar_t *const x_at = x.const_data_ptr<scalar_t>();
        scalar_t *const h_at = states.mutable_data_ptr<scalar_t>();
        run(sizes.length, sizes.beside, reverse,
            [](int64_t count) {
                State s;
                std::fill_n(s.h, count, Float(0));
                return s;
            },
            [&](State& s, int64_t first, int64_t count, int64_t t) {
                const int64_t at = t * sizes.beside + first;
                for (int64_t i = 0; i < count; ++i) {
                    if (BEFORE) h_at[at + i] = s.h[i];
                    s.h[i] = Float(a_at[at + i]) * s.h[i] + Float(x_at[at + i]);
                    if (!BEFORE) h_at[at + i] = s.h[i];
                }
            });
    });
    return states;
}

// What a mean of the values before each position is made of, with weights exp(k) that decay: the sums
// of values and of weights over exp(top), and top.
std::tuple<Tensor, Tensor, Tensor> means(const Tensor& decay_, const Tensor& k_, const Tensor& v_,
                                         bool reverse) {
    const Tensor k = k_.contiguous(), v = v_.contiguous();
    const Tensor decay = decay_.to(k.scalar_type()).contiguous();
    Tensor totals = at::empty_like(k), weights = at::empty_like(k), tops = at::empty_like(k);
    const Sizes sizes(k);
    const int64_t channels = decay.numel();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, k.scalar_type(), "means", [&] {
        using Float = at::opmath_type<scalar_t>;
        struct State { Float total[TOGETHER], weight[TOGETHER], top[TOGETHER]; };
        const scalar_t *const decay_at = decay.const_data_ptr<scalar_t>();
        const scalar_t *const k_at = k.const_data_ptr<scalar_t>();
        const scalar_t *const v_at = v.const_data_ptr<scalar_t>();
        scalar_t *const total_at = totals.mutable_data_ptr<scalar_t>();
        scalar_t *const weight_at = weights.mutable_data_ptr<scalar_t>();
        scalar_t *const top_at = tops.mutable_data_ptr<scalar_t>();
        run(sizes.length, sizes.beside, reverse,
            [](int64_t count) {
                State s;
                std::fill_n(s.total, count, Float(0)), std::fill_n(s.weight, count, Float(0));
                std::fill_n(s.top, count, Float(-1e30));  // below all; infinities have no difference
                return s;
            },
            [&](State& s, int64_t first, int64_t count, int64_t t) {
                const int64_t at = t * sizes.beside + first;
                for (int64_t i = 0; i < count; ++i) {
                    total_at[at + i] = s.total[i], weight_at[at + i] = s.weight[i];
                    top_at[at + i] = s.top[i];
                    const Float later = s.top[i] - Float(decay_at[(first + i) % channels]);
                    const Float key = k_at[at + i], top = std::max(later, key);
                    const Float past = std::exp(later - top), own = std::exp(key - top);
                    s.total[i] = past * s.total[i] + own * Float(v_at[at + i]);
                    s.weight[i] = past * s.weight[i] + own, s.top[i] = top;
                }
            });
    });
    return {totals, weights, tops};
}

}  // namespace

TORCH_LIBRARY(vmamba_mm_native, m) {
    m.def("lines(Tensor a, Tensor x, bool reverse) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("carries(Tensor a, Tensor x, bool reverse) -> Tensor");
    m.def("states(Tensor a, Tensor x, bool reverse) -> Tensor");
    m.def("means(Tensor decay, Tensor k, Tensor v, bool reverse) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vmamba_mm_native, CPU, m) {
    m.impl("lines", lines);
    m.impl("carries", recur<true>);
    m.impl("states", recur<false>);
    m.impl("means", means);
}
