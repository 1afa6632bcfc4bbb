// Forward of a scan for any state size and dtype, with one channel to a thread. Other modes only
// calculate what a span does to the state (ENDS) or, in the reverse order, to the gradient by the
// state (GRADIENTS). README.md describes the layout.
#include "scan/scan.cuh"

// A thread's STATE numbers in shared memory are adjacent, and padded to avoid bank conflicts. So
// they have constant offsets; otherwise the compiler would keep an address for each in a register.
template <int STATE> constexpr int pitch_of = STATE | 1;

// Blocks of a multiprocessor: four where the compiler manages with 80 registers on this generation.
template <class T, int STATE, bool SEQ>
constexpr int BLOCKS = STATE == 16 && !(ORDERED && same<T, Float>)
    && (SEQ ? __CUDA_ARCH__ >= 860 && __CUDA_ARCH__ < 1000
            : __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 900) ? 4 : 3;
constexpr int STAGED_POSITIONS = 2 * SAVED;  // of a turn, between two barriers
constexpr int STEP = 8;           // positions that a thread takes at a time
constexpr int PITCH = pitch_for<STAGED_POSITIONS>;
constexpr int RUN = 0, ENDS = 1, GRADIENTS = 2;

template <class T, int STATE, bool SEQ, int MODE>
__global__ void __launch_bounds__(192, BLOCKS<T, STATE, SEQ>) scan_fwd(const ScanParams p) {
    const BlockIndex index(p);
    const int k = index.k, b = index.b, group = index.group;
    const int own = threadIdx.x, width = blockDim.x, channel = index.column * width + own;
    const bool valid = channel < p.dim;
    const int length = p.height * p.width;

    extern __shared__ __align__(16) float shared[];
    float *const staged = shared;
    const float *const B_staged = staged + p.rank * PITCH;
    float *const weights = staged + (p.rank + (MODE == RUN ? 2 : 1) * STATE) * PITCH + own;
    // Bias, skip and two addresses are in shared memory, which saves a register for each.
    volatile float *const bias = weights + p.rank * width, *const skip = bias + width;
    volatile long long *const x_offset
        = (long long *)(weights - own + (p.rank + 2) * width) + own;
    volatile long long *const y_offset = x_offset + width;
    volatile u32 *const arranged = (volatile u32 *)(weights + (p.rank + 6) * width);
    float *const rates = weights - own + (p.rank + 7) * width + own * pitch_of<STATE>;

    using Stage = Staging<T, STATE, SEQ, MODE != GRADIENTS, MODE != ENDS, STAGED_POSITIONS, 2>;
    arranged[0] = Stage::arrange(p, width);
    // Of ENDS the last span, and of GRADIENTS the first one, is left out: nothing enters from there.
    const int first = (index.span + (MODE == GRADIENTS)) * p.span;
    const int last = min(length, first + p.span);
    const int begin = MODE == GRADIENTS ? length - last : first, end = begin + last - first;
    const int place_of_span = MODE == GRADIENTS ? p.spans - 1 - index.span : index.span;
    const long long at_span
        = (index.scan_number(p) * p.spans + place_of_span) * STATE * p.dim + channel;
    const int known = min(STATE, p.state - group * STATE);
    for (int r = 0; r < p.rank; ++r)
        weights[r * width] = valid ? __ldg(p.weights + (k * p.rank + r) * p.dim + channel) : 0.f;
    bias[0] = valid ? __ldg(p.bias + k * p.dim + channel) : 0.f;
    skip[0] = valid && group == 0 ? __ldg(p.skip + k * p.dim + channel) : 0.f;
    float h[STATE], total = 0.f;
#pragma unroll
    for (int n = 0; n < STATE; ++n) {
        rates[n] = valid
            ? __ldg(p.rates + ((k * p.groups + group) * STATE + n) * p.dim + channel) : 0.f;
        h[n] = MODE == RUN && p.entries && valid ? p.entries[at_span + n * p.dim] : 0.f;
    }

    const SequencePath path(p, SEQ ? 0 : k, MODE == GRADIENTS);
    constexpr int SIZE = same<T, Float> ? 4 : 2;
    constexpr bool OF_GRAD = MODE == GRADIENTS;
    const int in_sequence = (SEQ ? k * p.dim : 0) + channel;
    const Steps x_steps(path, (int)(OF_GRAD ? p.grad_h : p.x_h), (int)(OF_GRAD ? p.grad_w : p.x_w));
    const Steps y_steps(path, SEQ ? 0 : p.width * p.dim, SEQ ? 1 : p.dim);
    x_offset[0] = SIZE * (OF_GRAD ? b * p.grad_b + in_sequence * p.grad_d
                                  : b * p.x_b + in_sequence * p.x_d);
    y_offset[0] = (p.y_type ? 2 : 4) * (SEQ
        ? (((long long)group * p.batch + b) * p.routes * p.dim + in_sequence) * length
        : (((long long)group * p.routes + k) * p.batch + b) * length * p.dim + in_sequence);

    for (int start = begin; start < end; start += STAGED_POSITIONS) {
        const int in_turn = min(STAGED_POSITIONS, end - start);
        __syncthreads();
        Stage(p, path, index, width, arranged[0]).run(staged, start, in_turn);
        __syncthreads();

#pragma unroll 1
        for (int s = 0; s < in_turn; s += STEP) {
            const int count = in_turn - s;
            if (MODE == RUN && s % SAVED == 0 && p.states && valid) {
                float *to;  // each way is the one for which the compiler needs the fewest registers
                if constexpr (SEQ) {
                    to = p.states + channel
                         + (index.scan_number(p) * p.chunks + (start + s) / SAVED) * STATE * p.dim;
                } else {
                    const int saved = (int)index.scan_number(p) * p.chunks + (start + s) / SAVED;
                    to = p.states + (long long)saved * (STATE * p.dim) + channel;
                }
#pragma unroll
                for (int n = 0; n < STATE; ++n) to[n * p.dim] = h[n];
            }
            float x[STEP], l[STEP], y[STEP];
            load_steps<T, SEQ>(x, (const char *)(OF_GRAD ? p.grad : p.x) + x_offset[0], path,
                               x_steps, start + s, count, valid, p.vector);
            if constexpr (SEQ) {
                load_steps<T, SEQ>(l, (const char *)p.raw + x_offset[0], path, x_steps, start + s,
                                   count, valid, p.vector);
#pragma unroll
                for (int i = 0; i < STEP; ++i) l[i] = fmaf(l[i], LOG2E, bias[0]);
            } else {
#pragma unroll
                for (int i = 0; i < STEP; ++i) l[i] = bias[0];
                add_product<STEP / 4>(l, p.rank, weights, width, staged + s, PITCH, 4);
            }
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                if (!SEQ || p.softplus) l[i] = precise_softplus2<T>(l[i]);
                if (i >= count) l[i] = 0.f;
            }
            const float own_skip = skip[0];
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                if (MODE == RUN) y[i] = own_skip * x[i];
                else total += l[i];
                if (!OF_GRAD) x[i] *= l[i];
            }
#pragma unroll
            for (int n = 0; n < STATE; ++n) {
                if (n % 2 == 0 && n >= known) break;  // also keeps the compiler from mixing all n
                float B[STEP], C[STEP];               // OF_GRAD has C in place of B
#pragma unroll
                for (int i = 0; i < STEP; i += 4) {
                    read4(B + i, B_staged + n * PITCH + s + i);
                    if (MODE == RUN) read4(C + i, B_staged + (STATE + n) * PITCH + s + i);
                }
                const float rate = rates[n];
#pragma unroll
                for (int i = 0; i < STEP; ++i) {
                    const float a = ex2(rate * l[i]);
                    if (OF_GRAD) {
                        h[n] = a * fmaf(B[i], x[i], h[n]);
                    } else {
                        h[n] = fmaf(a, h[n], x[i] * B[i]);
                        if (MODE == RUN) y[i] = fmaf(C[i], h[n], y[i]);
                    }
                }
            }
            if (MODE == RUN && p.y)
                store_steps<T, SEQ>(y, (char *)p.y + y_offset[0], path, y_steps, start + s, count,
                                    valid, p.vector, p.y_type);
        }
    }
    if (MODE != RUN && valid) {
#pragma unroll
        for (int n = 0; n < STATE; ++n) {
            p.ends[at_span + n * p.dim] = h[n];
            p.decays[at_span + n * p.dim] = ex2(rates[n] * total);
        }
    }
}
