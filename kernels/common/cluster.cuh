// Passes a state from one warp to another, in the same block or in another block of the cluster
// (sm_90 and later).
#pragma once
#include "common/common.cuh"

// Returns the address of what another block of the cluster has at `address` of its shared memory.
__device__ __forceinline__ u32 address_in_block(u32 address, u32 block) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    return there;
}

// Waits until all threads of the cluster have come here, and makes what they wrote to shared memory
// visible.
__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A warp's mailbox in shared memory. It holds 16 bytes from each of 4 lanes of another warp, which
// is in the same block or in another block of the cluster. Its barrier counts these lanes, or, from
// another block, the bytes as they come.
struct Mailbox {
    float4 values[4];
    char barrier[BARRIER_BYTES];
    char unused[8];

    // Called by one thread. `near` says whether the sending lanes are in the same block.
    __device__ __forceinline__ void make(bool near) {
        make_barrier(barrier, near ? 4 : 1);
        if (!near) expect();
    }

    // Called by one thread after each `take`, if the sending lanes are in another block.
    __device__ __forceinline__ void expect() {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], 64;"
                     :: "r"(shared_address(barrier)) : "memory");
    }

    // Called by the warp; lane t receives what lane t of the sending ones sent. `parity` is that of
    // wait_for_copies. The first test does not wait, because the compiler lets such a test begin
    // before the instructions ahead of it have ended. The wait does not acquire for the cluster,
    // which would empty the cache of global memory each time: the data comes into shared memory,
    // which has no cache, and is there before the barrier counts it.
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

// Writes to a mailbox of the same block. Called by 4 lanes, each of which writes part lane & 3.
__device__ __forceinline__ void put(u32 mailbox, int lane, const float (&v)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 :: "r"(mailbox + (lane & 3) * 16), "r"(__float_as_uint(v[0])),
                    "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
                    "r"(__float_as_uint(v[3])) : "memory");
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(mailbox + 64) : "memory");
}

// Writes to a mailbox of another block, whose address address_in_block has returned.
__device__ __forceinline__ void send(u32 mailbox, int lane, const float (&v)[4]) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
                 "[%0], {%1, %2, %3, %4}, [%5];"
                 :: "r"(mailbox + (lane & 3) * 16), "r"(__float_as_uint(v[0])),
                    "r"(__float_as_uint(v[1])), "r"(__float_as_uint(v[2])),
                    "r"(__float_as_uint(v[3])), "r"(mailbox + 64) : "memory");
}
