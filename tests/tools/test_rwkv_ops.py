import functools

import pytest


@pytest.fixture
def run(run_tool):
    return functools.partial(run_tool, 'bench/rwkv_ops.py', '--device', 'cpu', '--shrink', '16')


def test_all_ways_agree_and_are_timed(run, capsys):
    run()
    out = capsys.readouterr().out
    assert out.count('relative error') == 2 and out.count(' with backward ') == 4
    assert 'wkv7, batch 1, T 64, heads 12, N 4' in out and 'reference' in out


def test_a_wrong_result_ends_the_run(run, capsys):
    with pytest.raises(SystemExit, match='nothing more is timed'):
        run(LIMITS=dict(fp32=0))
    assert ' ms' not in capsys.readouterr().out
