"""Table, picture and Markdown of tools/analysis/mqar.py, from the files of its finished runs.

What counts is the accuracy at the end of a run, on the test with the most pairs. For each model and
width the learning rate with the best mean over the seeds counts, as in the papers.
"""

import itertools
import json
import statistics

from curve_labels import label_ends
from mqar_models import CHOICES, MODELS
from mqar_training import read_result
from report_parts import (
    bullets,
    command_block,
    finish,
    make_figure,
    markdown_table,
    number,
    plain_ticks,
    print_table,
    style_of,
    wrapped,
    write_csv,
)

from vmamba_mm.atomic import write_atomic
from vmamba_mm.errors import UserError

COLUMNS = ('model', 'd_model', 'lr', 'seed', 'step', 'pairs', 'loss', 'accuracy', 'seconds')
SOLVED = 0.9  # an accuracy above which a width is called solved

LIMITS = (
    'A made-up task: it isolates one ability, to look up what stood before, and says nothing of '
    'language, images or speed.',
    'The best learning rate of each model is chosen on the test itself, as in the papers.',
    'The models have no MLP and get the same number of steps; a longer training can lift any of '
    'them that is below 1.',
)


# --- files ----------------------------------------------------------------------------------

def read(folder):
    """The results of all finished runs, in the order of models, widths, learning rates, seeds.

    Raises:
        UserError: if there are none, or they are not of one setting.
    """
    paths = sorted((folder / 'runs').glob('*.json'))
    if not paths:
        raise UserError(f'{folder}/runs holds no finished run: --results takes the --out of an '
                        'earlier call')
    results = []
    for path in paths:
        try:
            result = read_result(path)
            order = (list(MODELS).index(result['run']['model']),
                     *(result['run'][k] for k in ('d_model', 'lr', 'seed')))
            results.append((order, result))
            setting = result['setting']
        except (KeyError, ValueError, TypeError) as err:
            raise UserError(f'{path} is no result of this tool: {type(err).__name__} {err}') \
                from err
        if setting != results[0][1]['setting']:
            raise UserError(f'{path} and {paths[0]} are of different settings: put each setting '
                            'into an --out of its own')
    return [result for _, result in sorted(results, key=lambda pair: pair[0])]


def write(results, folder):
    write_csv([row for result in results for row in result['rows']], COLUMNS, folder / 'mqar.csv')
    summary = summarise(results)
    write_atomic((json.dumps(dict(
        setting=results[0]['setting'], environments=environments(results),
        command=command_of(results), summary=summary), indent=2) + '\n').encode(),
        folder / 'mqar.json')


def environments(results):
    """What the runs were made with, each once: a study may be made in pieces."""
    return [json.loads(text) for text in dict.fromkeys(
        json.dumps(result['environment'], sort_keys=True) for result in results)]


def values_of(results, key):
    return ', '.join(f'{value:g}' for value in sorted({r['run'][key] for r in results}))


def command_of(results):
    """The command that makes the same runs again."""
    s, runs = results[0]['setting'], [result['run'] for result in results]
    words = ['python tools/analysis/mqar.py', f'--setting {s["name"]}']
    for key in CHOICES:
        values = dict.fromkeys(run[{'models': 'model', 'widths': 'd_model', 'lrs': 'lr',
                                    'seeds': 'seed'}[key]] for run in runs)
        words.append(f'--{key} {" ".join(f"{v:g}" if key == "lrs" else str(v) for v in values)}')
    for key, value in s['changed'].items():
        value = ' '.join(map(str, value)) if isinstance(value, list) else value
        words.append(f'--{key.replace("_", "-")} {value}')
    return ' '.join(words + ['--cuda-graphs'] * s['cuda_graphs'])


# --- numbers --------------------------------------------------------------------------------

def summarise(results):
    """A dict for each model and width, of its best learning rate; in the order of the results.

    ``accuracies`` are those of the seeds, ``mean``, ``min`` and ``max`` what they amount to,
    ``by_lr`` the means of all learning rates, ``steps`` and ``seconds`` the means of the runs.
    """
    summary = []
    for (model, width), group in itertools.groupby(
            results, key=lambda r: (r['run']['model'], r['run']['d_model'])):
        by_lr = {}
        for result in group:
            by_lr.setdefault(result['run']['lr'], []).append(result)
        means = {lr: statistics.fmean(r['accuracy'] for r in runs) for lr, runs in by_lr.items()}
        best = max(means, key=means.get)
        runs = by_lr[best]
        accuracies = [r['accuracy'] for r in runs]
        summary.append(dict(
            model=model, d_model=width, lr=best, accuracies=accuracies, mean=means[best],
            min=min(accuracies), max=max(accuracies), by_lr=means,
            parameters=runs[0]['parameters'], state=runs[0]['state'],
            steps=statistics.fmean(r['steps'] for r in runs),
            seconds=statistics.fmean(r['seconds'] for r in runs)))
    return summary


def table(summary):
    """Rows of text, the first of them the titles."""
    lines = [('model', 'd_model', 'parameters', 'numbers kept', 'best lr', 'accuracy', 'of seeds',
              'steps', 'seconds')]
    for s in summary:
        lines.append((MODELS[s['model']].label, str(s['d_model']), f'{s["parameters"]:,}',
                      f'{s["state"]:,}', f'{s["lr"]:g}', f'{s["mean"]:.3f}',
                      f'{s["min"]:.3f} to {s["max"]:.3f}' if len(s['accuracies']) > 1 else '-',
                      f'{s["steps"]:,.0f}', number(s['seconds'])))
    return lines


def show(results):
    print_table(table(summarise(results)))


def findings(results):
    """The sentences that the numbers allow."""
    setting, summary = results[0]['setting'], summarise(results)
    answers, pairs = setting['vocab_size'] // 2, max(setting['pairs'])
    lines = [f'Chance is 1/{answers} = {1 / answers:.4f} for a model that knows which tokens are '
             f'values, and 1/{pairs} = {1 / pairs:.3f} for one that knows those of the example but '
             'not which belongs to which key.']
    for model, rows in itertools.groupby(summary, key=lambda s: s['model']):
        rows = list(rows)
        solved = [s['d_model'] for s in rows if s['mean'] > SOLVED]
        text = ', '.join(f'{s["mean"]:.3f} (d_model {s["d_model"]})' for s in rows)
        lines.append(f'{MODELS[model].label}: {text}' + (
            f'; above {SOLVED:g} from d_model {min(solved)} on.' if solved and len(rows) > 1
            else '.'))
    lines += _comparisons(summary)
    if len({r['run']['seed'] for r in results}) == 1:
        lines.append('One seed: the spread is not known, so small differences say nothing.')
    error = (summary[-1]['mean'] * (1 - summary[-1]['mean'])
             / (setting['test_examples'] * pairs)) ** 0.5
    lines.append(f'The test has {setting["test_examples"]:,} examples with {pairs} queries each; '
                 f'another draw of as many would move the last accuracy above by about {error:.4f} '
                 '(one standard error).')
    return lines


def _comparisons(summary):
    """Mamba-2's sizes of the state against each other, at the same width, seed by seed."""
    lines = []
    sizes = [m for m in MODELS if m.startswith('mamba2-')]
    found = {(s['model'], s['d_model']): s for s in summary}
    for small, large in itertools.pairwise(sizes):
        parted = [w for (m, w), s in found.items() if m == large and (small, w) in found
                  and s['min'] > found[small, w]['max']]
        if parted:
            lines.append(f'{MODELS[large].label} is above {MODELS[small].label} for every seed at '
                         f'd_model {", ".join(map(str, parted))}.')
    return lines


# --- picture --------------------------------------------------------------------------------

def draw(results, path):
    """Accuracy over the width, if there are several; and over the steps, at the smallest width."""
    setting, summary = results[0]['setting'], summarise(results)
    widths = sorted({s['d_model'] for s in summary})
    figure, axes = make_figure(2 if len(widths) > 1 else 1)
    styles = {model: style_of(i) for i, model in enumerate(MODELS)}
    task = (f'L = {setting["length"]}, {max(setting["pairs"])} pairs, '
            f'{setting["vocab_size"]} tokens')
    ends = []
    if len(widths) > 1:
        ax = axes[0]
        for model, rows in itertools.groupby(summary, key=lambda s: s['model']):
            rows = list(rows)
            x = [s['d_model'] for s in rows]
            ax.plot(x, [s['mean'] for s in rows], **styles[model])
            ax.fill_between(x, [s['min'] for s in rows], [s['max'] for s in rows],
                            color=styles[model]['color'], alpha=0.12, linewidth=0)
            ends.append((x[-1], rows[-1]['mean'], MODELS[model].label, styles[model]['color']))
        ax.set_xscale('log', base=2)
        plain_ticks(ax.xaxis, widths)
        ax.set_ylim(-0.03, 1.03)
        finish(ax, f'Recall at the best learning rate ({task})', 'd_model', 'accuracy')
        figure.draw_without_rendering()
        label_ends(ax, ends)
    ax, ends = axes[-1], []
    for s in (s for s in summary if s['d_model'] == widths[0]):
        curves = [[(r['step'], r['accuracy']) for r in result['rows']
                   if r['pairs'] == max(setting['pairs'])]
                  for result in results if all(result['run'][k] == s[k]
                                               for k in ('model', 'd_model', 'lr'))]
        style = dict(styles[s['model']], markersize=0, linewidth=1.5)
        for curve in curves:
            if curve:
                ax.plot(*zip(*((0, 1 / (setting['vocab_size'] // 2)), *curve), strict=True),
                        **style)
        last = [curve[-1] for curve in curves if curve]
        if last:
            ax.plot(*zip(*last, strict=True), **dict(styles[s['model']], linestyle=''))
            ends.append((max(x for x, _ in last), statistics.fmean(y for _, y in last),
                         MODELS[s['model']].label, styles[s['model']]['color']))
    ax.set_ylim(-0.03, 1.03)
    seeds = len({result['run']['seed'] for result in results})
    finish(ax, f'Training at d_model {widths[0]}, {seeds} seed{"s" if seeds > 1 else ""}'
           + (f' ({task})' if len(widths) == 1 else ''), 'step', 'accuracy')
    figure.draw_without_rendering()
    label_ends(ax, ends)
    figure.savefig(path, dpi=110)


# --- Markdown -------------------------------------------------------------------------------

def markdown(results, picture):
    """The report; ``picture`` is its name relative to the report."""
    s, summary = results[0]['setting'], summarise(results)
    pairs = ', '.join(map(str, s['pairs']))
    intro = (f'Multi-query associative recall: {max(s["pairs"])} key-value pairs in '
             f'{s["length"]} tokens, a vocabulary of {s["vocab_size"]:,}. Accuracy is the share of '
             'queries whose value is the likeliest of all tokens, at the end of the training, for '
             'the best learning rate of each model. Numbers kept are those that all layers keep of '
             'a whole sequence.')
    names = {r['run']['model'] for r in results}
    setting = [
        f'Models: {s["depth"]} block{"s" if s["depth"] > 1 else ""} of norm and mixer, no MLP, '
        f'embedding and head tied; heads of Mamba-2 have {s["head_dim"]} channels. Attention has '
        'one head and, in place of positions, the short convolution that the other mixers have.'
        + (' RetNet has 4 heads of retention.' if 'retnet' in names else '')
        + (' RWKV has heads of as many channels as Mamba-2, a channel mixing in each block, and a '
           'head that is not tied.' if any('rwkv' in name for name in names) else ''),
        f'Data: {s["examples"]:,} training examples for each number of pairs ({pairs}), in this '
        f'order in every epoch; {"random tokens" if s["filler"] == "random" else "zeros"} between '
        f'the queries; power_a {s["power_a"]:g}.',
        f'Training: {s["epochs"]} epoch{"s" if s["epochs"] > 1 else ""} in batches of '
        f'{s["batch_size"]}, at most {max(r["steps_planned"] for r in results):,} steps; ended '
        f'when the test accuracy is above {s["stop_at"]:g}; AdamW, weight decay '
        f'{s["weight_decay"]:g} on all parameters, a linear warm-up and a cosine.',
        f'Learning rates: {values_of(results, "lr")}; seeds: {values_of(results, "seed")}.']
    setting += [f'{e["device"]}, {s["dtype"]}{", CUDA graphs" if s["cuda_graphs"] else ""}; torch '
                f'{e["torch"]}, vmamba_mm {e["vmamba_mm"]}, Python {e["python"]}.'
                for e in environments(results)]
    setting.append(f'{sum(r["seconds"] for r in results):,.0f} s of training for '
                   f'{len(results)} runs.')
    return f"""\
# Associative recall{", small setting" if s["name"] == "cpu" else ""}

{wrapped(intro)}

{markdown_table(table(summary))}

![Accuracy of each model]({picture})

Measured with this command:

{command_block(command_of(results))}

## What this shows and what it does not

{bullets(findings(results))}
{bullets(LIMITS)}

## Setting

{bullets(setting)}
"""


def write_report(results, path):
    """The Markdown, and the picture under the same name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix('.png')
    draw(results, picture)
    path.write_text(markdown(results, picture.name))
