"""What dense_steps.py measures and reports: cases, tables."""

import math
from typing import NamedTuple

from bench_report import NAN, Sheet, number, print_problems, print_table, show, show_in

OURS = 'tiny_s1l8'
PEERS = {'convnext_t': 'ConvNeXt-T', 'swin_t': 'Swin-T'}
MODELS = (OURS, 'swin_t', 'convnext_t')
BACKBONE = 'backbone'  # the task of it alone, which is timed with mask-rcnn
NUMBERS = ('ms', 'peak_gib', 'loss', 'loss_error', 'error', 'grad_error', 'kernels_ms',
           'backbone_kernels_ms')
SETTING = ('device', 'torch', 'mm', 'shrink')


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


SHEET = Sheet(Case, NUMBERS, SETTING)


class Anchor(NamedTuple):
    """Numbers of the official VMamba-T[s1l8], Swin-T and ConvNeXt-T: measured by us on an H100."""
    task: str
    precision: str
    ms: tuple[float, float, float]
    peak_gib: tuple[float, float, float]


ANCHORS = [
    Anchor('mask-rcnn', 'fp32', (237, 202, 185), (8.59, 6.44, 5.94)),
    Anchor('mask-rcnn', 'fp16', (233, 207, 197), (6.29, 5.09, 3.67)),
    Anchor('upernet', 'fp32', (174, 154, 125), (8.17, 7.18, 7.06)),
    Anchor('upernet', 'fp16', (150, 127, 119), (6.11, 5.68, 5.38)),
    Anchor(BACKBONE, 'fp16', (19.3, 15.8, 8.0), (NAN, NAN, NAN))]


def print_ratios(rows):
    """First of all: absolute times compare only within one machine."""
    lines = []
    for anchor in ANCHORS:
        case = Case(OURS, anchor.task, anchor.precision)
        ratios = [number(rows, case, name) / number(rows, case._replace(model=peer), name)
                  for name in ('ms', 'peak_gib') for peer in PEERS]
        if not all(map(math.isnan, ratios)):
            lines.append([case.what, *(show_in('.3f', ratio) or '-' for ratio in ratios)])
    print_table(f'{OURS} by its peers of this run, less is better',
                ['', *(f'{what}/{name}' for what in ('ms', 'peak') for name in PEERS.values())],
                lines)


def print_anchors(rows):
    """Ours and the peers of the run beside the anchors."""
    lines = []
    for anchor in ANCHORS:
        case = Case(OURS, anchor.task, anchor.precision)
        for name, unit in (('ms', 'ms'), ('peak_gib', 'peak GiB')):
            here = [number(rows, case._replace(model=model), name) for model in MODELS]
            if not all(map(math.isnan, here)):
                lines.append([f'{case.what}, {unit}', *map(show, here), '|',
                              *map(show, getattr(anchor, name))])
    print_table('This run | measured by us on an H100, official is the public VMamba',
                ['', OURS, 'Swin-T', 'ConvNeXt-T', '|', 'official', 'Swin-T', 'ConvNeXt-T'],
                lines)


def print_rows(rows):
    measured = {case: row for case, row in rows.items() if not row['problem']}
    print_table("Checked before: the first step's loss, from fp32 in fp16; the backbone's maps and "
                "its parameters' gradient, from fp32 on the CPU\n(800x1280: the gradient in fp16 "
                'from fp32 on the same device)',
                ['', 'loss', 'from fp32', 'maps', 'gradient'],
                [[f'{case.model}: {case.what}', show_in('.4f', row['loss']),
                  *(show_in('.0e', row[name]) for name in ('loss_error', 'error', 'grad_error'))]
                 for case, row in measured.items()])
    print_table("--profile: ms of the GPU's kernels and copies in a step, the backbone's by "
                'itself, forward and backward',
                ['', 'step', 'kernels', 'backbone', 'rest', 'backbone, %'],
                [[f'{case.model}: {case.what}', show(row['ms']), show(kernels), show(part),
                  show(kernels - part), f'{100 * part / kernels:.0f}']
                 for case, row in measured.items()
                 for kernels, part in [(row['kernels_ms'], row['backbone_kernels_ms'])]
                 if kernels > 0])
    print_problems(rows)
