"""The options that end_to_end.py, dense_steps.py and vim_sizes.py have in common."""

import sys

import pytest
import torch

from vmamba_mm.errors import UserError


@pytest.mark.parametrize(('name', 'wrong_choice'), [
    ('end_to_end', ('--sections', 'none')), ('dense_steps', ('--tasks', 'none')),
    ('vim_sizes', ('--sides', '300'))])
def test_mistakes(load_tool, monkeypatch, tmp_path, name, wrong_choice, mm):
    pytest.importorskip('timm')
    tool = load_tool(f'bench/{name}.py')

    def call(*argv):
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, argv)])
        tool.main()

    for argv, match in ((('--shrink', 0), 'at least 1'),
                        (('--merge', tmp_path / 'none.csv'), 'none.csv'),
                        (('--merge', __file__), 'no CSV file of this tool')):
        with pytest.raises((UserError, FileNotFoundError), match=match):
            call(*argv)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match='finds no GPU'):
            call()
    with pytest.raises(SystemExit):
        call(*wrong_choice)
