"""What end_to_end.py measures and reports: cases, tables, picture."""

import math
from typing import NamedTuple

import matplotlib
from bench_report import NAN, Sheet, number, print_problems, print_table, show, show_in
from mila_models import MILAS
from ravlt_models import RAVLTS
from rmt_models import RMTS
from vim_models import VIMS
from vrwkv_models import VRWKVS
from vssd_models import VSSDS

from vmamba_mm import zoo
from vmamba_mm.atomic import atomic_file
from vmamba_mm.errors import UserError

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402 (after the choice of its backend)

VMAMBAS = tuple(dict.fromkeys(e.arch for e in zoo.entries('vmamba', task='cls')))
OURS = (*VMAMBAS, *VIMS, *VSSDS.ours, *RMTS.ours, *MILAS.ours, *RAVLTS.ours, *VRWKVS.ours)
#: family: the peers of each size; DeiT-S has nearly the parameters of the tiny models
FAMILIES = {'Swin': {'tiny': 'swin_t', 'small': 'swin_s', 'base': 'swin_b'},
            'ConvNeXt': {'tiny': 'convnext_t', 'small': 'convnext_s', 'base': 'convnext_b'},
            'DeiT': {'tiny': 'deit_s'}, 'MambaOut': {'tiny': 'mambaout_t'},
            'MambaVision': {'tiny': 'mambavision_t'}}
#: The same of Vim: DeiT of its width, with attention as one op and as matrices in memory, and Vim
#: itself with its mixer as published, by mamba-ssm's scan and by ours (vim_models.py).
VIM_FAMILIES = {family: {size: f'{name}_{size[0]}' for size in ('tiny', 'small', 'base')}
                for family, name in (('DeiT', 'deit'), ('DeiT, attention in memory', 'plain_deit'),
                                     ('as published, mamba-ssm', 'mamba_ssm_vim'),
                                     ('as published, our scan', 'published_vim'))}
#: All models of ours with their peers. Those of VSSD, RMT and Vision-RWKV are also the published
#: forms, in plain PyTorch; DeiT-S has nearly the parameters of RMT-S, and the width of
#: Vision-RWKV-S.
COMPARED = [(VMAMBAS, FAMILIES), (VIMS, VIM_FAMILIES), *(
    (twins.ours, {'as published': {size: name for name, size in twins.theirs.items()}, **others})
    for twins, others in ((VSSDS, {'ConvNeXt': FAMILIES['ConvNeXt']}),
                          (RMTS, {'DeiT': VIM_FAMILIES['DeiT']}),
                          (MILAS, {'ConvNeXt': FAMILIES['ConvNeXt']}),
                          (RAVLTS, {'DeiT': VIM_FAMILIES['DeiT']}),
                          (VRWKVS, {'DeiT': VIM_FAMILIES['DeiT']})))]
TINY = ('tiny_s1l8', *(peers['tiny'] for peers in FAMILIES.values()))
RESOLUTIONS = ((224, 64), (384, 32), (512, 16), (640, 16), (768, 8), (1024, 4))
NUMBERS = ('ms', 'images_per_s', 'peak_gib', 'error', 'grad_error')
SETTING = ('device', 'torch', 'timm', 'dtype', 'shrink')
# Okabe and Ito's colours, told apart with every kind of colour vision; hatches, markers besides.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
HATCHES = ('', '//', '..', 'xx', '\\\\', '++')
MARKERS = 'osD^vP'


class Case(NamedTuple):
    """A model and how it is measured.

    ``output``: 'logits' of the classifier or 'maps' of the backbone.
    """
    model: str
    task: str = 'inference'
    how: str = 'eager'
    precision: str = 'autocast'
    batch: int = 128
    height: int = 224
    width: int = 224
    output: str = 'logits'

    @property
    def what(self):
        """All but the model, for people."""
        maps = ', maps' if self.output == 'maps' else ''
        return (f'{self.task} {self.how} {self.precision}, batch {self.batch}, '
                f'{self.height}x{self.width}{maps}')


SHEET = Sheet(Case, NUMBERS, SETTING)


# --- what others measured --------------------------------------------------------------------

class Anchor(NamedTuple):
    """A number of the official VMamba, of Swin-T and of ConvNeXt-T: measured by us on an H100."""
    case: Case
    number: str
    official: float
    swin: float = NAN
    convnext: float = NAN


_TRAIN = Case('tiny_s1l8', 'forward+backward')
_ONE_IMAGE = Case('tiny_s1l8', batch=1)
ANCHORS = [
    Anchor(Case('tiny_s1l8'), 'images_per_s', 2872, 5128, 7368),
    Anchor(Case('tiny_s1l8', how='compiled', precision='pure'), 'images_per_s', NAN, 10433, 15248),
    Anchor(_TRAIN, 'images_per_s', 1089, 1938, 2537),
    Anchor(_TRAIN._replace(how='compiled'), 'images_per_s', NAN, 3499, 3777),
    Anchor(_TRAIN, 'peak_gib', 12.0, 9.0, 8.0),
    Anchor(_ONE_IMAGE, 'ms', 24.7, 9.0, 5.6),
    Anchor(_ONE_IMAGE._replace(how='graph'), 'ms', NAN),
    Anchor(_ONE_IMAGE._replace(height=800, width=1280, output='maps'), 'ms', 18.4, 10.7, 5.3),
    Anchor(Case('tiny_s1l8', batch=4, height=1024, width=1024), 'images_per_s', 140, 221, 289)]
#: official images/s of inference and of forward+backward
_OFFICIAL = {'small_s1l20': (1978, 709), 'base_s1l20': (1594, 561), 'tiny_s2l5': (2284, 842),
             'small_s2l15': (1580, 554), 'base_s2l15': (1234, 430), 'vanilla_tiny': (837, 259)}
ANCHORS += [Anchor(Case(model, task), 'images_per_s', speed)
            for model, speeds in _OFFICIAL.items()
            for task, speed in zip(('inference', 'forward+backward'), speeds, strict=True)]
#: the time per pixel at 1024 by that at 224
GROWTH = (0.92, 1.06, 1.13)


def time_per_pixel(rows, model):
    """{side: nanoseconds} along the resolutions, as far as they were measured."""
    speeds = {side: number(rows, Case(model, batch=batch, height=side, width=side),
                           'images_per_s') for side, batch in RESOLUTIONS}
    return {side: 1e9 / speed / side**2 for side, speed in speeds.items() if speed > 0}


# --- tables ---------------------------------------------------------------------------------

def print_ratios(rows):
    for models, families in COMPARED:
        print_ratios_of(rows, models, families)


def print_ratios_of(rows, models, families):
    lines = []
    for case, row in rows.items():
        if case.model not in models:
            continue
        size = next(s for s in ('micro', 'tiny', 'small', 'base', 'large') if s in case.model)
        cells = []
        for peers in families.values():
            peer = case._replace(model=peers.get(size, ''))
            faster = row['images_per_s'] / number(rows, peer, 'images_per_s')
            memory = row['peak_gib'] / number(rows, peer, 'peak_gib')
            cells.append('' if math.isnan(faster) else f'{faster:.2f}'
                         + ('' if math.isnan(memory) else f' | {memory:.2f}'))
        if any(cells):
            lines.append([f'{case.model}: {case.what}', *cells])
    print_table('Times as fast as the peer of its size, measured beside it | peak memory by its',
                ['', *families], lines)


def print_anchors(rows):
    """Print what was measured here beside the anchors."""
    units = {'images_per_s': 'images/s', 'ms': 'ms', 'peak_gib': 'peak GiB'}
    lines = [[f'{case.model}: {case.what}, {units[name]}', number(rows, case, name), *anchors]
             for case, name, *anchors in ANCHORS]
    growth = time_per_pixel(rows, 'tiny_s1l8')
    lines.append(['tiny_s1l8: time per pixel at 1024 by that at 224',
                  growth.get(1024, NAN) / growth.get(224, NAN), *GROWTH])
    print_table('This run | measured by us on an H100 in fp16: the official VMamba, Swin-T, '
                'ConvNeXt-T', ['', 'here', 'official', 'Swin-T', 'ConvNeXt-T'],
                [[what, *map(show, values)] for what, *values in lines
                 if not math.isnan(values[0])])


def print_rows(rows):
    print_table('Medians; error: relative 2-norm from fp32 on the CPU, of the output and of the '
                "parameters' gradient",
                ['', 'ms', 'images/s', 'peak GiB', 'error', 'grad'],
                [[f'{case.model}: {case.what}', show(row['ms']), show(row['images_per_s']),
                  show(row['peak_gib']), *(show_in('.0e', row[e])
                                           for e in ('error', 'grad_error'))]
                 for case, row in rows.items() if not row['problem']])
    print_problems(rows)


# --- picture --------------------------------------------------------------------------------

def plot(rows, path, title):
    """Draw at most four panels, those that have rows."""
    rows = {case: row for case, row in rows.items() if not row['problem']}
    peers = (peer for _, families in COMPARED for of_sizes in families.values()
             for peer in of_sizes.values())
    models = [m for m in dict.fromkeys((*OURS, *peers))
              if any(case.model == m for case in rows)]
    tiny = [m for m in TINY if m in models] or models[:len(COLOURS)]
    looks = {m: (COLOURS[i], HATCHES[i], MARKERS[i]) for i, m in enumerate(tiny)}
    single = {case for case in rows if case.batch == 1 and case.task == 'inference'}
    batches = {case for case in rows if case.batch == 128}
    panels = [
        (draw_bars, batches, tiny, 'images_per_s', 'images/s, batch 128, 224x224'),
        (draw_bars, single, tiny, 'ms', 'one image: ms of inference'),
        (draw_growth, rows, tiny, None, 'inference: ns a pixel, batch 64 at 224 to 4 at 1024'),
        (draw_all, {case for case in batches if case.how == 'eager'}, models, 'images_per_s',
         'images/s, eager, autocast; figures: peak GiB')]
    panels = [panel for panel in panels if any(case.model in panel[2] for case in panel[1])]
    panels = [p for p in panels if p[0] is not draw_growth
              or any(len(time_per_pixel(rows, m)) > 1 for m in tiny)]
    if not panels:
        raise UserError(f'there is nothing to draw: {path} was not written')
    columns = min(2, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False,
                                figsize=(7 * columns, 4.6 * -(-len(panels) // columns)),
                                layout='constrained')
    for ax, (draw, cases, shown, name, label) in zip(axes.flat, panels, strict=False):
        draw(ax, rows, cases, shown if draw is draw_all else looks, name)
        ax.set_title(label, fontsize=11)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    for ax in axes.flat[len(panels):]:
        ax.set_axis_off()
    figure.suptitle(title, fontsize=9)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format='png')
    plt.close(figure)


def draw_bars(ax, rows, cases, models, name):
    """A group of bars for each kind of case, a colour and hatch for each model."""
    groups = list(dict.fromkeys(case._replace(model='') for case in rows
                                if case in cases and case.model in models))
    models = {m: look for m, look in models.items() if any(case.model == m for case in cases)}
    width = 0.8 / len(models)
    for i, (model, (colour, hatch, _)) in enumerate(models.items()):
        heights = [number(rows, group._replace(model=model), name) for group in groups]
        bars = ax.bar([x + (i - (len(models) - 1) / 2) * width for x in range(len(groups))],
                      heights, width, label=model, color=colour, hatch=hatch, edgecolor='white',
                      linewidth=0.5)
        ax.bar_label(bars, ['' if math.isnan(h) else show(h) for h in heights], fontsize=6,
                     rotation=90, padding=2)
    sizes = len({(group.height, group.width) for group in groups}) > 1
    ax.set_xticks(range(len(groups)), [
        '\n'.join([group.task, f'{group.how}, {group.precision}']
                  + [f'{group.height}x{group.width}'] * sizes) for group in groups], fontsize=7)
    ax.margins(y=0.15)
    ax.legend(fontsize=8)


def draw_growth(ax, rows, cases, models, name):
    for model, (colour, _, marker) in models.items():
        ns_per_pixel = time_per_pixel(rows, model)
        if ns_per_pixel:
            ax.plot(list(ns_per_pixel), list(ns_per_pixel.values()), label=model, color=colour,
                    marker=marker)
    ax.set(xlabel='side of the image', xticks=[side for side, _ in RESOLUTIONS])
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8)


def draw_all(ax, rows, cases, models, name):
    """All models, a bar for inference and one for forward+backward."""
    models = [m for m in models if any(case.model == m for case in cases)][::-1]
    for i, (task, colour) in enumerate((('inference', COLOURS[0]),
                                        ('forward+backward', COLOURS[1]))):
        task_cases = [Case(model, task) for model in models]
        bars = ax.barh([y + 0.2 - 0.4 * i for y in range(len(models))],
                       [number(rows, case, name) for case in task_cases], 0.38, label=task,
                       color=colour, hatch=HATCHES[i], edgecolor='white', linewidth=0.5)
        ax.bar_label(bars, [show(number(rows, case, 'peak_gib')).strip('-') for case in task_cases],
                     fontsize=7, padding=3)
    ax.set_yticks(range(len(models)), models, fontsize=8)
    ax.margins(x=0.1)
    ax.legend(fontsize=8)
