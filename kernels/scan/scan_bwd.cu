// Backward of a scan for any state size and dtype. A lane has a tile of states and channels and
// takes four positions at a time, in the reverse order. README.md describes the layout.
#include "scan/scan_bwd_passes.cuh"

template <class T, int STATE, bool SEQ>
__global__ void __launch_bounds__(32 * WARPS, 1) scan_bwd(const ScanParams p) {
    using Block = Backward<T, STATE, SEQ>;
    extern __shared__ __align__(16) float shared[];
    Block block(p, shared);
    typename Block::Chunk c;
    const int begin = block.begin, end = block.end, team = block.team;
    if (team == 0) block.arranged[0] = Block::Stage::arrange(p, min(32 * TEAM, (int)blockDim.x));

    int ring = 0;
    c.number = (end - 1) / SAVED;
    block.load_chunk(p, c.number, block.path(p));
    for (; c.number >= begin / SAVED; --c.number) {
        if (SEQ && c.number < (end - 1) / SAVED)
            block.load_chunk(p, c.number, SequencePath(p, 0, false));
        c.start = c.number * SAVED, c.count = min(SAVED, end - c.start);
        c.quads = (c.count + 3) / 4;
        c.staged = block.rings + ring * block.all * ROW;
        ring = ring + 1 < block.teams ? ring + 1 : 0;
        if (team == 0) {
            typename Block::Stage(p, block.path(p), block.index, block.team_threads,
                                  block.arranged[0]).run(c.staged, c.start, c.count);
            wait(WITHIN, block.team_threads);
        } else {
            wait(STAGED + team, block.with_last());
        }

        block.project(p, c);
        __syncwarp();
        block.locate(p, c);
#pragma unroll 1
        for (int s = 0;; ++s) {
            block.store_states(c);
            if (s + 1 >= c.quads) break;
            block.step_forward(c);
        }
        if (!block.is_last()) arrive(STAGED + team + 1, block.with_next());
        block.run_back(c);
        __syncwarp();
        const SequencePath path = block.path(p);
        float grad_z[4 * Block::ITEMS];
        block.store_maps(p, c, path, grad_z);
        if (!SEQ && c.number > begin / SAVED) block.load_chunk(p, c.number - 1, path);  // ahead
        block.multiply_dt(p, c, grad_z);
        wait(WITHIN + team, block.team_threads);

        if (team > 0) wait(FULL + team, block.with_last());
        if (!block.is_last() && end - c.start > SAVED) wait(EMPTY + team + 1, block.with_next());
        block.sum_warps(p, c, path);
        if (team > 0 && c.number > begin / SAVED) arrive(EMPTY + team, block.with_last());
        if (!block.is_last()) arrive(FULL + team + 1, block.with_next());
    }
    block.store_sums(p);
}
