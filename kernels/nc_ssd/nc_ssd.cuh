// What the kernels of non-causal state space duality share: the weights of tokens, and where the
// channels of a group lie. Needs sm_80.
//
// The heads of a group share B and C, so their channels side by side are the columns of one matrix
// product. Head h is of group h mod G: the j-th head of a group is head j G + group.
#pragma once
#include "ssd/ssd.cuh"

// How the weight of a token is made from raw dt.
struct Weigh {
    const void *A, *bias;  // (H); bias may be null
    int A_type, bias_type, dt_type, softplus, positive;
};

// dt, a factor of the weight, from its raw value with the bias.
__device__ __forceinline__ float step_of(float raw, const Weigh &p) {
    return p.softplus ? precise_softplus2<Float>(raw * LOG2E) * LN2 : raw;
}

// A with the sign that makes dt times it the weight.
__device__ __forceinline__ float rate_of(const Weigh &p, int head) {
    const float A = load_parameter(p.A, head, p.A_type);
    return p.positive ? -A : A;
}

__device__ __forceinline__ u32 load_bits(const void *from, long long i, int type) {
    return type == 0 ? ((const u32 *)from)[i] : ((const unsigned short *)from)[i];
}

__device__ __forceinline__ float bias_of(const Weigh &p, int head) {
    return p.bias ? load_parameter(p.bias, head, p.bias_type) : 0.f;
}

// The columns of a group: `dim` channels of each head, `groups` heads apart.
struct Columns {
    int group, groups, dim;
    __device__ __forceinline__ int head(int column) const { return column / dim; }  // of the group
    __device__ __forceinline__ int number(int head) const { return head * groups + group; }
    // The offset of a column in a map whose heads are `stride` apart.
    __device__ __forceinline__ int operator()(int column, int stride) const {
        if (groups == 1 && stride == dim) return column;
        const int head = column / dim;
        return (head * groups + group) * stride + (column - head * dim);
    }
};

// Copies the rows of tiles as Rows does, from columns of a group.
template <class T, int COLUMNS, int THREADS>
__device__ __forceinline__ Rows<T, COLUMNS, THREADS> rows_of(const Map &map, int batch,
                                                             const Columns &columns, int first,
                                                             int length, int start) {
    typedef Rows<T, COLUMNS, THREADS> R;
    static_assert(R::PARTS == 1, "a thread has one column");
    const int own = threadIdx.x % R::ROW * R::V;
    return R((const Element<T> *)map.data + batch * map.b + columns(first + own, map.h) - own,
             map.l, Time{length, 0}, start);
}
