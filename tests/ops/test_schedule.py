"""Schedules of the scans, for GPUs that are not there, as they were when their costs were fitted:
whoever changes a cost sees here what it changes."""

from types import SimpleNamespace

import pytest
import torch

from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.ss2d_scan import schedule

# Compute capability, multiprocessors, KiB of shared memory of each, MiB of L2
GPUS = {'T4': (7, 40, 64, 4), 'A100': (8, 108, 164, 40), 'H100': (9, 132, 228, 50)}


@pytest.fixture
def plan_on(monkeypatch):
    def plan_on(name, *sizes):
        major, multiprocessors, shared, l2 = GPUS[name]
        # A block can have what the driver leaves, but on Turing all.
        per_block = shared if major == 7 else shared - 1
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda _: SimpleNamespace(
            major=major, multi_processor_count=multiprocessors, L2_cache_size=l2 * 2**20,
            shared_memory_per_multiprocessor=shared * 1024,
            shared_memory_per_block_optin=per_block * 1024))
        monkeypatch.setattr(schedule, 'clusters_at_once', lambda _, cluster, blocks: (
            multiprocessors * blocks // cluster - (cluster == 8)))
        return schedule.plan_of.__wrapped__(*sizes, 0)

    return plan_on


# GPU; batch, D, H, W, rank, K; slots of an image; of forward and backward: kind, maps, warps,
# columns, span, spans, shared bytes; of a cluster schedule also sets and blocks
RECORDED = [
    ('H100', (128, 96, 56, 56, 6, 4), 448,
     ('cluster', 4, 6, 1, 224, 32, 6880, 1, 2),
     ('independent', 2, 6, 1, 56, 128, 64256)),
    ('H100', (128, 192, 28, 28, 12, 4), 112,
     ('independent', 2, 6, 2, 28, 64, 14656),
     ('independent', 2, 12, 1, 28, 64, 137472)),
    ('H100', (128, 384, 14, 14, 24, 4), 28,
     ('independent', 2, 6, 4, 14, 32, 23104),
     ('independent', 2, 12, 2, 14, 32, 150272)),
    ('H100', (128, 768, 7, 7, 48, 4), 7,
     ('independent', 2, 6, 8, 7, 16, 40384),
     ('independent', 2, 12, 4, 7, 16, 183296)),
    ('H100', (4, 96, 256, 256, 6, 4), 9368,
     ('cluster', 4, 6, 2, 1171, 4, 9952, 2, 8),
     ('chained', 4, 6, 1, 71, 66, 64256)),
    ('H100', (1, 96, 200, 320, 6, 4), 9144,
     ('chained', 4, 6, 1, 18, 64, 28736),
     ('chained', 4, 6, 1, 18, 64, 64256)),
    ('H100', (2, 192, 100, 160, 12, 4), 2288,
     ('cluster', 4, 6, 4, 286, 2, 16864, 2, 8),
     ('chained', 4, 12, 1, 18, 32, 137472)),
    ('H100', (4, 768, 32, 32, 48, 4), 152,
     ('cluster', 4, 12, 4, 19, 4, 41920, 1, 2),
     ('independent', 4, 12, 4, 19, 4, 183296)),
    ('H100', (1, 192, 56, 56, 6, 1), 448,
     ('cluster', 1, 8, 6, 56, 1, 17280, 4, 7),
     ('chained', 1, 12, 1, 1, 56, 126464)),
    ('A100', (128, 192, 28, 28, 12, 4), 112,
     ('independent', 4, 3, 4, 56, 32, 8128),
     ('independent', 4, 12, 1, 70, 26, 137472)),
    ('A100', (4, 96, 256, 256, 6, 4), 9368,
     ('chained', 4, 6, 1, 29, 162, 28736),
     ('chained', 4, 6, 1, 87, 54, 64256)),
    ('A100', (1, 384, 14, 14, 24, 2), 32,
     ('independent', 2, 8, 3, 4, 1, 19392),
     ('chained', 2, 12, 2, 1, 4, 150272)),
    ('T4', (128, 96, 56, 56, 6, 4), 448,
     ('independent', 4, 2, 3, 280, 26, 4160),
     ('independent', 4, 6, 1, 728, 10, 64256)),
    ('T4', (1, 192, 100, 160, 12, 4), 2288,
     ('chained', 4, 4, 3, 22, 13, 25152),
     ('chained', 4, 4, 3, 29, 10, 48384))]


@pytest.mark.parametrize('gpu, sizes, slots, forward, backward', RECORDED, ids=str)
def test_recorded_plans(plan_on, gpu, sizes, slots, forward, backward):
    plan = plan_on(gpu, *sizes)
    assert plan.slots == slots
    assert (described(plan.forward), described(plan.backward)) == (forward, backward)


def described(work):
    kind = 'cluster' if work.cluster else 'independent' if work.independent else 'chained'
    around = (work.sets, work.cluster) if work.cluster else ()
    return (kind, work.maps, work.warps, work.columns, work.span, work.spans, work.shared, *around)


@pytest.mark.parametrize('gpu', GPUS)
def test_a_schedule_covers_channels_and_chunks_and_fits(plan_on, gpu):
    _, _, shared, _ = GPUS[gpu]
    for sizes in ((1, 4, 1, 1, 1, 1), (3, 1536, 7, 7, 48, 4), (2, 100, 33, 70, 7, 2)):
        plan = plan_on(gpu, *sizes)
        for work in (plan.forward, plan.backward):
            assert work.columns * work.warps // work.sets >= plan.groups == -(-sizes[1] // 16)
            assert work.span * (work.spans - 1) < plan.chunks <= work.span * work.spans
            assert work.shared <= shared * 1024 and plan.routes % work.maps == 0
            if work.independent and work.spans > 1:
                assert work.span * 8 % plan.slots == 0


def test_a_rank_that_does_not_fit(plan_on):
    with pytest.raises(ValueError, match=r'^dt_rank=600 needs more shared memory than the 64512 '
                                         'bytes of this GPU$'):
        plan_on('T4', 1, 16, 7, 7, 600, 4)


# --- scans with more than one state ---------------------------------------------------------------

@pytest.mark.parametrize(('batch', 'side', 'forward', 'backward'), [
    (4, 64, 16, 11),  # MambaIR's training on each of 8 GPUs: 48 blocks for each span of a backward
    (32, 64, 2, 1),
    (1, 7, 1, 1),
])
def test_spans_fill_the_gpu(monkeypatch, batch, side, forward, backward):
    """On an H200, and together they have all chunks."""
    monkeypatch.setattr(scans, 'device_limits', lambda index: (132, 233472, 232448))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    sizes = (batch, 360, side, side, 12, 4)
    of = scans.Scans(0, torch.float16, sizes, 16, sequence=False, softplus=True)
    found = of.forward_schedule(), of.backward_schedule()[0]
    assert [each.spans for each in found] == [forward, backward]
    for each in found:
        assert each.span * (each.spans - 1) < side * side <= each.span * each.spans
