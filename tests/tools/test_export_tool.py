"""tools/export.py on a classifier, a detector and a segmentor, and mistakes in one line. Families
are in tests/export."""

import pytest


@pytest.mark.parametrize('task', ['cls', 'det', 'seg'])
def test_written_and_checked(projects, call, task):
    pytest.importorskip('onnxruntime')
    config, checkpoint, _ = projects(task)
    code, out, err = call('export.py', config, checkpoint, '--to', 'onnx', '--dynamic', '--out',
                          'model.onnx')
    assert code == 0, err[-2000:]
    assert out.startswith('model.onnx: onnx, fp32, images of any size')
    assert ' nodes, ' in out and out.count('largest error') >= 3
    assert 'x its speed' in out


def test_mistakes(projects, call):
    config, checkpoint, _ = projects('cls')
    other = projects('seg')[1]
    for message, *argv in (
            ('--to coreml does not exist; choose one of onnx, openvino, pt2', config, checkpoint,
             '--to', 'coreml'),
            ('--size must be at least 1 pixel', config, checkpoint, '--to', 'pt2', '--size', 0, 9),
            ("timm has no model 'vmamba_gigantic'", 'timm::vmamba_gigantic', 'none', '--to',
             'pt2'),
            (str(other), config, other, '--to', 'pt2')):
        code, out, err = call('export.py', *argv)
        lines = [line for line in err.splitlines() if line.startswith('error')]
        assert code == 1 and len(lines) == 1 and message in lines[0], err[-2000:]
        assert 'Traceback' not in out + err
