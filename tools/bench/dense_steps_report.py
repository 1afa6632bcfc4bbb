"""What dense_steps.py measures and reports: cases, requirements, tables."""

import math
from typing import NamedTuple

from end_to_end_report import NAN, judge, number, print_table, show

OURS = 'tiny_s1l8'
PEERS = {'convnext_t': 'ConvNeXt-T', 'swin_t': 'Swin-T'}
MODELS = (OURS, 'swin_t', 'convnext_t')
BACKBONE = 'backbone'  # the task of it alone, which is timed with mask-rcnn
NUMBERS = ('ms', 'peak_gib', 'loss', 'loss_error', 'error', 'grad_error', 'kernels_ms',
           'backbone_kernels_ms')
SETTING = ('device', 'torch', 'mm', 'shrink')
PEAK_LIMIT = 1.1  # times the peak of ConvNeXt-T in the same run


class Case(NamedTuple):
    model: str
    task: str = 'mask-rcnn'
    precision: str = 'fp32'

    @property
    def what(self) -> str:
        """All but the model, for people."""
        return f'{WHAT[self.task]}, {self.precision}'


WHAT = {'mask-rcnn': 'Mask R-CNN FPN 800x1280 b2', 'upernet': 'UperNet 512x512 b4',
        BACKBONE: 'backbone forward 800x1280 b1'}


class Requirement(NamedTuple):
    """``ms``, ``gib``: the anchors, of the official VMamba-T[s1l8], Swin-T and ConvNeXt-T."""
    task: str
    precision: str
    ms: tuple[float, float, float]
    gib: tuple[float, float, float]
    required_ms: float = NAN

    @property
    def ratio(self) -> float:
        """What is required in times of ConvNeXt-T."""
        return self.required_ms / self.ms[2]


REQUIREMENTS = [
    Requirement('mask-rcnn', 'fp32', (237, 202, 185), (8.59, 6.44, 5.94), 185),
    Requirement('mask-rcnn', 'fp16', (233, 207, 197), (6.29, 5.09, 3.67), 190),
    Requirement('upernet', 'fp32', (174, 154, 125), (8.17, 7.18, 7.06), 125),
    Requirement('upernet', 'fp16', (150, 127, 119), (6.11, 5.68, 5.38), 115),
    Requirement(BACKBONE, 'fp16', (19.3, 15.8, 8.0), (NAN, NAN, NAN))]


def print_ratios(rows, setting):
    """First of all: absolute times compare only within one machine."""
    counts = setting['shrink'] == '1' and setting['device'] != 'CPU'
    lines = []
    for need in REQUIREMENTS:
        case = Case(OURS, need.task, need.precision)
        ratio = {(peer, name): number(rows, case, name)
                 / number(rows, case._replace(model=peer), name)
                 for peer in PEERS for name in ('ms', 'peak_gib')}
        if all(map(math.isnan, ratio.values())):
            continue
        time, memory = (ratio['convnext_t', name] for name in ('ms', 'peak_gib'))
        limit = NAN if need.task == BACKBONE else PEAK_LIMIT
        lines.append([case.what, fixed(time), fixed(need.ratio),
                      judge(time, need.ratio) if counts else '', fixed(ratio['swin_t', 'ms']),
                      fixed(memory), fixed(limit), judge(memory, limit) if counts else '',
                      fixed(ratio['swin_t', 'peak_gib'])])
    print_table(f'{OURS} by its peers of this run, less is better: what counts is the time by '
                'that of ConvNeXt-T;\nrequired of it: the required ms by the ms of ConvNeXt-T '
                'among the anchors below' + ('' if counts else ' (no verdicts on a CPU or shrunk)'),
                ['', 'ms/ConvNeXt-T', 'required', '', 'ms/Swin-T', 'peak/ConvNeXt-T', 'required',
                 '', 'peak/Swin-T'], lines)


def print_requirements(rows, setting):
    """Ours beside the peers of the run and the anchors; verdicts are for an H100 only."""
    counts = 'H100' in setting['device'] and setting['shrink'] == '1'
    lines = []
    for need in REQUIREMENTS:
        case = Case(OURS, need.task, need.precision)
        most = PEAK_LIMIT * number(rows, case._replace(model='convnext_t'), 'peak_gib')
        for name, unit, anchors, limit in (
                ('ms', 'ms', need.ms, need.required_ms),
                ('peak_gib', 'peak GiB', need.gib, NAN if need.task == BACKBONE else most)):
            here = [number(rows, case._replace(model=model), name) for model in MODELS]
            if not all(map(math.isnan, here)):
                lines.append([f'{case.what}, {unit}', *map(show, here), '|', *map(show, anchors),
                              '|', show(limit), judge(here[0], limit) if counts else ''])
    print_table('This run | anchors: measured by us on an H100, official is the public VMamba | '
                'required of an H100 (peak: ConvNeXt-T of this run + 10 %)'
                + ('' if counts else '\n(this run is on another device or size: no verdicts)'),
                ['', OURS, 'Swin-T', 'ConvNeXt-T', '|', 'official', 'Swin-T', 'ConvNeXt-T', '|',
                 'required', ''], lines)


def print_rows(rows):
    measured = {case: row for case, row in rows.items() if not row['problem']}
    print_table("Checked before: the first step's loss, from fp32 in fp16; the backbone's maps and "
                "its parameters' gradient, from fp32 on the CPU\n(800x1280: the gradient in fp16 "
                'from fp32 on the same device)',
                ['', 'loss', 'from fp32', 'maps', 'gradient'],
                [[f'{case.model}: {case.what}', blank(row['loss'], '.4f'),
                  *(blank(row[name], '.0e') for name in ('loss_error', 'error', 'grad_error'))]
                 for case, row in measured.items()])
    print_table("--profile: ms of the GPU's kernels and copies in a step, the backbone's by "
                'itself, forward and backward',
                ['', 'step', 'kernels', 'backbone', 'rest', 'backbone, %'],
                [[f'{case.model}: {case.what}', show(row['ms']), show(kernels), show(part),
                  show(kernels - part), f'{100 * part / kernels:.0f}']
                 for case, row in measured.items()
                 for kernels, part in [(row['kernels_ms'], row['backbone_kernels_ms'])]
                 if kernels > 0])
    problems = [f'{case.model}: {case.what}: {row["problem"]}' for case, row in rows.items()
                if row['problem']]
    if problems:
        print('\nNot measured', *problems, sep='\n')


def fixed(value):
    return blank(value, '.3f') or '-'


def blank(value, style):
    return '' if math.isnan(value) else format(value, style)
