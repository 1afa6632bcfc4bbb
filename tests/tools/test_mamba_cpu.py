import functools
import sys

import pytest
import torch


@pytest.fixture
def run(load_tool, run_tool, monkeypatch):
    """Runs the tool with further arguments, and attributes of it replaced."""
    monkeypatch.setattr(torch, 'set_num_threads', lambda threads: None)  # for other tests too
    shapes = load_tool('bench/mamba_cpu.py').SHAPES[-2:]
    return functools.partial(run_tool, 'bench/mamba_cpu.py', '--rounds', '1', '--shrink', '64',
                             SHAPES=shapes)


def test_all_ways_agree_and_are_timed(run, capsys):
    measured = []  # each would be a process
    run(peak_mib=lambda index, args, way: measured.append((index, way)) or 7.0)
    out = capsys.readouterr().out
    assert 'relative error' in out and out.count(' 7 MiB') == len(measured) == 6
    assert out.count('loop over positions') == 2 and (1, 'mamba_inner') in measured


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_of_one_way(run, capsys):
    run('--memory-of', '1', 'mamba_inner')
    assert float(capsys.readouterr().out) >= 0


def test_a_wrong_result_ends_the_run(run, capsys):
    with pytest.raises(SystemExit, match='nothing was timed'):
        run(LIMIT=0)
    assert ' ms' not in capsys.readouterr().out
