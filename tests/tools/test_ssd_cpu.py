import sys

import pytest
import torch


@pytest.fixture
def run(load_tool, monkeypatch):
    """Runs the tool on its first shape, with attributes of it replaced."""
    monkeypatch.setattr(torch, 'set_num_threads', lambda threads: None)  # for other tests too
    tool = load_tool('bench/ssd_cpu.py')
    monkeypatch.setattr(tool, 'SHAPES', tool.SHAPES[:1])
    monkeypatch.setattr(sys, 'argv', ['ssd_cpu.py', '--rounds', '1', '--shrink', '4'])

    def run(**attributes):
        for name, value in attributes.items():
            monkeypatch.setattr(tool, name, value)
        tool.main()

    return run


def test_all_ways_agree_and_are_timed(run, capsys):
    run()
    out = capsys.readouterr().out
    assert 'relative error' in out and out.count(' times ssd)') == 4 and 'listing' in out


def test_a_wrong_result_ends_the_run(run, capsys):
    with pytest.raises(SystemExit, match='nothing was timed'):
        run(LIMIT=0)
    assert ' ms' not in capsys.readouterr().out
