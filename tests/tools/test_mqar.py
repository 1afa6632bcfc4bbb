"""tools/analysis/mqar.py: its generator, its trainings, which can go on, and its report."""

import csv
import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_tools_errors import assert_one_line

from vmamba_mm.errors import UserError

TOOL = 'analysis/mqar.py'
TINY = ['--setting', 'cpu', '--device', 'cpu', '--vocab-size', 32, '--length', 16, '--pairs', 2, 4,
        '--examples', 128, '--test-examples', 16, '--batch-size', 32, '--depth', 1,
        '--models', 'mamba2-n16', '--widths', 16]


@pytest.fixture
def mqar(load_tool):
    """The script, and the modules beside it by the rest of their names."""
    main = load_tool('analysis/mqar.py')
    parts = {part: load_tool(f'analysis/mqar_{part}.py')
             for part in ('data', 'models', 'training', 'report')}
    return SimpleNamespace(main=main, **parts)


@pytest.fixture
def setting(mqar):
    """Of the CPU, made tiny; without the choices of runs."""
    tiny = {key: value for key, value in mqar.models.SETTINGS['cpu'].items()
            if key not in mqar.models.CHOICES}
    return tiny | dict(name='cpu', changed={}, cuda_graphs=False, vocab_size=32, length=16,
                       pairs=[2, 4], examples=128, test_examples=16, batch_size=32, epochs=2)


# --- the generator ----------------------------------------------------------------------------

def test_the_example_of_zoology(mqar):
    """Two pairs in 16 tokens, as the public code's docstring has it."""
    inputs, labels = mqar.data.arrange(np.array([[2, 4]]), np.array([[8, 7]]), np.array([[4, 1]]),
                                       16)
    assert inputs.tolist() == [[2, 8, 4, 7, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0, 0]]
    assert labels.tolist() == [[-100] * 6 + [7] + [-100] * 5 + [8] + [-100] * 3]


def test_the_numbers_of_zoology(mqar):
    """What the public code draws for these arguments (HazyResearch/zoology, commit d88d6f5)."""
    inputs, labels = mqar.data.multiquery_ar(24, 3, 16, 5, num_kv_pairs=2,
                                             random_non_queries=False)
    assert inputs.tolist() == [[6, 23, 9, 21, 9, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0],
                               [3, 12, 7, 17, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 7, 0],
                               [1, 12, 4, 22, 1, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0]]
    asked = {(row, int(place)): int(labels[row, place])
             for row, place in (labels != -100).nonzero().tolist()}
    assert asked == {(0, 4): 21, (0, 12): 23, (1, 6): 12, (1, 14): 17, (2, 4): 12, (2, 10): 22}
    assert mqar.data.segment_seeds(123, 4, 2) == (
        [843828734, 914636141, 1228959102, 1840268610], [3121803228, 2967327842])


@pytest.mark.parametrize('noise', [False, True])
@pytest.mark.parametrize(('vocab', 'length', 'pairs'), [(64, 32, 8), (257, 64, 3), (70, 64, 16)])
def test_properties(mqar, vocab, length, pairs, noise):
    """Pairs first, of keys and values that differ; each key is asked once, behind all pairs."""
    count, half = 1000, vocab // 2
    inputs, labels = mqar.data.multiquery_ar(vocab, count, length, 0, num_kv_pairs=pairs,
                                             random_non_queries=noise)
    assert inputs.shape == labels.shape == (count, length)
    keys, values = inputs[:, 0:2 * pairs:2], inputs[:, 1:2 * pairs:2]
    assert 1 <= keys.min() and keys.max() < half <= values.min() and values.max() < vocab
    assert all(len(set(row)) == pairs for part in (keys, values) for row in part.tolist())
    assert keys.unique().numel() == half - 1 and values.unique().numel() == vocab - half
    asked = labels != -100
    assert (asked.sum(1) == pairs).all() and not asked[:, :2 * pairs].any()
    assert not asked[:, 1::2].any()  # slots are every second place
    positions, answers = mqar.data.find_queries(labels)
    found = inputs.gather(1, positions)
    for *row, asked_keys, given in zip(keys, values, found, answers, strict=True):
        assert dict(zip(*map(torch.Tensor.tolist, row), strict=True)) == dict(
            zip(asked_keys.tolist(), given.tolist(), strict=True))
    rest = inputs[:, 2 * pairs:][~asked[:, 2 * pairs:]]
    if noise:  # of all tokens alike, 0, keys and values included
        assert set(rest.tolist()) == set(range(vocab))
        assert abs(rest.float().mean() - (vocab - 1) / 2) < 0.03 * vocab
    else:
        assert not rest.any()


def test_places_follow_the_power_law(mqar):
    """Of one query, the slots come as often as p says: about 1/i, or all alike."""
    for power in (0.01, 1.0):
        labels = mqar.data.multiquery_ar(64, 4000, 32, 1, power_a=power, num_kv_pairs=1)[1]
        slots = (mqar.data.find_queries(labels)[0][:, 0] - 2) // 2
        share = slots.bincount(minlength=15).numpy() / 4000
        p = mqar.data.gap_probabilities(15, power)
        assert np.abs(share - p).max() < 4 * np.sqrt(p.max() / 4000)
        assert p[0] / p[4] == pytest.approx(5**0.99 if power < 1 else 1)


def test_order_of_places_is_not_sorted(mqar):
    """The j-th key may be asked before the first one."""
    inputs, labels = mqar.data.multiquery_ar(64, 100, 32, 0, num_kv_pairs=4,
                                             random_non_queries=False)
    found = inputs.gather(1, mqar.data.find_queries(labels)[0])
    assert 0.5 < (found[:, 0] != inputs[:, 0]).float().mean() < 0.95


def test_noise_is_of_the_global_generator(mqar):
    """As in the public code, unless another one is given."""
    def draw(generator=None):
        return mqar.data.multiquery_ar(64, 4, 32, 0, generator=generator)[0]

    torch.manual_seed(3)
    first, other = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first) and not torch.equal(first, other)
    assert torch.equal(draw(torch.Generator().manual_seed(3)), first)


@pytest.mark.parametrize(('sizes', 'words'), [
    ((64, 31, 2), 'even'), ((32, 32, 2), 'vocab_size must be above'), ((64, 32, 9), '1 to 8'),
    ((64, 32, 0), '1 to 8')])
def test_sizes_that_do_not_fit(mqar, sizes, words):
    vocab, length, pairs = sizes
    with pytest.raises(ValueError, match=words):
        mqar.data.multiquery_ar(vocab, 2, length, 0, num_kv_pairs=pairs)


def test_segments(mqar, setting, monkeypatch):
    """From few pairs to many, the test of the most; processes draw the same."""
    train, test = mqar.data.make_segments(setting, 123)
    assert [s.pairs for s in train] == [2, 4] and [s.pairs for s in test] == [4]
    assert [len(s.inputs) for s in train + test] == [128, 128, 16]
    assert not torch.equal(train[1].inputs[:16], test[0].inputs)
    for segment in train + test:
        keys = segment.inputs.gather(1, segment.positions)
        at = (segment.inputs[:, None, :2 * segment.pairs:2] == keys[..., None]).int().argmax(-1)
        assert torch.equal(segment.inputs[:, 1::2].gather(1, at), segment.values)
    monkeypatch.setattr(mqar.data, 'MANY', 1)
    for a, b in zip(train + test, sum(mqar.data.make_segments(setting, 123), []), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


# --- trainings --------------------------------------------------------------------------------

def make(mqar, setting, lr=1e-2, seed=0):
    data = mqar.data.make_segments(setting, 123)
    return mqar.training.Training(mqar.training.Run('mamba2-n16', 16, lr, seed), data, setting)


def test_batches(mqar, setting):
    """Whole segments one after the other, the same in every epoch, never mixed."""
    training = make(mqar, setting)
    batches = list(training.batches())
    assert len(batches) == training.steps == 16
    assert [len(positions[0]) for _, positions, _ in batches] == ([2] * 4 + [4] * 4) * 2
    assert torch.equal(batches[3][0], training.train_segments[0].inputs[96:])
    assert torch.equal(batches[12][0], batches[4][0])
    training.step = 13
    assert torch.equal(next(training.batches())[0], batches[13][0])


def test_logits_of_queries_alone(mqar, setting):
    """The head sees the queries and nothing else; its logits are those of the whole."""
    training = make(mqar, setting)
    inputs, positions, _ = next(training.batches())
    with torch.no_grad():
        logits = training.logits(inputs, positions)
        training.positions = torch.arange(16).expand(32, -1)
        whole = training.model(inputs)
    assert logits.shape == (32, 2, 32)
    expected = whole.gather(1, positions[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(logits, expected)


def test_accuracy(mqar, setting):
    """The mean share of right answers."""
    training = make(mqar, setting)
    segment = training.test_segments[0]
    answers = torch.nn.functional.one_hot(segment.values, 32).float()
    answers[:4] = 0  # the likeliest token is 0 then, which is no value
    rows = iter(answers.split(32))
    training.logits = lambda inputs, positions: next(rows)
    assert training.evaluate() == {4: 12 / 16}


def test_going_on_changes_nothing(mqar, setting, tmp_path):
    """Weights and rows after an interruption at any evaluation are those without one."""
    setting['evaluations'] = 4
    whole = make(mqar, setting)
    list(whole.advance())
    first = make(mqar, setting)
    next(first.advance())
    first.save(tmp_path / 'run.pt')
    second = make(mqar, setting, seed=1)  # whatever the weights are
    second.run = first.run
    second.load(tmp_path / 'run.pt')
    assert second.step == 4
    list(second.advance())
    assert all(torch.equal(a, b) for a, b in
               zip(whole.model.parameters(), second.model.parameters(), strict=True))
    without_time = [[{k: v for k, v in row.items() if k != 'seconds'} for row in t.rows]
                    for t in (whole, second)]
    assert without_time[0] == without_time[1]
    assert [row['step'] for row in whole.rows] == [4, 8, 12, 16]


def test_a_file_of_another_setting(mqar, setting, tmp_path):
    make(mqar, setting).save(tmp_path / 'run.pt')
    training = make(mqar, setting | dict(epochs=3))
    with pytest.raises(UserError, match='epochs was 2 there and is 3 here'):
        training.load(tmp_path / 'run.pt')


def test_ends(mqar, setting, tmp_path):
    """When it is solved, or the loss is no number, which is a result and no error."""
    setting['evaluations'] = 4

    def train(**changes):
        said = []
        run = mqar.training.Run('mamba2-n16', 16, changes.pop('lr', 1e-2), 0)
        data = mqar.data.make_segments(setting, 123)
        assert mqar.training.train(run, data, setting | changes, tmp_path, {}, said.append,
                                   lambda: False)
        return json.loads((tmp_path / f'{run.name}.json').read_text()), said

    result, said = train(stop_at=-1.0)
    assert result['steps'] == 4 and result['steps_planned'] == 16 and len(said) == 1
    result, _ = train(lr=1e30)
    assert result['diverged'] and result['rows'][-1]['loss'] is None and result['steps'] < 16
    assert not list(tmp_path.glob('*.pt'))


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', ['tf32', 'bf16'])
def test_graphs_change_nothing(mqar, setting, dtype, tmp_path):
    """Replays of a CUDA graph train as single calls do, and go on from a file as these do."""
    setting |= dict(dtype=dtype, evaluations=4)
    losses = {}
    for graphs in (False, True):
        data = [[s.to('cuda') for s in split] for split in mqar.data.make_segments(setting, 123)]
        run = mqar.training.Run('mamba2-n16', 16, 1e-2, 0)
        first = mqar.training.Training(run, data, setting | dict(cuda_graphs=graphs))
        evaluations = first.advance()
        for _ in range(2):
            next(evaluations)
        first.save(tmp_path / 'run.pt')
        second = mqar.training.Training(run, data, setting | dict(cuda_graphs=graphs))
        second.load(tmp_path / 'run.pt')
        list(second.advance())
        losses[graphs] = [row['loss'] for row in second.rows]
    assert len(losses[True]) == 4 and losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert losses[True][-1] < losses[True][0]


# --- the report -------------------------------------------------------------------------------

FINAL = {('attention', 32): (0.5, 0.6), ('mamba2-n16', 32): (0.2, 0.3),
         ('mamba2-n64', 32): (0.9, 0.95), ('attention', 64): (0.99, 1.0),
         ('mamba2-n16', 64): (0.4, 0.6), ('mamba2-n64', 64): (0.5, 1.0)}


@pytest.fixture
def results(setting, tmp_path):
    """Files of runs with two learning rates, of which 0.01 is the worse, and two seeds."""
    folder = tmp_path / 'run' / 'runs'
    folder.mkdir(parents=True)
    for (model, width), final in FINAL.items():
        for lr in (0.001, 0.01):
            for seed, accuracy in enumerate(final):
                accuracy /= 2 if lr == 0.01 else 1
                run = dict(model=model, d_model=width, lr=lr, seed=seed)
                rows = [dict(run, step=step, pairs=4, accuracy=accuracy * step / 16,
                             loss=2 - step / 16, seconds=1.0 * step) for step in (8, 16)]
                (folder / f'{model}{width}{lr}{seed}.json').write_text(json.dumps(dict(
                    run=run, setting=setting, environment=dict(
                        device='some GPU', torch='2.14', vmamba_mm='0.1', python='3.11'),
                    state=640, parameters=1000, steps=16, steps_planned=16, diverged=False,
                    accuracy=accuracy, seconds=16.0, rows=rows)))
    return folder.parent


def test_report(mqar, call, results, tmp_path):
    """The best learning rate counts, by the mean of the seeds; what is said follows from it."""
    code, out, err = call(TOOL, '--results', results, '--report', tmp_path / 'docs/recall.md')
    assert code == 0, err[-3000:]
    text = (tmp_path / 'docs/recall.md').read_text()
    assert ('| softmax attention | 32 | 1,000 | 640 | 0.001 | 0.550 | 0.500 to 0.600 | 16 | 16 |'
            in text)
    assert '| Mamba-2, N = 64 | 64 | 1,000 | 640 | 0.001 | 0.750 | 0.500 to 1.000 |' in text
    flat = ' '.join(text.split())
    assert 'softmax attention: 0.550 (d_model 32), 0.995 (d_model 64); above 0.9 from' in flat
    assert 'Mamba-2, N = 64 is above Mamba-2, N = 16 for every seed at d_model 32.' in flat
    assert 'Chance is 1/16 = 0.0625' in flat and '1/4 = 0.250' in flat
    assert 'some GPU, fp32; torch 2.14' in flat and '384 s of training for 24 runs' in flat
    assert 'One seed' not in flat and str(tmp_path) not in text
    assert all(len(line) <= 100 or line[0] == '|' for line in text.splitlines())
    for picture in (results / 'mqar.png', tmp_path / 'docs/recall.png'):
        with Image.open(picture) as image:
            assert image.width > 1000
    with open(results / 'mqar.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * len(FINAL) and rows[1]['accuracy'] == '0.5'
    assert '0.550' in out and 'mqar.csv' in out


def test_results_of_two_settings(mqar, results):
    path = next((results / 'runs').glob('*.json'))
    content = json.loads(path.read_text())
    content['setting']['epochs'] = 7
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match='different settings'):
        mqar.report.read(results)


def test_command(mqar, results):
    """Of the runs that are there, and of what was changed in the setting."""
    found = mqar.report.read(results)
    found[0]['setting'] |= dict(changed=dict(pairs=[2, 4], head_dim=8))
    assert mqar.report.command_of(found) == (
        'python tools/analysis/mqar.py --setting cpu --models attention mamba2-n16 mamba2-n64 '
        '--widths 32 64 --lrs 0.001 0.01 --seeds 0 1 --pairs 2 4 --head-dim 8')


# --- runs -------------------------------------------------------------------------------------

def test_more_states_recall_more(call, tmp_path):
    """The small setting itself: Mamba-2 with N = 64 looks up what N = 16 cannot hold."""
    code, out, err = call(TOOL, '--setting', 'cpu', '--device', 'cpu', '--lrs', 1e-2, '--out',
                          tmp_path / 'out')
    assert code == 0, err[-3000:]
    found = {s['model']: s['mean'] for s in json.loads(
        (tmp_path / 'out/mqar.json').read_text())['summary']}
    assert found['mamba2-n64'] > 0.95 and found['mamba2-n64'] > found['mamba2-n16'] + 0.05
    assert (tmp_path / 'out/mqar.png').is_file()


def test_interruptions_change_nothing(start, call, tmp_path):
    """Ended by --minutes in a run, then killed, a study ends with the numbers of a whole one."""
    rates = 1e-2, 5e-3, 3e-3, 1e-3
    argv = [*TINY, '--epochs', 5, '--evaluations', 10, '--lrs', *rates, '--out']
    code, _, err = call(TOOL, *argv, tmp_path / 'whole')
    assert code == 0, err[-3000:]

    code, out, err = call(TOOL, *argv, tmp_path / 'pieces', '--minutes', 1e-4)
    assert code == 0, err[-3000:]
    assert '0 of 4 runs are finished, at most' in out and 'the same command goes on' in out
    runs = tmp_path / 'pieces/runs'
    assert [path.suffix for path in runs.iterdir()] == ['.pt']
    assert not list((tmp_path / 'pieces').glob('*.csv'))

    running = start(TOOL, *argv, tmp_path / 'pieces')
    first = runs / 'mamba2-n16_d16_lr0.01_seed0.json'
    running.wait_for(first.exists)
    running.process.kill()
    running.process.join()
    assert running.process.exitcode == -signal.SIGKILL
    written = {path: path.stat().st_mtime_ns for path in runs.glob('*.json')}
    assert len(written) < 4  # or nothing was interrupted

    code, out, err = call(TOOL, *argv, tmp_path / 'pieces')
    assert code == 0, err[-3000:]
    done = len(written)
    assert f'{done} of 4 runs are finished' in out and f'[{done} of 4 done]' in out
    assert 'lr 0.01,' not in out
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert len(list(runs.glob('*.json'))) == 4
    rows = []
    for folder in ('whole', 'pieces'):
        with open(tmp_path / folder / 'mqar.csv', newline='') as file:
            rows.append([{**row, 'seconds': ''} for row in csv.DictReader(file)])
    assert rows[0] == rows[1] and len(rows[0]) == 4 * 10


def test_plan(call, tmp_path):
    """Costs of the large setting, on any machine; nothing is trained."""
    code, out, err = call(TOOL, '--setting', 'gpu', '--plan', '--models', 'mamba-n16', '--out',
                          tmp_path / 'out')
    assert code == 0, err[-3000:]
    assert '8 runs, at most' in out and '4,480' in out and not (tmp_path / 'out').exists()


def test_cost(mqar, setting):
    """FLOPs of a step are those of forward and backward, with a head at the queries alone."""
    cost = mqar.models.cost_of('mamba-n16', 16, setting)
    model = mqar.models.build_model('mamba-n16', 16, setting)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.state == 32 * (16 + 3)  # the scan's state, and the convolution's last inputs
    wider = mqar.models.cost_of('mamba-n16', 16, setting | dict(vocab_size=64))
    assert wider.flops - cost.flops == 3 * 32 * 3 * 16 * 32  # B, mean K, C, tokens


def test_time_left(mqar, setting):
    """Guessed, then measured; of what was not measured, by FLOPs from the nearest."""
    costs = {('mamba-n16', 16): mqar.models.Cost(1, 1, 100), ('mamba-n16', 32):
             mqar.models.Cost(1, 1, 300)}
    runs = [mqar.training.Run('mamba-n16', width, 1e-3, 0) for width in (16, 32)]
    clock = mqar.models.Clock(costs, 'cpu')
    assert clock.step_seconds(runs[0]) == pytest.approx(5e-3, rel=1e-3)
    progress = mqar.main.Progress(runs, set(), 10, clock)
    clock.measure(runs[0], 4.0, 2)
    assert clock.step_seconds(runs[1]) == 6.0 and progress.seconds_left() == 10 * (2.0 + 6.0)


def test_mistakes(call, tmp_path):
    def fails(*argv, words):
        assert_one_line(call(TOOL, *argv), *words)

    fails(*TINY, '--length', 15, words=['--length', 'even', '15'])
    fails(*TINY, '--pairs', 5, words=['--pairs', '5 pairs', '--length 16'])
    fails(*TINY, '--examples', 31, words=['--examples 31', '--batch-size'])
    fails(*TINY, '--epochs', 0, words=['--epochs', 'above 0'])
    fails(*TINY, '--cuda-graphs', words=['--cuda-graphs', 'GPU'])
    fails(*TINY, '--dtype', 'tf32', words=['tf32', 'GPU'])
    fails('--results', tmp_path, words=['no finished run', '--results'])
    fails('--results', tmp_path, '--report', tmp_path / 'a.txt', words=['--report', '.md'])
