"""A mistake in the input ends with one clear line on stderr and an exit code that is not 0."""

import json
import shlex
import shutil

import pytest
import tiny
from PIL import Image

from vmamba_mm.checkpoints.files import read_checkpoint


@pytest.fixture
def cls(tmp_path):
    """A config of a classification on its own copy of the data."""
    tiny.make_cls(tmp_path / 'data', per_class=3)
    path = tmp_path / 'config.py'
    path.write_text(tiny.cls_config(tmp_path / 'data', epochs=3))
    return path


@pytest.fixture
def checkpoint(projects):
    """A checkpoint of the classification model."""
    return projects('cls')[1]


def assert_one_line(result, *words):
    code, out, err = result
    lines = [line for line in err.splitlines() if line.startswith('error')]
    assert code not in (0, None), out[-1000:]
    assert len(lines) == 1, err[-3000:]
    assert 'Traceback' not in out + err, err[-3000:]
    for word in words:
        assert str(word) in lines[0]
    return lines[0]


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'predict.py'])
def test_config_does_not_exist(tool, cls, call):
    more = {'train.py': [], 'test.py': ['c.pth'], 'predict.py': ['c.pth', 'i.jpg']}[tool]
    wrong = cls.with_name('confg.py')
    assert_one_line(call(tool, wrong, *more), wrong, 'does not exist', 'config.py')


def test_config_with_an_error(cls, call):
    cls.write_text('a = undefined_name\n')
    assert_one_line(call('train.py', cls), cls, 'undefined_name')


def test_base_that_does_not_exist(cls, call):
    cls.write_text("_base_ = ['mmpretrain::_base_/nothing.py']\n")
    assert_one_line(call('train.py', cls), cls, 'nothing.py')


@pytest.mark.parametrize('tool', ['train.py', 'test.py'])
def test_dataset_missing(tool, cls, call, checkpoint, tmp_path):
    shutil.rmtree(tmp_path / 'data')
    more = [checkpoint] if tool == 'test.py' else []
    assert_one_line(call(tool, cls, *more), tmp_path / 'data', 'does not exist',
                    'dataloader.dataset.data_root')


def test_folder_of_the_dataset_missing(cls, call, tmp_path):
    shutil.rmtree(tmp_path / 'data' / 'val')
    assert_one_line(call('train.py', cls), tmp_path / 'data' / 'val', 'does not exist')


def test_dataset_empty(call, tmp_path):
    tiny.make_seg(tmp_path / 'data')
    for image in (tmp_path / 'data' / 'images' / 'training').iterdir():
        image.unlink()
    config = tmp_path / 'config.py'
    config.write_text(tiny.seg_config(tmp_path / 'data'))
    assert_one_line(call('train.py', config), 'images/training', 'no files')


def test_empty_class_folder(cls, call, tmp_path):
    (tmp_path / 'data' / 'train' / 'green').mkdir()
    assert_one_line(call('train.py', cls), 'green', tmp_path / 'data' / 'train')


@pytest.mark.parametrize('workers', [0, 1])
def test_corrupt_image(workers, cls, call, tmp_path):
    bad = tmp_path / 'data' / 'train' / 'red' / '1.png'
    bad.write_bytes(b'not an image')
    assert_one_line(call('train.py', cls, '--cfg-options',
                         f'train_dataloader.num_workers={workers}'), bad, 'corrupt')


def test_corrupt_image_when_testing(cls, call, checkpoint, tmp_path):
    bad = tmp_path / 'data' / 'val' / 'red' / '1.png'
    bad.write_bytes(b'')
    assert_one_line(call('test.py', cls, checkpoint), bad, 'corrupt')


def test_corrupt_image_when_predicting(cls, call, checkpoint, tmp_path):
    bad = tmp_path / 'bad.jpg'
    bad.write_bytes(b'not an image')
    assert_one_line(call('predict.py', cls, checkpoint, bad), bad, 'corrupt')
    assert_one_line(call('predict.py', cls, checkpoint, tmp_path / 'no.jpg'), 'no.jpg', 'exist')


def test_checkpoint_of_another_model(cls, call, checkpoint):
    other = 'model.backbone.arch.embed_dims=16', 'model.head.in_channels=128'
    line = assert_one_line(call('test.py', cls, checkpoint, '--cfg-options', *other), checkpoint,
                           'is (4,), in the model (8,)', 'backbone.', "'embed_dims': 8")
    assert 'StrictLoadHook' not in line
    # One block more: its parameters are missing from the file.
    deeper = 'model.backbone.arch.depths=(1,1,1,2)'
    image = cls.parent / 'data' / 'val' / 'red' / '0.png'
    assert_one_line(call('predict.py', cls, checkpoint, image, '--cfg-options', deeper),
                    'missing', 'backbone.stages.3.blocks.1')
    assert_one_line(call('train.py', cls, '--cfg-options', f'load_from={checkpoint}', deeper),
                    'missing', checkpoint, 'StrictLoadHook')


def test_start_from_a_part_as_the_message_says(cls, call, tmp_path):
    """The option is copied from the line; the config's own hooks stay; a trainer's checkpoint."""
    work = tmp_path / 'w'
    assert call('train.py', cls, '--work-dir', work)[0] == 0
    start = f'load_from={work / "epoch_3.pth"}'
    cls.write_text(cls.read_text().replace('num_classes=2', 'num_classes=3'))
    line = assert_one_line(call('train.py', cls, '--cfg-options', start), 'head.fc.weight')
    option = shlex.split(line[line.index('--allow-mismatch'):line.index(' (or, in the config')])
    assert option == ['--allow-mismatch', r'^head\.fc\b']
    code, out, err = call('train.py', cls, '--work-dir', tmp_path / 'w2', '--cfg-options', start,
                          *option)
    assert code == 0, err
    assert 'Not loaded, as StrictLoadHook.allow says: head.fc.bias, head.fc.weight' in out
    assert "type='EMAHook'" in (tmp_path / 'w2' / 'config.py').read_text()
    assert 'ema_state_dict' in read_checkpoint(tmp_path / 'w2' / 'epoch_3.pth')

    key = line[line.index('allow_mismatch ='):].rstrip(')')
    cls.write_text(f'{cls.read_text()}\n{key}\n')
    code, out, err = call('train.py', cls, '--cfg-options', start, 'train_cfg.max_epochs=3')
    assert code == 0, err
    assert 'head.fc.bias, head.fc.weight' in out
    assert_one_line(call('test.py', cls, work / 'epoch_3.pth'), 'head.fc.weight')


def test_wrong_use_of_allow_mismatch(cls, call, checkpoint):
    assert_one_line(call('train.py', cls, '--allow-mismatch', '^head'), 'load_from=FILE')
    assert_one_line(call('train.py', cls, '--cfg-options', f'load_from={checkpoint}',
                         '--allow-mismatch', '^head('), "'^head('", 'regular expression')


def test_part_of_a_checkpoint_to_start_from(cls, call, checkpoint):
    """Fine-tuning: the head may differ if the config says so."""
    cls.write_text(cls.read_text().replace('num_classes=2', 'num_classes=3') + """
custom_hooks = [dict(type='vmamba_mm.StrictLoadHook', allow=['^head'])]
""")
    code, out, err = call('train.py', cls, '--cfg-options', f'load_from={checkpoint}')
    assert code == 0, err
    assert 'Not loaded, as StrictLoadHook.allow says: head.fc.bias, head.fc.weight' in out


def test_broken_checkpoints(cls, call, checkpoint, tmp_path):
    half = tmp_path / 'half.pth'
    half.write_bytes(checkpoint.read_bytes()[:5000])
    assert_one_line(call('test.py', cls, half), half, 'cannot be read')
    assert_one_line(call('test.py', cls, tmp_path / 'no.pth'), 'no.pth', 'does not exist')
    assert_one_line(call('train.py', cls, '--resume', checkpoint), checkpoint, 'weights only')


def test_unknown_type(cls, call):
    line = assert_one_line(call('train.py', cls, '--cfg-options', 'model.head.type=LinearClsHed'),
                           'LinearClsHed', 'did you mean')
    assert 'LinearClsHead' in line
    assert_one_line(call('train.py', cls, '--cfg-options',
                         'model.backbone.type=vmamba_mm.VMambo'), 'VMambo', 'VMamba')


def test_setting_left_over_from_another_backbone(cls, call):
    assert_one_line(call('train.py', cls, '--cfg-options', 'model.backbone.window_size=7'),
                    'window_size')


def test_images_of_other_channels_than_the_model(cls, call):
    assert_one_line(call('train.py', cls, '--cfg-options', 'model.backbone.in_channels=4'),
                    'images have 3 channels', 'model takes 4', 'in_channels')


def test_amp_without_gpu(cls, call):
    assert_one_line(call('train.py', cls, '--amp', env={'CUDA_VISIBLE_DEVICES': ''}), '--amp',
                    'GPU')


def test_launcher_without_processes(cls, call):
    assert_one_line(call('train.py', cls, '--launcher', 'pytorch'), 'dist_train.sh')


def test_options(cls, call):
    assert_one_line(call('train.py', cls, '--cfg-options', 'nothing'), 'KEY=VALUE')


def test_traceback_on_request(cls, call):
    code, _, err = call('train.py', cls, '--traceback', '--cfg-options', 'nothing')
    assert code == 1
    assert 'Traceback' in err and 'error: ' in err


def test_run_shorter_than_its_warm_up(cls, call):
    assert_one_line(call('train.py', cls, '--cfg-options', 'train_cfg.max_epochs=1'),
                    'param_scheduler')


def test_mask_of_another_size(call, tmp_path):
    """Today's runs ended well, having learnt from shifted labels."""
    tiny.make_seg(tmp_path / 'data', count=3)
    bad = tmp_path / 'data/annotations/training/2.png'
    Image.open(bad).resize((16, 16), 0).save(bad)
    config = tmp_path / 'config.py'
    config.write_text(tiny.seg_config(tmp_path / 'data', workers=1))
    assert_one_line(call('train.py', config), bad, '16 x 16', '32 x 32')


@pytest.mark.parametrize(('change', 'words'), [
    (lambda c: [a.pop('segmentation') for a in c['annotations']], ['no segmentation for']),
    (lambda c: c['categories'][0].update(name='bin'), ['1 category (bin)', 'lacks box'])],
    ids=['no masks', 'another name'])
def test_coco_files_that_do_not_fit(change, words, call, tmp_path):
    tiny.make_det(tmp_path / 'data')
    file = tmp_path / 'data' / 'train.json'
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    config = tmp_path / 'config.py'
    config.write_text(tiny.det_config(tmp_path / 'data'))
    assert_one_line(call('train.py', config), file, *words)


def test_settings_of_the_optimizer(cls, call):
    assert_one_line(call('train.py', cls, '--cfg-options', 'optim_wrapper.optimizer.type=AdamX'),
                    cls, 'AdamX', 'did you mean Adam')
    assert_one_line(call('train.py', cls, '--cfg-options', 'optim_wrapper.optimizer.betas=(2,2)'),
                    'optim_wrapper.optimizer', 'beta')
    assert_one_line(call('train.py', cls, '--cfg-options', 'param_scheduler.0.type=NoLR'),
                    'NoLR', 'did you mean')


def test_average_that_never_begins(cls, call):
    assert_one_line(call('train.py', cls, '--cfg-options', 'custom_hooks.0.begin_epoch=9'),
                    'EMAHook', 'begin_epoch: 9')
