import sys

import pytest
import tiny


@pytest.fixture
def run_tool(load_tool, monkeypatch):
    """run_tool(path, *arguments, **attributes): run a tool with attributes of it replaced."""
    def run(path, *arguments, **attributes):
        tool = load_tool(path)
        monkeypatch.setattr(sys, 'argv', [path, *arguments])
        for name, value in attributes.items():
            monkeypatch.setattr(tool, name, value)
        tool.main()

    return run


@pytest.fixture
def break_scan(monkeypatch):
    """break_scan(forward): from here on SS2D's scan, or its gradient, is wrong under autocast."""
    import torch

    import vmamba_mm.layers.ss2d as layer

    right = layer.scan_norm

    def break_scan(forward):
        def wrong(x, *args, **kwargs):
            y = right(x, *args, **kwargs)
            if x.dtype == torch.float32:
                return y
            return y * 1.5 if forward else y.detach() + 0 * x

        monkeypatch.setattr(layer, 'scan_norm', wrong)

    return break_scan


@pytest.fixture(scope='session')
def projects(forkserver, tmp_path_factory):
    """task -> (config, checkpoint with random weights, folder of images), made when asked for."""
    made = {}

    def project(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            made[task] = _make_project(task, folder)
        return made[task]

    return project


def _make_project(task, folder):
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    from vmamba_mm.mm.compat import prepare_mm

    prepare_mm()
    make, write, images = {
        'cls': (tiny.make_cls, tiny.cls_config, 'val/red'),
        'det': (tiny.make_det, tiny.det_config, 'images'),
        'seg': (tiny.make_seg, tiny.seg_config, 'images/validation')}[task]
    data = folder / 'data'
    data.mkdir()
    make(data)
    config = folder / 'config.py'
    config.write_text(write(data))
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:
        cfg.model.data_preprocessor = cfg.data_preprocessor
    model = MODELS.build(cfg.model)
    checkpoint = folder / 'model.pth'
    meta = dict(dataset_meta=dict(classes=('blue', 'red'))) if task == 'cls' else {}
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return config, checkpoint, data / images
