// A state from warp to warp, of one block or of the blocks of a cluster (sm_90 and later).
#pragma once
#include "common/common.cuh"

// To what is at this address of shared memory in another block of the cluster.
__device__ __forceinline__ u32 address_in_block(u32 address, u32 block) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

// All threads of the cluster have come here; what they wrote to shared memory is seen.
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// In shared memory, of a warp: 16 bytes from each of 4 lanes of another warp, of its own block or of
// another one of the cluster, and a barrier that counts the lanes, or the bytes as they come.
struct Mailbox {
    float4 values[4];
    char barrier[BARRIER_BYTES];
    char unused[8];

    // By one thread; `near`: whether the lanes are of its own block.
    __device__ __forceinline__ void make(bool near) {
        make_barrier(barrier, near ? 4 : 1);
        if (!near) expect();
    }

    // By one thread, where they are of another block, after each `take`.
    __device__ __forceinline__ void expect() {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 64;"
                     :: "r"(shared_address(barrier)) : "memory");
    }

    // By the warp; lane t has what the t-th lane sent. `parity` as of wait_for_copies. It is asked
    // first without waiting, for the compiler lets that begin before what comes before it has ended.
    // To acquire for the cluster would empty the cache of global memory each time; what comes is in
    // shared memory, which has none, and is there before the barrier counts it.
    __device__ __forceinline__ void take(float (&v)[4], int lane, u32 parity) {
        asm volatile("{.reg .pred done; "
                     "mbarrier.test_wait.parity.shared.b64 done, [%0], %1; @done bra over; "
                     "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; "
                     "@!done bra again; over:}"
                     :: "r"(shared_address(barrier)), "r"(parity) : "memory");
        const float4 sent = values[lane & 3];
        v[0] = sent.x, v[1] = sent.y, v[2] = sent.z, v[3] = sent.w;
        __syncwarp();  // before what comes next may overwrite it
    }
};

// To a mailbox of the same block, by 4 lanes, t of lane & 3.
__device__ __forceinline__ void put(u32 mailbox, int lane, const float (&v)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "r"(mailbox + (lane & 3) * 16), "r"(__float_as_uint(v[0])),
                    "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
                    "r"(__float_as_uint(v[3])) : "memory");
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(mailbox + 64) : "memory");
}

// To one of another block; `mailbox` as of address_in_block.
__device__ __forceinline__ void send(u32 mailbox, int lane, const float (&v)[4]) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
                 "[%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(mailbox + (lane & 3) * 16), "r"(__float_as_uint(v[0])),
                    "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
                    "r"(__float_as_uint(v[3])), "r"(mailbox + 64) : "memory");
}
