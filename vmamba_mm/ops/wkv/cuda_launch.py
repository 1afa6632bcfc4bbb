"""Launches of the kernels in ``kernels/wkv``, on addresses.

A block has 32 channels, and a section of the tokens of a sample: a span for each of its warps. Of
up to 256 tokens all are one section, and an op is one launch. Longer sequences are several: one
launch finds what each section does to the sums, one what enters each, and the op runs from there.
``kernels/README.md`` says how the kernels work.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    Slab,
    cached,
    device_limits,
    kernel,
)
from vmamba_mm.ops.fused.channels import SumJob, sum_launch

LANES = 32
#: R and WARPS of the kernels: tokens of a span, and spans of a block at most. One of 16 has a
#: multiprocessor for itself; 28 is for measurements.
HEIGHTS = {8: 14, 14: 14, 16: 16, 28: 7}
MOST_BLOCKS = 65535  # of a launch in its second or third dimension: sections, samples

#: Warps of a block at most, for tests.
max_warps: int | None = None
#: Tokens of a span, for measurements.
force_span: int | None = None


# --- what is compiled -------------------------------------------------------------------------

def _instance(name: str, type_: str, span: int, height: int, sums: bool) -> Instance:
    return Instance(f'wkv/{name}.cu', f'{name}<{type_}, {span}, {height}, {str(sums).lower()}>')


def combine_instance(values: int) -> Instance:
    """``values``: 2, or 4 with distances."""
    return Instance('wkv/wkv_combine.cu', f'wkv_combine<{values}>')


def _official_instance(which: str, type_: str, mode: int | str) -> Instance:
    return Instance(f'wkv/bi_wkv_official_{which}.cu',
                    f'bi_wkv_official_{which}<{type_}, {mode}>')


def _compiled_official() -> Iterator[Instance]:
    for type_ in ('Half', 'BFloat', 'Float'):
        yield _official_instance('fwd', type_, 'false')
        yield _official_instance('bwd', type_, 'RUN')
    yield _official_instance('fwd', 'Float', 'true')
    yield from (_official_instance('bwd', 'Float', mode) for mode in ('ENDS', 'DRIVES'))


def _compiled() -> Iterator[Instance]:
    for name in ('wkv_fwd', 'wkv_bwd', 'bi_wkv_fwd', 'bi_wkv_bwd'):
        for type_, span, height, sums in (
                ('Half', 14, 14, False), ('BFloat', 14, 14, False), ('Float', 14, 14, False),
                ('Float', 14, 14, True), ('Half', 8, 14, False), ('Half', 16, 16, False),
                ('Half', 28, 7, False)):
            if (name, span) != ('bi_wkv_bwd', 28):  # for measurements alone, and spills
                yield _instance(name, type_, span, height, sums)
    yield from map(combine_instance, (2, 4))
    yield from _compiled_official()


#: What is compiled to check it, and the lowest compute capability (75 for 7.5) that it is for.
INSTANCES: dict[Instance, int] = {
    instance: 80 if 'BFloat' in instance.name else 75 for instance in _compiled()}


# --- sizes ------------------------------------------------------------------------------------

class Sizes(NamedTuple):
    batch: int
    length: int
    channels: int

    @property
    def columns(self) -> int:
        """Blocks side by side."""
        return -(-self.channels // LANES)


class Strides(NamedTuple):
    """Of a map (B, T, C), in elements."""
    b: int
    t: int
    c: int

    def fields(self, name: str) -> dict[str, int]:
        return {f'{name}_{side}': value for side, value in self._asdict().items()}


class Types(NamedTuple):
    """Of the map, and of w and u."""
    map: torch.dtype
    w: torch.dtype
    u: torch.dtype


class Plan(NamedTuple):
    """``span`` tokens to a warp, ``warps`` to a block, ``sections`` of a sequence."""
    span: int
    warps: int
    sections: int

    @property
    def tokens(self) -> int:
        """Of a section."""
        return self.span * self.warps

    @property
    def height(self) -> int:
        return HEIGHTS[self.span]


def _shared(name: str, span: int) -> int:
    """Bytes of shared memory of a warp, as the kernels take it."""
    of_sums, of_tokens = dict(wkv_fwd=(3, 0), wkv_bwd=(5, 4), bi_wkv_fwd=(6, 3),
                              bi_wkv_bwd=(6, 4))[name]
    return 4 * LANES * (of_sums + of_tokens * span)


def plan_of(index: int, name: str, sizes: Sizes) -> Plan:
    """How the kernel ``name`` divides the tokens.

    A section is as long as a block can be. Where that leaves multiprocessors without one, long
    sequences have shorter ones.
    """
    multiprocessors, _, shared = device_limits(index)
    length, samples = sizes.length, sizes.batch * sizes.columns

    def most(span):
        return min(HEIGHTS[span], max_warps or HEIGHTS[span], shared // _shared(name, span))

    span = force_span or (8 if length <= 56 else 14)
    if span * most(span) < length <= 16 * most(16):
        span = 16
    if length <= span * most(span):
        return Plan(span, -(-length // span), 1)
    warps = most(span)
    while warps > 4 and samples * (length // (span * warps)) < 2 * multiprocessors:
        warps = max(4, warps // 2)
    return Plan(span, warps, -(-length // (span * warps)))


# --- launches ---------------------------------------------------------------------------------

class Launch(NamedTuple):
    """``run`` launches; ``memory`` bytes that it needs."""
    run: Callable[..., None]
    memory: int


class _Op:
    """What the launches of an op, forward and backward, have in common."""

    def __init__(self, index: int, causal: bool, types: Types, sizes: Sizes):
        self.index, self.causal, self.types, self.sizes = index, causal, types, sizes
        self.ways = 1 if causal else 2

    def bind(self, which: str, plan: Plan, sums: bool, **maps: Strides) -> Callable[..., None]:
        name = f'{"" if self.causal else "bi_"}wkv_{which}'
        sizes, fields = self.sizes, {}
        for key, strides in maps.items():
            fields |= strides.fields(key)
        return kernel(self.index, _instance, name, TYPES[self.types.map], plan.span, plan.height,
                      sums).bind(
            (sizes.columns, plan.sections, sizes.batch), (LANES, plan.warps, 1),
            plan.warps * _shared(name, plan.span), batch=sizes.batch, length=sizes.length,
            channels=sizes.channels, sections=plan.sections,
            w_type=CODES[self.types.w], u_type=CODES[self.types.u], **fields)

    def combine(self, plan: 'Plan | Cut', values: int, drives: bool = False
                ) -> Callable[..., None]:
        """Of sums of so many values; ``drives``: of gradients, which go backwards."""
        sizes, warps = self.sizes, min(16, plan.sections)
        return kernel(self.index, combine_instance, values).bind(
            (sizes.columns, self.ways, sizes.batch), (LANES, warps, 1),
            4 * LANES * warps * (values + 1), batch=sizes.batch, channels=sizes.channels,
            sections=plan.sections, tokens=plan.tokens,
            way=int(self.causal and drives), causal=int(self.causal),
            w_type=CODES[self.types.w])

    def entries(self, plan: 'Plan | Cut', values: int) -> int:
        """Numbers of the sums of all sections."""
        return self.ways * self.sizes.batch * plan.sections * (values + 1) * self.sizes.channels


@cached
def forward_launch(index: int, types: Types, sizes: Sizes, k: Strides, v: Strides, causal: bool
                   ) -> Launch:
    """The forward of ``wkv`` (``causal``) or of the formula of ``bi_wkv``.

    It takes the addresses of k, v, w, u, y (B, T, C) and memory; of ``wkv`` also, 0 for none, of
    the states start and last (B, 3, C), fp32.
    """
    op = _Op(index, causal, types, sizes)
    plan = plan_of(index, f'{"" if causal else "bi_"}wkv_fwd', sizes)
    run = op.bind('fwd', plan, False, k=k, v=v)
    if plan.sections == 1:
        def launch_forward(k, v, w, u, y, memory=0, start=0, last=0):
            states = dict(entries=start, last=last) if causal else {}
            run(k_data=k, v_data=v, w=w, u=u, y=y, **states)

        return Launch(launch_forward, 0)

    summarise, combine, slab = op.bind('fwd', plan, True, k=k, v=v), op.combine(plan, 2), Slab()
    ends_at, entries_at = (slab.take(op.entries(plan, 2)) for _ in range(2))

    def launch_in_sections(k, v, w, u, y, memory, start=0, last=0):
        ends, entries = memory + ends_at, memory + entries_at
        summarise(k_data=k, v_data=v, w=w, u=u, ends=ends)
        combine(ends=ends, before=start, entries=entries, w=w)
        run(k_data=k, v_data=v, w=w, u=u, y=y, entries=entries, **dict(last=last) if causal else {})

    return Launch(launch_in_sections, slab.size)


@cached
def backward_launch(index: int, types: Types, sizes: Sizes, k: Strides, v: Strides, dy: Strides,
                    causal: bool) -> Launch:
    """The backward.

    It takes the addresses of k, v, dy, w, u and, for gradients in the dtypes of these, dk and dv
    (B, T, C), dw and du; and memory; of ``wkv`` also, 0 for none, the state start and the gradient
    by it, and the gradient by the last one, (B, 3, C), fp32.
    """
    op, slab = _Op(index, causal, types, sizes), Slab()
    plan = plan_of(index, f'{"" if causal else "bi_"}wkv_bwd', sizes)
    maps = dict(k=k, v=v, dy=dy)
    run = op.bind('bwd', plan, False, **maps)
    parts = sizes.batch * plan.sections
    parts_at = slab.take(2 * parts * sizes.channels)
    sums = sum_launch(index, SumJob(parts, 1, sizes.channels, types.w, types.u))
    if plan.sections > 1:
        summarise, find_drives = (op.bind(which, plan, True, **of) for which, of in (
            ('fwd', dict(k=k, v=v)), ('bwd', maps)))
        values = 4 if causal else 2  # of the gradients that leave a section
        combine, combine_drives = op.combine(plan, 2), op.combine(plan, values, drives=True)
        ends_at, entries_at, drive_ends_at, drives_at = (
            slab.take(op.entries(plan, n)) for n in (2, 2, values, values))

    def launch_backward(k, v, dy, w, u, dk, dv, dw, du, memory, start=0, dstart=0, dlast=0):
        inputs = dict(k_data=k, v_data=v, w=w, u=u)
        given = dict(dlast=dlast) if causal else {}
        entries, drives = start, 0
        if plan.sections > 1:
            entries, drives = memory + entries_at, memory + drives_at
            ends, drive_ends = memory + ends_at, memory + drive_ends_at
            summarise(ends=ends, **inputs)
            combine(ends=ends, before=start, entries=entries, w=w)
            find_drives(ends=drive_ends, entries=entries, dy_data=dy, **inputs, **given)
            combine_drives(ends=drive_ends, entries=drives, w=w)
        if causal:
            given.update(dentry=dstart)
        run(dy_data=dy, entries=entries, drives=drives, dk=dk, dv=dv, parts=memory + parts_at,
            **inputs, **given)
        sums((memory + parts_at, dw, du))

    return Launch(launch_backward, slab.size)


# --- the official mode ------------------------------------------------------------------------

OFFICIAL_SPAN, OFFICIAL_WARPS = 16, 16  # as in wkv_official.cuh


class Cut(NamedTuple):
    """How the tokens are divided: ``parts`` warps share ``group`` tokens, each up to ``span``; a
    section has ``groups`` of these."""
    block: int
    group: int
    parts: int
    span: int
    groups: int
    sections: int

    @property
    def tokens(self) -> int:
        """Of a section."""
        return self.groups * self.group

    @property
    def warps(self) -> int:
        return self.groups * self.parts


def _official_shared(which: str, span: int) -> int:
    """Bytes of shared memory of a warp, as the kernels take it."""
    of_sums, of_tokens = (10, 5) if which == 'fwd' else (16, 7)
    return 4 * LANES * (of_sums + of_tokens * span)


@cached
def longest_block(index: int) -> int:
    """Tokens of a block of the official mode at most: a section has whole ones."""
    warps = device_limits(index)[2] // _official_shared('bwd', OFFICIAL_SPAN)
    return OFFICIAL_SPAN * min(warps, OFFICIAL_WARPS)


def cut_of(index: int, which: str, length: int, blocks: int) -> Cut:
    """A warp has whole blocks, or a block whole warps."""
    block = -(-length // blocks)
    if block <= OFFICIAL_SPAN:
        group, parts = OFFICIAL_SPAN // block * block, 1
    else:
        group, parts = block, -(-block // OFFICIAL_SPAN)
    span = -(-group // parts)
    warps = min(max_warps or OFFICIAL_WARPS,
                device_limits(index)[2] // _official_shared(which, span))
    groups = min(max(1, warps // parts), -(-length // group))
    return Cut(block, group, parts, span, groups, -(-length // (groups * group)))


def _bind_official(op: _Op, which: str, mode: int | str, cut: Cut, eps: float, **maps: Strides
                   ) -> Callable[..., None]:
    sizes, fields = op.sizes, {}
    for key, strides in maps.items():
        fields |= strides.fields(key)
    return kernel(op.index, _official_instance, which, TYPES[op.types.map], mode).bind(
        (sizes.columns, cut.sections, sizes.batch), (LANES, cut.warps, 1),
        cut.warps * _official_shared(which, cut.span), batch=sizes.batch, length=sizes.length,
        channels=sizes.channels, sections=cut.sections, eps=eps,
        cut_block=cut.block, cut_group=cut.group, cut_parts=cut.parts, cut_span=cut.span,
        w_type=CODES[op.types.w], u_type=CODES[op.types.u], **fields)


@cached
def official_forward_launch(index: int, types: Types, sizes: Sizes, k: Strides, v: Strides,
                            blocks: int, eps: float) -> Launch:
    """As :func:`forward_launch`, of the official mode of ``bi_wkv``."""
    op, slab = _Op(index, False, types, sizes), Slab()
    cut = cut_of(index, 'fwd', sizes.length, blocks)
    run, summarise = (_bind_official(op, 'fwd', mode, cut, eps, k=k, v=v)
                      for mode in ('false', 'true'))
    combine = op.combine(cut, 2)
    ends_at, entries_at = (slab.take(op.entries(cut, 2)) for _ in range(2))

    def launch_forward(k, v, w, u, y, memory=0, **states):
        entries = 0
        if cut.sections > 1:
            entries = memory + entries_at
            summarise(k_data=k, v_data=v, w=w, u=u, ends=memory + ends_at)
            combine(ends=memory + ends_at, entries=entries, w=w)
        run(k_data=k, v_data=v, w=w, u=u, y=y, entries=entries)

    return Launch(launch_forward, slab.size if cut.sections > 1 else 0)


@cached
def official_backward_launch(index: int, types: Types, sizes: Sizes, k: Strides, v: Strides,
                             dy: Strides, blocks: int, eps: float) -> Launch:
    """As :func:`backward_launch`, of the official mode of ``bi_wkv``."""
    op, slab = _Op(index, False, types, sizes), Slab()
    cut = cut_of(index, 'bwd', sizes.length, blocks)
    run, find_ends, find_drives = (
        _bind_official(op, 'bwd', mode, cut, eps, k=k, v=v, dy=dy)
        for mode in ('RUN', 'ENDS', 'DRIVES'))
    combine = {n: op.combine(cut, n) for n in (2, 4)}
    parts = sizes.batch * cut.sections
    parts_at = slab.take(2 * parts * sizes.channels)
    sums = sum_launch(index, SumJob(parts, 1, sizes.channels, types.w, types.u))
    ends_at, entries_at, drive_ends_at, drives_at = (
        slab.take(op.entries(cut, n)) for n in (4, 4, 2, 2))

    def launch_backward(k, v, dy, w, u, dk, dv, dw, du, memory, **states):
        inputs = dict(k_data=k, v_data=v, dy_data=dy, w=w, u=u)
        entries = drives = 0
        if cut.sections > 1:
            entries, drives = memory + entries_at, memory + drives_at
            find_ends(ends=memory + ends_at, **inputs)
            combine[4](ends=memory + ends_at, entries=entries, w=w)
            find_drives(ends=memory + drive_ends_at, entries=entries, **inputs)
            combine[2](ends=memory + drive_ends_at, entries=drives, w=w)
        run(entries=entries, drives=drives, dk=dk, dv=dv, parts=memory + parts_at, **inputs)
        sums((memory + parts_at, dw, du))

    return Launch(launch_backward, slab.size)
