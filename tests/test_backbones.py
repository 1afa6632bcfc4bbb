"""What every backbone does, whatever its family: ``tests/families`` says on which ones."""

import warnings

import pytest
import torch
from specs import each, each_arch, each_spec, registered  # noqa: F401 (a fixture)
from torch import nn
from zoo_classes import CLASSES

from vmamba_mm import zoo
from vmamba_mm.families import resolve_arch

# --- architectures ------------------------------------------------------------------------------

@each_spec
def test_published_architectures(spec):
    """They keep their own rules, and have as many parameters as the metafile says."""
    tasks = ('cls', 'video', 'points') if spec.family.task == 'cls' else (spec.family.task,)
    entries = [e for e in zoo.entries(spec.family.name) if e.task in tasks]
    assert entries and spec.model.arch_settings is spec.family.archs
    for arch in spec.family.archs:
        assert resolve_arch(spec.family, dict(spec.family.archs[arch])) == spec.family.archs[arch]
        model = spec.published(arch, is_classifier=True)
        backbone = sum(p.numel() for p in model.parameters())
        for entry in (e for e in entries if e.arch == arch):
            if spec.whole_model is not None:
                with torch.device('meta'):
                    whole = spec.whole_model(arch, entry.name)
                assert sum(p.numel() for p in whole.parameters()) == entry.parameters, entry.name
                continue
            width, head = model.num_features[-1], 0
            if hidden := spec.family.head_dims.get(arch):
                width, head = hidden, hidden * (width + 1)
            head += CLASSES[entry.dataset] * (width + 1)
            assert backbone + head == entry.parameters, entry.name


@each_spec
def test_a_change_of_a_published_architecture(spec):
    change = {k: v for k, v in spec.changes[0].items()}
    name = spec.model.default_arch
    with torch.device('meta'):
        model = spec.model(dict(base=name, **change))
        assert model.arch == {**spec.family.archs[name], **change}
        assert spec.model(dict(base=name)).arch == spec.model(name).arch == spec.model().arch
        assert spec.model(model.arch).arch == model.arch
    assert spec.family.archs[name] != model.arch


@each('wrong')
def test_wrong_architectures_name_the_choices(spec, item):
    change, message = item
    for arch in (dict(spec.first, **change), dict(base=spec.model.default_arch, **change)):
        with pytest.raises(ValueError, match=message):
            spec.model(arch)


@each_spec
def test_wrong_values_name_the_choices(spec):
    key, name = next(iter(spec.first)), spec.model.default_arch
    lacking = {k: v for k, v in spec.first.items() if k != key}
    last = len(spec.stages(spec.first))
    for kwargs, message in [
            (dict(arch='giant'), f"arch='giant' does not exist.*{name}"),
            (dict(arch=7), 'a name or a dict'),
            (dict(arch={**spec.first, 'dims': 3}), r"unknown keys \['dims'\]"),
            (dict(arch=lacking), rf"lacks \['{key}'\]"),
            (dict(arch=dict(base='giant')), f"base.*'giant' does not exist.*{name}"),
            (dict(arch=dict(base=dict(spec.first))), f'base.*does not exist.*{name}'),
            (dict(arch=dict(base=name, deep=3)), r"unknown keys \['deep'\]"),
            (dict(out_indices=(last,)), 'out_indices'), (dict(out_indices=(1, 0)), 'out_indices'),
            (dict(out_indices=()), 'out_indices'), (dict(out_indices=1), 'out_indices'),
            (dict(frozen_stages=last + 1), f'frozen_stages.*to {last}'),
            (dict(drop_path_rate=1.0), 'drop_path_rate'), (dict(in_channels=0), 'in_channels')]:
        with pytest.raises(ValueError, match=message):
            spec.model(**{'arch': spec.first, **kwargs})


@each_spec
def test_left_over_keywords_say_delete(spec):
    model = spec.family.model
    for key in ('window_size', 'depth', 'pretrain_img_size'):
        with pytest.raises(TypeError, match=f"{model} has no argument '{key}'.*_delete_=True, "
                                            f"type='vmamba_mm.{model}'"):
            spec.model(spec.first, **{key: 7})
    with pytest.raises(TypeError, match='pretrained=None beside the backbone'):
        spec.model(spec.first, pretrained='open-mmlab://resnet50_v1c')


@each_arch
def test_building_and_running_is_quiet(spec, arch, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        spec.model(arch)(spec.input(arch, 2, 3, 8, 8))
    assert capsys.readouterr() == ('', '')


# --- outputs and gradients ------------------------------------------------------------------------

@each_arch
def test_any_input_size_forward_and_backward(spec, arch):
    torch.manual_seed(0)
    stages = spec.stages(arch)
    for size in spec.sizes:
        model = spec.model(arch, stages, drop_path_rate=0.1)
        outs = model(spec.input(arch, 2, 3, *size))
        shapes = spec.shapes(arch, *size)
        assert [out.shape[1:] for out in outs] == shapes, size
        assert all(out.is_contiguous() for out in outs)  # mmcv's ops assume it
        assert model.num_features == [channels for channels, *_ in shapes]
        sum(out.square().mean() for out in outs).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), (size, name)


@each_arch
def test_out_indices(spec, arch):
    stages = spec.stages(arch)
    every, x = spec.model(arch, stages).eval(), spec.input(arch, 1, 3, 40, 32)
    all_outs = every(x)
    for indices in ((0,), tuple(sorted({1, stages[-1]})), (stages[-1],)):
        model = spec.model(arch, indices).eval()
        assert not model.load_state_dict(every.state_dict(), strict=False).missing_keys
        outs = model(x)
        assert len(outs) == len(indices)
        for i, out in zip(indices, outs, strict=True):
            torch.testing.assert_close(out, all_outs[i])


@each_arch
def test_gradient_checkpointing_is_exact(spec, arch):
    torch.manual_seed(0)
    plain, saving = (spec.model(arch, drop_path_rate=0.3, with_cp=cp) for cp in (False, True))
    saving.load_state_dict(plain.state_dict())
    x, calls = spec.input(arch, 2, 3, 32, 32), dict.fromkeys(
        (_block_of(spec, saving), spec.a_weight.rpartition('.')[0]), 0)
    for watched in calls:
        saving.get_submodule(watched).register_forward_pre_hook(
            lambda *args, watched=watched: calls.update({watched: calls[watched] + 1}))
    for model in (plain, saving):
        torch.manual_seed(1)
        loss = model(x)[-1].sum()
        forward = list(calls.values())
        loss.backward()
    block, inside = forward  # what is in the block runs once more in the backward pass
    assert block == 1 <= inside and list(calls.values()) == [block, 2 * inside]
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def _block_of(spec, model):
    """The name of the block that the spec's weight is in."""
    parts = spec.a_weight.split('.')
    return '.'.join(parts[:2 if model.is_flat else 4])


@each_arch
def test_drop_path(spec, arch):
    """Off where the rate is 0, at evaluation, and in the first block; it grows to the last."""
    torch.manual_seed(0)
    x = spec.input(arch, 8, 3, 8, 8)
    model = spec.model(arch, drop_path_rate=0.9).train()
    assert not torch.equal(model(x)[-1], model(x)[-1])
    for other in (model.eval(), spec.model(arch, **spec.repeatable).train()):
        assert torch.equal(other(x)[-1], other(x)[-1])
    rates = {}
    for name, module in model.named_modules():
        if hasattr(module, 'drop_prob'):
            depth, count = model.get_layer_depth(f'{name}.weight')
            rates.setdefault(depth, module.drop_prob)
            assert rates[depth] == module.drop_prob, name
    expected = spec.drop_path_rates or (lambda *args: torch.linspace(0, 0.9, count - 2).tolist())
    assert list(rates.values()) == pytest.approx(expected(model.arch, 0.9))


@each_arch
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_precision(spec, arch, dtype):
    torch.manual_seed(0)
    model, x = spec.model(arch).eval(), spec.input(arch, 1, 3, 32, 48)
    exact = model(x)
    with torch.autocast('cpu', dtype):
        cast = model(x)
    half = model.to(dtype)(x.to(dtype))
    for outs in (cast, half):
        for out, expected in zip(outs, exact, strict=True):
            assert out.isfinite().all()
            assert (out - expected).abs().mean() < 0.05


@each_arch
def test_other_channels(spec, arch):
    model = spec.model(arch, in_channels=5)
    firsts = [p for name, p in model.named_parameters() if name in spec.family.first_convs]
    assert len(firsts) == 1 and firsts[0].shape[1] == 5
    assert model(spec.input(arch, 2, 5, 16, 16))


# --- training ---------------------------------------------------------------------------------

@each_arch
def test_frozen_stages(spec, arch):
    stages = spec.stages(arch)
    for frozen_stages in (-1, *range(len(stages) + 1)):
        model = spec.model(arch, stages, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
        frozen = set(spec.model.stem) if frozen_stages >= 0 else set()
        for i in range(frozen_stages):
            frozen.add(f'{spec.model.stages_name}.{i}')
            norm = model.output_norm(i)
            frozen |= {name for name, module in model.named_modules() if module is norm}
        for name, p in model.named_parameters():
            inside = any(name == f or name.startswith(f + '.') for f in frozen)
            assert p.requires_grad != inside, (frozen_stages, name)
        for i in stages:
            stage = getattr(model, spec.model.stages_name)[i]
            assert stage.training == (i >= frozen_stages)
        if frozen_stages < len(stages):
            model(spec.input(arch, 2, 3, 32, 32))[-1].sum().backward()


@each_arch
def test_norm_eval_keeps_batch_norms_in_eval(spec, arch):
    for norm_eval in (True, False):
        model = spec.model(arch, norm_eval=norm_eval)
        model.extra = nn.BatchNorm2d(4)  # as a user may put it there
        model.train()
        assert model.extra.training != norm_eval and model.patch_embed.training


@each_arch
def test_layer_depths(spec, arch):
    """Each parameter of a block has the number of the block, whatever the stages are."""
    model = spec.model(arch)
    count = sum(model.depths) + 2
    depths = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')
              for name, _ in model.named_parameters()}
    # The last depth is that of what follows the blocks, as norms of outputs, and is outside.
    follows = {name.split('.')[0] for name in depths} - {*spec.model.stem, 'blocks', 'stages'}
    assert {depth for depth, _ in depths.values()} == set(range(count if follows else count - 1))
    for name, (depth, total) in depths.items():
        assert total == count and (depth == 0) == (name.split('.')[0] in spec.model.stem), name
    for name, depth in spec.layer_depths.items() if arch is spec.first else ():
        assert depths[name] == (depth, count), name
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (count - 1, count)


# --- compiled and exported ----------------------------------------------------------------------

@each_arch
def test_one_graph_under_compile(spec, arch):
    """By torch.compile, and the first arch by the argument ``compile``."""
    torch._dynamo.reset()  # the code of one class is compiled again for each model, up to a limit
    model, options = spec.model(arch).eval(), dict(fullgraph=True, backend='aot_eager')
    if arch is spec.first:
        compiled = spec.model(arch, compile=options).eval()
        compiled.load_state_dict(model.state_dict())  # the names of the weights stay
    else:
        compiled = torch.compile(model, **options)
    x = spec.input(arch, 1, 3, 33, 40)
    with torch.no_grad():
        for out, expected in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(out, expected)


@each_spec
def test_argument_compile(spec):
    assert spec.model(spec.first, compile=True)._compiled_call_impl is not None
    assert spec.model(spec.first, compile={})._compiled_call_impl is not None
    assert spec.model(spec.first, compile=None)._compiled_call_impl is None


@each_arch
@pytest.mark.filterwarnings('ignore')
def test_export(spec, arch):
    model, x = spec.random_model(arch), spec.input(arch, 1, 3, 32, 40)
    exported = torch.export.export(model, (x,)).module()
    for out, expected in zip(exported(x), model(x), strict=True):
        torch.testing.assert_close(out, expected)
