"""How the tools change a config before a Runner sees it."""

import sys

import pytest
import tiny

from vmamba_mm.compat import UserError


@pytest.fixture(scope='module')
def tools(mm):
    """The tools' modules, as they see each other."""
    sys.path.insert(0, str(tiny.TOOLS))
    try:
        import _cli
        import train
        yield _cli, train
    finally:
        sys.path.remove(str(tiny.TOOLS))


@pytest.fixture
def gpu(monkeypatch, tools):
    """gpu(True) or gpu(False): what has_gpu says."""
    return lambda present: monkeypatch.setattr(tools[0], 'has_gpu', lambda: present)


def config(**kwargs):
    from mmengine.config import Config
    return Config(kwargs)


def amp_config(kind):
    return config(optim_wrapper=dict(type=kind, optimizer=dict(type='SGD')))


def test_amp(tools, gpu, capsys):
    _, train = tools
    gpu(True)
    cfg = amp_config('OptimWrapper')
    train.set_amp(cfg, asked=True)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    gpu(False)
    train.set_amp(cfg, asked=False)
    assert cfg.optim_wrapper.type == 'OptimWrapper' and 'loss_scale' not in cfg.optim_wrapper
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(UserError, match='--amp needs a GPU'):
        train.set_amp(cfg, asked=True)


def test_evaluation_on_a_cpu_is_fp32(tools, gpu, capsys):
    cli, _ = tools
    cfg = config(val_cfg=dict(fp16=True), test_cfg=dict(fp16=True))
    gpu(True)
    cli.evaluate_in_fp32_without_gpu(cfg)
    assert cfg.val_cfg.fp16 and cfg.test_cfg.fp16 and not capsys.readouterr().out
    gpu(False)
    cli.evaluate_in_fp32_without_gpu(cfg)
    assert not cfg.val_cfg.fp16 and not cfg.test_cfg.fp16
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_sync_bn(tools):
    cli, _ = tools
    model = dict(a=dict(norm_cfg=dict(type='SyncBN')), b=[dict(norm=dict(type='LN'))],
                 c=({'type': 'MMSyncBN'},))
    cli.sync_to_plain_batch_norm(model)
    assert model == dict(a=dict(norm_cfg=dict(type='BN')), b=[dict(norm=dict(type='LN'))],
                         c=({'type': 'BN'},))


def test_hooks_keep_the_users_settings(tools):
    _, train = tools
    cfg = config(custom_hooks=[dict(type='EMAHook'), dict(type='vmamba_mm.StrictLoadHook',
                                                          allow=['^head'])],
                 default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=7)))
    train.set_hooks(cfg)
    train.set_hooks(cfg)
    types = [hook['type'] for hook in cfg.custom_hooks]
    assert len(types) == len(set(types)) and types[0] == 'EMAHook'
    assert cfg.custom_hooks[1]['allow'] == ['^head']
    assert cfg.default_hooks.checkpoint == dict(type='vmamba_mm.AtomicCheckpointHook', interval=7)


def test_visualizer_keeps_the_users_backends(tools):
    _, train = tools
    cfg = config(visualizer=dict(type='X', vis_backends=[dict(type='LocalVisBackend', a=1)]))
    train.set_visualizer(cfg)
    assert cfg.visualizer.vis_backends[0] == dict(type='LocalVisBackend', a=1)
    assert [b['type'] for b in cfg.visualizer.vis_backends] == ['LocalVisBackend',
                                                                'TensorboardVisBackend']


def test_data_paths(tools, tmp_path):
    cli, _ = tools
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


def test_too_many_processes_for_the_gpus(tools, gpu, monkeypatch):
    import torch

    cli, _ = tools
    gpu(True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    for name, value in (('RANK', 2), ('WORLD_SIZE', 4), ('LOCAL_RANK', 2)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match='2 GPU'):
        cli.start_processes(config(), 'pytorch')


def test_seed_comes_from_the_checkpoint(tools, tmp_path):
    import torch

    _, train = tools
    path = tmp_path / 'epoch_2.pth'
    torch.save(dict(state_dict={}, optimizer={}, meta=dict(iter=6, epoch=2, seed=41)), path)
    cfg = config(work_dir=str(tmp_path), load_from='pretrained.pth', randomness=dict(
        seed=None, diff_rank_seed=True))
    train.set_resume(cfg, 'auto')
    assert cfg.resume is True and cfg.load_from == str(path)
    assert cfg.randomness == dict(seed=41, diff_rank_seed=True)


def test_nothing_to_resume(tools, tmp_path):
    import torch

    _, train = tools
    torch.save(dict(state_dict={}), tmp_path / 'pretrained.pth')
    cfg = config(work_dir=str(tmp_path / 'new'), load_from=str(tmp_path / 'pretrained.pth'))
    train.set_resume(cfg, 'auto')
    assert cfg.resume is False and cfg.load_from.endswith('pretrained.pth')
