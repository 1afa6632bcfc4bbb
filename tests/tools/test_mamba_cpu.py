import sys

import pytest
import torch


@pytest.fixture
def tool(load_tool, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['mamba_cpu.py', '--rounds', '1', '--shrink', '64'])
    monkeypatch.setattr(torch, 'set_num_threads', lambda threads: None)  # for other tests too
    return load_tool('bench/mamba_cpu.py')


def test_all_ways_agree_and_are_timed(tool, capsys):
    tool.main()
    out = capsys.readouterr().out
    assert 'relative error' in out
    assert out.count('  mamba_inner  ') == 4 and out.count('loop over positions') == 4


def test_a_wrong_result_ends_the_run(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'LIMIT', 0)
    with pytest.raises(SystemExit, match='nothing was timed'):
        tool.main()
    assert ' ms' not in capsys.readouterr().out
