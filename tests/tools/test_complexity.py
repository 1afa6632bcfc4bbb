"""tools/analysis/complexity.py: its fits, its report, and runs of it."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from running import TOOLS
from test_tools_errors import assert_one_line

TOOL = 'analysis/complexity.py'
SMALL = ['--device', 'cpu', '--embed-dims', 32, '--depth', 1, '--vocab-size', 16, '--repeats', 2]


@pytest.fixture
def report(load_tool):
    return load_tool('analysis/complexity_report.py')


# --- exponents --------------------------------------------------------------------------------

@pytest.mark.parametrize('power', [0, 1, 2])
def test_exponent_of_a_known_growth(report, power):
    """Of the upper half alone: what the lower one does changes nothing."""
    lengths = [1, 2, 4, 8, 16, 32]
    exponent, error, upper = report.fit_exponent(
        lengths, [99, 98, 97, *(5 * x**power for x in lengths[3:])])
    assert exponent == pytest.approx(power) and error < 1e-9 and upper == [8, 16, 32]


def test_error_of_an_exponent(report):
    """That of a least-squares line, as scipy has it; repeats count as points."""
    scipy = pytest.importorskip('scipy.stats')
    lengths, values = [2, 4, 8, 2, 4, 8, 1], [2.1, 4.3, 7.5, 1.8, 4.1, 8.8, 50]
    exponent, error, upper = report.fit_exponent(lengths, values)
    assert upper == [4, 8]
    x, y = torch.tensor([[4, 8, 4, 8], [4.3, 7.5, 4.1, 8.8]]).log().double().numpy()
    line = scipy.linregress(x, y)
    assert exponent == pytest.approx(line.slope, rel=1e-5)
    assert error == pytest.approx(line.stderr, rel=1e-4)


def test_what_has_no_exponent(report):
    assert report.fit_exponent([8], [1.0]) is None
    assert report.fit_exponent([8, 16], [1.0, 0.0]) is None
    assert report.fit_exponent([8, 16], [1.0, 2.0]) == (pytest.approx(1), None, [8, 16])


# --- mixers -----------------------------------------------------------------------------------

def test_state_of_known_size(load_tool):
    """The scan's state and the convolution's last inputs, however many tokens came before."""
    mixers = load_tool('analysis/mixers.py')
    settings = dict(vocab_size=16, embed_dims=8, depth=2)
    for length in (1, 5, 1025):
        assert mixers.state_numbers('mamba', length, **settings) == 2 * 16 * (16 + 3)
        assert mixers.state_numbers('attention', length, **settings) == 2 * (
            2 * 8 * length + 3 * 24 + 1)  # keys and values, the convolution's inputs, the count
    model = mixers.build('mamba', **settings)
    state = mixers.state_after(model, 5, batch=3)
    assert sum(t.numel() for t in mixers.tensors_of(state)) == 3 * 2 * 16 * (16 + 3)


def test_state_in_pieces(load_tool, monkeypatch):
    """Pieces of the prompt leave the state of the whole."""
    mixers = load_tool('analysis/mixers.py')
    states = []
    for piece in (3, 100):
        monkeypatch.setattr(mixers, 'PIECE', piece)
        torch.manual_seed(0)
        model = mixers.build('mamba', vocab_size=16, embed_dims=8, depth=1)
        states.append(mixers.tensors_of(mixers.state_after(model, 10)))
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


def test_flops_of_products(load_tool):
    """Those of attention grow with the square of the length, those of the others with it."""
    mixers = load_tool('analysis/mixers.py')
    settings = dict(vocab_size=16, embed_dims=64, depth=2)
    for name, mixer in mixers.MIXERS.items():
        first, second, third = (mixers.count_flops(name, n, **settings)
                                for n in (1024, 2048, 4096))
        assert (third - second) / (second - first) == pytest.approx(2**mixer.training, rel=0.1)


# --- runs -------------------------------------------------------------------------------------

ROWS = [('attention', 2, 1), ('mamba', 1, 0)]  # mixer, powers of training and of a token


@pytest.fixture
def results(report, tmp_path):
    """Files of a made-up run with exact powers."""
    rows = [dict(mixer=mixer, length=length, repeat=repeat, train_ms=2.0 * length**train,
                 train_mib=1.0 * length, token_ms=0.5 * length**token,
                 state_bytes=1024 * length**token, token_mib=None, problem='')
            for mixer, train, token in ROWS for length in (64, 128, 256, 512)
            for repeat in range(2)]
    rows.append(dict(report.EMPTY, mixer='attention', length=1024,
                     problem='the GPU memory is used up at length 1024'))
    setting = dict(command='python tools/analysis/complexity.py --lengths 64 128', dtype='bf16',
                   embed_dims=16, depth=2, vocab_size=16, batch_size=1, repeats=2,
                   device='some GPU', torch='2.14', vmamba_mm='0.1', python='3.11')
    folder = tmp_path / 'run'
    folder.mkdir()
    report.write(rows, setting, folder)
    return folder


def test_report(call, results, tmp_path):
    code, out, err = call(TOOL, '--results', results, '--report', tmp_path / 'docs/growth.md')
    assert code == 0, err[-3000:]
    text = (tmp_path / 'docs/growth.md').read_text()
    assert ('| softmax attention | 2.00 ± 0.00 | 2 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1.00 ± 0.00 | 1 |'
            in text)
    assert '| Mamba | 1.00 ± 0.00 | 1 | 1.00 ± 0.00 | 0.00 ± 0.00 | 0.00 ± 0.00 | 0 |' in text
    assert '| Mamba | 512 | 1,024 | 512 | 0.5 | 1 |' in text
    flat = ' '.join(text.split())
    assert 'at 64 to 1,024 tokens' in flat and 'over 256 to 512 tokens' in flat
    assert 'some GPU, bf16 autocast; torch 2.14' in flat
    assert 'softmax attention: the GPU memory is used up at length 1024.' in flat
    assert all(len(line) <= 100 or line[0] == '|' for line in text.splitlines())
    assert str(tmp_path) not in text and 'memory is used up' in out
    with Image.open(tmp_path / 'docs/growth.png') as picture:
        assert picture.width > 1000


def test_end_to_end(load_tool, call, tmp_path):
    """All mixers of the list, each measured at each length."""
    mixers = load_tool('analysis/mixers.py').MIXERS
    code, out, err = call(TOOL, *SMALL, '--lengths', 16, 32, 64, '--out', tmp_path / 'out')
    assert code == 0, err[-3000:]
    with open(tmp_path / 'out/complexity.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(r['mixer'], r['length'], r['repeat']) for r in rows] == [
        (m, n, r) for m in mixers for n in ('16', '32', '64') for r in '01']
    assert all(float(r['train_ms']) > 0 and float(r['token_ms']) > 0 for r in rows)
    found = json.loads((tmp_path / 'out/complexity.json').read_text())
    assert str(tmp_path) not in found['setting']['command']
    for name, mixer in mixers.items():
        exponent, error, upper = found['exponents'][name]['state_bytes']
        if mixer.token == 0:
            assert exponent == pytest.approx(0, abs=1e-9) and error < 1e-9
        else:  # but for what the convolution keeps
            assert 0.7 < exponent <= 1
        assert upper == [32, 64]
    assert (tmp_path / 'out/complexity.png').is_file() and f'[{3 * len(mixers)} of' in out


@pytest.mark.gpu
def test_memory_of_a_token(tmp_path):
    """What PyTorch allocates for one more token holds at least the state."""
    argv = *SMALL, '--device', 'cuda', '--dtype', 'bf16', '--lengths', 256, 1024, '--out', 'out'
    # A process of its own, since one that is forked after torch asked for GPUs cannot use them.
    ran = subprocess.run([sys.executable, TOOLS / TOOL, *map(str, argv)], cwd=tmp_path,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    with open(tmp_path / 'out/complexity.csv', newline='') as file:
        for row in csv.DictReader(file):
            assert float(row['token_mib']) * 2**20 >= int(row['state_bytes']) > 0
            assert float(row['train_mib']) > 0


def test_slow_mixers_stop(call, tmp_path):
    code, out, err = call(TOOL, *SMALL, '--mixers', 'mamba', '--lengths', 16, 32, 64, '--out',
                          tmp_path / 'out', '--max-seconds', 1e-9)
    assert code == 0, err[-3000:]
    assert 'a step at length 16 takes over' in out
    with open(tmp_path / 'out/complexity.csv', newline='') as file:
        assert [bool(row['train_ms']) for row in csv.DictReader(file)] == [True, True, False, False]


def test_mistakes(call, tmp_path):
    def fails(*argv, words):
        assert_one_line(call(TOOL, *argv), *words)

    fails(*SMALL, '--lengths', 0, words=['--lengths', 'above 0'])
    fails(*SMALL, '--repeats', 0, words=['--repeats', 'above 0'])
    fails('--results', tmp_path, words=['complexity.csv', '--results'])
    fails('--results', tmp_path, '--report', tmp_path / 'a.txt', words=['--report', '.md'])
