"""What scripts, notebooks and worker processes do with a model: copy, pickle, send elsewhere."""
import copy
import io
import pickle

import numpy as np
import pytest
import torch

from vmamba_mm.models import VMamba
from vmamba_mm.timm import TimmVMamba

S1 = dict(embed_dims=8, depths=(1, 1, 2, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
          conv_bias=False, gate=False, mlp_ratio=4.0, stem='conv', downsample='conv', scan='cross')
VANILLA = dict(S1, d_state=4, ssm_ratio=2.0, conv_bias=True, gate=True, mlp_ratio=0.0,
               stem='patch', downsample='merge', scan='cascade')
IMAGE = torch.randn(2, 3, 33, 47, generator=torch.Generator().manual_seed(0))


def make_models():
    torch.manual_seed(0)
    return {'s1': VMamba(S1, drop_path_rate=0.1),
            'vanilla': VMamba(VANILLA, out_indices=(1, 3), frozen_stages=1, with_cp=True),
            'timm': TimmVMamba(S1, num_classes=5)}


def maps_of(model):
    with torch.no_grad():
        out = model.eval()(IMAGE)
    return (out,) if isinstance(out, torch.Tensor) else out


def train_once(model):
    """Whatever a model remembers of its calls is there after this."""
    out = model.train()(IMAGE)
    sum(y.square().mean() for y in ((out,) if isinstance(out, torch.Tensor) else out)).backward()


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {'deepcopy': copy.deepcopy, 'pickle': lambda model: pickle.loads(pickle.dumps(model)),
          'torch.save': through_torch_save}


@pytest.mark.parametrize('used', [False, True], ids=['new', 'used'])
@pytest.mark.parametrize('how', COPIES)
def test_copies(how, used):
    """A copy gives the same maps, before and after a training step, and shares no memory."""
    for name, model in make_models().items():
        if used:
            train_once(model)
            assert any(p.grad is not None for p in model.parameters())
        expected = maps_of(model)
        copied = COPIES[how](model)
        assert type(copied) is type(model) and str(copied) == str(model)
        for one, other in zip(maps_of(copied), expected, strict=True):
            assert torch.equal(one, other), name
        for one, other in zip(copied.parameters(), model.parameters(), strict=True):
            assert one.requires_grad == other.requires_grad
            assert one.data_ptr() != other.data_ptr()
        train_once(copied)
        for one, other in zip(maps_of(model), expected, strict=True):
            assert torch.equal(one, other), name


def arrays(model):
    """Arrays are pickled; tensors would be gone with the process that sends them."""
    return [y.numpy() for y in maps_of(model)]


def work(models, files, results):
    """In a new process: what came by shared memory and what lies in files, both used."""
    torch.set_num_threads(1)
    found = {name: arrays(model) for name, model in models.items()}
    loaded = {name: arrays(torch.load(path, weights_only=False)) for name, path in files.items()}
    for model in models.values():
        train_once(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.25)
    results.put((found, loaded))


def test_spawned_worker(tmp_path):
    """torch.multiprocessing with the start method of Windows, macOS and CUDA."""
    context = torch.multiprocessing.get_context('spawn')
    models = make_models()
    expected = {name: arrays(model) for name, model in models.items()}
    files = {name: tmp_path / f'{name}.pth' for name in models}
    for name, model in models.items():
        torch.save(model, files[name])
        model.share_memory()
    results = context.Queue()
    worker = context.Process(target=work, args=(models, files, results), daemon=True)
    worker.start()
    found, loaded = results.get(timeout=120)
    for name, maps in expected.items():
        for one, two, other in zip(found[name], loaded[name], maps, strict=True):
            assert np.allclose(one, other, atol=1e-5) and np.allclose(two, other, atol=1e-5)
    worker.join(60)
    assert worker.exitcode == 0
    # The memory is shared: what the worker wrote is here.
    assert all(bool((p == 0.25).all()) for model in models.values() for p in model.parameters())
