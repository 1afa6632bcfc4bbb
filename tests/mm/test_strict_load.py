"""What the message of a checkpoint that does not fit recommends."""

import re
import shlex

import pytest

from vmamba_mm.errors import UserError
from vmamba_mm.mm.hooks.strict_load import check_patterns, how_to_allow, patterns_of


@pytest.mark.parametrize(('names', 'patterns'), [
    (['head.fc.weight', 'head.fc.bias'], [r'^head\.fc\b']),
    (['decode_head.conv_seg.weight', 'auxiliary_head.conv_seg.bias'],
     [r'^decode_head\.conv_seg\b', r'^auxiliary_head\.conv_seg\b']),
    ([f'roi_head.bbox_head.{i}.fc_cls.weight' for i in range(6)], [r'^roi_head\.bbox_head\b']),
    (['backbone.stages.3.blocks.1.norm1.weight'], [r'^backbone\.stages\.3\.blocks\.1\.norm1\b']),
    (['weight'], [r'^weight\b'])], ids=str)
def test_patterns_are_narrow(names, patterns):
    assert patterns_of(names) == patterns
    assert all(any(re.search(p, name) for p in patterns) for name in names)
    others = ['header.fc.weight', 'head2.fc.weight', 'backbone.stages.3.blocks.10.norm1.weight',
              'backbone.stages.0.blocks.0.norm1.weight', 'weights']
    assert not any(re.search(p, name) for p in patterns for name in others)


def test_the_line_can_be_copied():
    names = ['decode_head.conv_seg.weight', 'auxiliary_head.conv_seg.bias']
    line = how_to_allow(names)
    option = line[line.index('--allow'):line.index(' (or')]
    assert shlex.split(option)[1:] == patterns_of(names)
    settings = {}
    exec(line[line.index('allow_mismatch ='):].rstrip(')'), settings)
    assert settings['allow_mismatch'] == patterns_of(names)
    assert how_to_allow([f'layer{i}.weight' for i in range(9)]) == ''


def test_patterns_are_checked():
    assert check_patterns('^head', 'x') == ['^head'] and check_patterns((), 'x') == []
    for wrong in ('^head(', ['*'], [3], 4):
        with pytest.raises(UserError, match='allow_mismatch: .* is no regular expression'):
            check_patterns(wrong, 'allow_mismatch')
