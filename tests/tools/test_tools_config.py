"""How the mm change a config before a Runner sees it."""

import pytest
import tiny

from vmamba_mm.errors import UserError
from vmamba_mm.mm import cli
from vmamba_mm.mm.cli.options import parse_options


@pytest.fixture
def train(mm, load_tool):
    return load_tool('train.py')


@pytest.fixture
def gpu(monkeypatch, mm):
    """gpu(True) or gpu(False): whether mmengine finds one."""
    return lambda present: monkeypatch.setattr(
        'mmengine.device.get_device', lambda: 'cuda' if present else 'cpu')


def config(**kwargs):
    from mmengine.config import Config
    return Config(kwargs)


def amp_config(kind):
    return config(optim_wrapper=dict(type=kind, optimizer=dict(type='SGD')))


def test_amp(train, gpu, capsys):
    gpu(True)
    cfg = amp_config('OptimWrapper')
    train.set_amp(cfg, wants_amp=True)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    gpu(False)
    train.set_amp(cfg, wants_amp=False)
    assert cfg.optim_wrapper.type == 'OptimWrapper' and 'loss_scale' not in cfg.optim_wrapper
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(UserError, match='--amp needs a GPU'):
        train.set_amp(cfg, wants_amp=True)


def test_evaluation_on_a_cpu_is_fp32(mm, gpu, capsys):
    cfg = config(val_cfg=dict(fp16=True), test_cfg=dict(fp16=True))
    gpu(True)
    cli.evaluate_in_fp32_without_gpu(cfg)
    assert cfg.val_cfg.fp16 and cfg.test_cfg.fp16 and not capsys.readouterr().out
    gpu(False)
    cli.evaluate_in_fp32_without_gpu(cfg)
    assert not cfg.val_cfg.fp16 and not cfg.test_cfg.fp16
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_sync_bn(mm):
    model = dict(a=dict(norm_cfg=dict(type='SyncBN')), b=[dict(norm=dict(type='LN'))],
                 c=({'type': 'MMSyncBN'},))
    cli.sync_to_plain_batch_norm(model)
    assert model == dict(a=dict(norm_cfg=dict(type='BN')), b=[dict(norm=dict(type='LN'))],
                         c=({'type': 'BN'},))


def test_hooks_keep_the_users_settings(train):
    cfg = config(custom_hooks=[dict(type='EMAHook'), dict(type='vmamba_mm.StrictLoadHook',
                                                          allow=['^head'])],
                 default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=7)))
    train.set_hooks(cfg)
    train.set_hooks(cfg)
    types = [hook['type'] for hook in cfg.custom_hooks]
    assert len(types) == len(set(types)) and types[0] == 'EMAHook'
    assert cfg.custom_hooks[1]['allow'] == ['^head']
    assert cfg.default_hooks.checkpoint == dict(type='vmamba_mm.AtomicCheckpointHook', interval=7)


def test_visualizer_keeps_the_users_backends(train):
    cfg = config(visualizer=dict(type='X', vis_backends=[dict(type='LocalVisBackend', a=1)]))
    train.set_visualizer(cfg)
    assert cfg.visualizer.vis_backends[0] == dict(type='LocalVisBackend', a=1)
    assert [b['type'] for b in cfg.visualizer.vis_backends] == ['LocalVisBackend',
                                                                'TensorboardVisBackend']


def test_data_paths(mm, tmp_path):
    tiny.make_det(tmp_path)

    def check(**dataset):
        wrapped = dict(type='RepeatDataset', dataset=dict(type='CocoDataset', **dataset))
        cli.check_data_paths(config(train_dataloader=dict(dataset=wrapped)), 'train_dataloader',
                             'val_dataloader')

    good = dict(data_root=str(tmp_path), ann_file='train.json', data_prefix=dict(img='images'))
    check(**good)
    check(data_root='s3://bucket/', ann_file='train.json')
    for key, value in (('ann_file', 'no.json'), ('data_prefix', dict(img='photos')),
                       ('data_root', str(tmp_path / 'no'))):
        with pytest.raises(UserError, match=rf'train_dataloader.dataset.dataset.{key}'):
            check(**{**good, key: value})


def test_too_many_processes_for_the_gpus(mm, gpu, monkeypatch):
    import torch

    gpu(True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name, value in (('RANK', 2), ('WORLD_SIZE', 4), ('LOCAL_RANK', 2)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match='2 GPU'):
        cli.start_processes(config(), 'pytorch')


def test_seed_comes_from_the_checkpoint(train, tmp_path):
    import torch

    path = tmp_path / 'epoch_2.pth'
    torch.save(dict(state_dict={}, optimizer={}, meta=dict(iter=6, epoch=2, seed=41)), path)
    cfg = config(work_dir=str(tmp_path), load_from='pretrained.pth', randomness=dict(
        seed=None, diff_rank_seed=True))
    train.set_resume(cfg, 'auto')
    assert cfg.resume is True and cfg.load_from == str(path)
    assert cfg.randomness == dict(seed=41, diff_rank_seed=True)


def test_nothing_to_resume(train, tmp_path):
    import torch

    torch.save(dict(state_dict={}), tmp_path / 'pretrained.pth')
    cfg = config(work_dir=str(tmp_path / 'new'), load_from=str(tmp_path / 'pretrained.pth'))
    train.set_resume(cfg, 'auto')
    assert cfg.resume is False and cfg.load_from.endswith('pretrained.pth')


# --- --cfg-options --------------------------------------------------------------------------

@pytest.mark.parametrize(('text', 'value'), [
    ("[dict(type='A', allow=['^head'])]", [dict(type='A', allow=['^head'])]),
    ("dict(type='A', n=-1, f=1e-4, t=(True, None))", dict(type='A', n=-1, f=1e-4,
                                                          t=(True, None))),
    ("{'a': {'b': []}}", dict(a=dict(b=[]))), ("'[1, 2]'", [1, 2]), ('"[\'^head\']"', ['^head']),
    ("['a b', '^(c|d), e']", ['a b', '^(c|d), e']), ('(1,2),(3,4)', ((1, 2), (3, 4))),
    # as mmengine reads it
    ('[a,b]', ['a', 'b']), ('1,2', [1, 2]), ('(1)', (1,)), ('[(1,2),[a,b],c]',
                                                          [(1, 2), ['a', 'b'], 'c']),
    ('[true,1.5]', [True, 1.5]), ('None', None), ('false', False), ('4', 4), ('x', 'x'),
    ('epoch_{}.pth', 'epoch_{}.pth'), ('/my data (2)/x', '/my data (2)/x')], ids=str)
def test_values_of_options(text, value, mm):
    found = parse_options([f'a.b={text}'])
    assert found == {'a.b': value} and type(found['a.b']) is type(value)


@pytest.mark.parametrize('text', ['[dict(type=EMAHook)]', "[dict(type='A'", '[1,[2',
                                  "dict(**a)", "[dict(type='A', b=true)]", "{'a': b}"])
def test_values_that_are_no_python(text, mm):
    with pytest.raises(UserError, match=r"quote .*custom_hooks=\[dict\(type='EMAHook'"):
        parse_options([f'custom_hooks={text}'])


def test_options_say_which_hooks_they_replace(mm, tmp_path, capsys):
    path = tmp_path / 'config.py'
    path.write_text("default_scope = 'mmpretrain'\nmodel = dict(type='A')\n"
                    "custom_hooks = [dict(type='EMAHook')]\n")
    cfg = cli.load_config(str(path), ["custom_hooks=[dict(type='B')]"])
    assert cfg.custom_hooks == [dict(type='B')]
    assert 'gone: EMAHook' in capsys.readouterr().out
    with pytest.raises(UserError, match='custom_hooks'):
        cli.load_config(str(path), ['custom_hooks=[]', 'custom_hooks.0.type=B'])


# --- settings that cannot work --------------------------------------------------------------

@pytest.fixture
def cls_config(mm, tmp_path):
    """cls_config(*options): the config of the tiny classification, read as train.py does."""
    path = tmp_path / 'config.py'
    path.write_text(tiny.cls_config(tmp_path))
    return lambda *options: cli.load_config(str(path), options)


@pytest.mark.parametrize(('option', 'expected'), [
    *((f'train_dataloader.batch_size={v}', 'an int of at least 1')
      for v in ('0', '-2', 'abc', '2.5', 'True', '[2]')),
    ('val_dataloader.batch_size=0', 'an int of at least 1'),
    ('train_dataloader.num_workers=-1', 'an int of at least 0'),
    ('train_dataloader.num_workers=two', 'an int of at least 0'),
    ('train_dataloader=3', 'must be a dict'),
    *((f'optim_wrapper.optimizer.lr={v}', 'a finite number of at least 0')
      for v in ('-1e-3', 'nan', 'inf', 'abc', 'True')),
    ('optim_wrapper.optimizer.weight_decay=-1', 'a finite number of at least 0'),
    ('optim_wrapper.optimizer.type=AdamX', 'did you mean Adam'),
    ('optim_wrapper.optimizer.type=torch.optim.AdamX', 'did you mean Adam'),
    *((f'train_cfg.max_epochs={v}', 'a whole number of at least 1')
      for v in ('0', 'x', '-1', '1.5')),
    ('train_cfg.val_interval=0', 'a whole number of at least 1'),
    ('auto_scale_lr.base_batch_size=0', 'an int of at least 1'),
    ('model.head.num_classes=0', 'an int of at least 1'),
    ('model.head.num_classes=5', 'data_preprocessor.num_classes=2, which Mixup'),
    ('val_evaluator.topk=(1,5)', r'give --cfg-options "val_evaluator.topk=\(1,\)"'),
    ('val_evaluator.topk=5', 'knows 2 classes only'),
    ("val_evaluator=[dict(type='mmpretrain.Accuracy', topk=(1, 3))]", 'val_evaluator.0.topk')])
def test_settings_that_cannot_work(option, expected, cls_config):
    cfg = cls_config(option)
    with pytest.raises(UserError, match=expected) as found:
        cli.check_training(cfg)
    assert cfg.filename in str(found.value) and '\n' not in str(found.value)


@pytest.mark.parametrize('options', [
    [], ['train_cfg.max_epochs=3.0'], ['optim_wrapper.optimizer.lr=0'],
    ['optim_wrapper.optimizer.type=torch.optim.AdamW'], ['optim_wrapper.optimizer.type=Lamb'],
    ["optim_wrapper=dict(constructor='Own', a=dict(optimizer=dict(type='SGD', lr=1)))"],
    ['model.head.topk=(1,5)'], ['model.backbone.num_classes=0'],
    ['model.train_cfg=None', 'model.head.num_classes=5', 'val_evaluator.topk=(1,5)'],
    ['val_cfg=None', 'val_dataloader=None', 'val_evaluator=None']], ids=' '.join)
def test_settings_that_work(options, cls_config):
    cli.check_training(cls_config(*options))


def test_folders_of_ones_own_with_the_imagenet_config(mm, tmp_path, monkeypatch):
    """The line's own options are what it takes."""
    import shlex

    tiny.make_cls(tmp_path, per_class=1)
    path = str(tiny.ROOT / 'configs/vmamba/vmamba-tiny-s1l8_8xb128_in1k-224.py')
    roots = [f'{name}_dataloader.dataset.data_root={tmp_path}' for name in ('train', 'val', 'test')]
    with pytest.raises(UserError, match=r'2 class folder\(s\) \(blue, red\)') as found:
        cli.check_training(cli.load_config(path, roots))
    options = shlex.split(str(found.value).rpartition('--cfg-options ')[2])
    cfg = cli.load_config(path, [*roots, *options])
    cli.check_training(cfg)
    cli.check_testing(cfg)
    assert cfg.train_dataloader.dataset.metainfo.classes == ['blue', 'red']
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 2


@pytest.mark.parametrize('name', ['tpu', 'meta', 'cpu of mine', 'cuda:99', 'cuda:-1', 'cuda'])
def test_devices_that_do_not_exist(name, mm, gpu):
    gpu(False)
    with pytest.raises(UserError, match=f'--device {name}: torch'):
        cli.choose_device(name)
    assert cli.choose_device('cpu') == 'cpu'


@pytest.mark.parametrize('name', [
    'vmamba/vmamba-tiny-s1l8_8xb128_in1k-224', 'vmamba/mask-rcnn_vmamba-tiny-s1l8_fpn_1x_coco',
    'vmamba/upernet_vmamba-tiny-s1l8_8xb2-160k_ade20k-512x512', 'demo/upernet_vmamba_digits-128'])
def test_our_configs_pass_the_checks(name, mm):
    cfg = cli.load_config(str(tiny.ROOT / f'configs/{name}.py'))
    cli.check_training(cfg)
    cli.check_testing(cfg)
