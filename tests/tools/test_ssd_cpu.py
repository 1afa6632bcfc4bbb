import functools

import pytest
import torch


@pytest.fixture
def run(load_tool, run_tool, monkeypatch):
    """Runs the tool on its first shape, with attributes of it replaced."""
    monkeypatch.setattr(torch, 'set_num_threads', lambda threads: None)  # for other tests too
    shapes = load_tool('bench/ssd_cpu.py').SHAPES[:1]
    return functools.partial(run_tool, 'bench/ssd_cpu.py', '--rounds', '1', '--shrink', '4',
                             SHAPES=shapes)


def test_all_ways_agree_and_are_timed(run, capsys):
    run()
    out = capsys.readouterr().out
    assert 'relative error' in out and out.count(' times ssd)') == 4 and 'listing' in out


def test_a_wrong_result_ends_the_run(run, capsys):
    with pytest.raises(SystemExit, match='nothing was timed'):
        run(LIMIT=0)
    assert ' ms' not in capsys.readouterr().out
