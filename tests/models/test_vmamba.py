import warnings

import pytest
import torch
from torch import nn

from vmamba_mm.models import VMamba

#: published totals with a 1000-class head
PARAMETERS = {
    'vanilla_tiny': 22893448, 'vanilla_small': 44417416, 'vanilla_base': 76254056,
    'tiny_s2l5': 30705832, 'small_s2l15': 50147752, 'base_s2l15': 88557800,
    'tiny_s1l8': 30249064, 'small_s1l20': 49012840, 'base_s1l20': 86614504}
S1 = dict(embed_dims=8, depths=(1, 1, 2, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
          conv_bias=False, gate=False, mlp_ratio=4.0, stem='conv', downsample='conv', scan='cross')
VANILLA = dict(S1, d_state=4, ssm_ratio=2.0, conv_bias=True, gate=True, mlp_ratio=0.0,
               stem='patch', downsample='merge')
SCANS = ('unidirectional', 'bidirectional', 'cascade')
OTHER = dict(S1, d_state=2, act='relu', conv_kernel=0, gate=True, ssm_init='zero')
ARCHS = [pytest.param(S1, id='s1'), pytest.param(VANILLA, id='vanilla')]


def test_parameters_are_the_published_ones():
    assert set(PARAMETERS) == set(VMamba.arch_settings)
    for arch, published in PARAMETERS.items():
        with torch.device('meta'):
            model = VMamba(arch, out_indices=(3,))
        head = 1000 * (model.num_features[-1] + 1)
        assert sum(p.numel() for p in model.parameters()) + head == published, arch


def test_state_space_parameters_have_the_published_shapes():
    with torch.device('meta'):
        ssm = VMamba('vanilla_tiny').stages[0].blocks[0].ssm
    shapes = {name: tuple(p.shape) for name, p in ssm.named_parameters(recurse=False)}
    assert shapes == dict(x_proj_weight=(4, 6 + 32, 192), dt_projs_weight=(4, 192, 6),
                          dt_projs_bias=(4, 192), A_logs=(768, 16), Ds=(768,))


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (31, 33), (64, 32)], ids=str)
@pytest.mark.parametrize('arch', ARCHS)
def test_any_input_size_forward_and_backward(arch, size):
    torch.manual_seed(0)
    model = VMamba(arch, drop_path_rate=0.1)
    outs = model(torch.randn(2, 3, *size))
    height, width = ((-(-s // 4) for s in size) if arch is S1 else (max(1, s // 4) for s in size))
    for i, out in enumerate(outs):
        assert out.shape == (2, 8 * 2 ** i, height, width)
        assert out.is_contiguous()  # mmcv's ops assume it
        height, width = -(-height // 2), -(-width // 2)
    sum(out.square().mean() for out in outs).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


@pytest.mark.parametrize('arch', ARCHS)
def test_initialisation(arch):
    torch.manual_seed(0)
    model = VMamba(arch)
    model.init_weights()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.abs().max() < 0.12 and 0.01 < module.weight.std() < 0.03
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    ssm = model.stages[0].blocks[0].ssm
    assert (ssm.Ds == 1).all() and not ssm.A_logs[:, 0].any()


def test_optional_keys_reach_every_block():
    """Absent, they are what is published; the names of the parameters do not change."""
    published = dict(act='silu', conv_kernel=3, ssm_init='mamba')
    torch.manual_seed(0)
    plain = VMamba(S1).state_dict()
    torch.manual_seed(0)
    spelled_out = VMamba(dict(S1, **published)).state_dict()
    assert list(plain) == list(spelled_out)
    assert all(torch.equal(value, spelled_out[key]) for key, value in plain.items())

    model = VMamba(dict(OTHER, gate=False))
    for stage in model.stages:
        for block in stage.blocks:
            assert block.ssm.act == 'relu' and block.ssm.conv2d is None
            assert not block.ssm.A_logs.any()
    assert set(plain) - set(model.state_dict()) == {k for k in plain if 'conv2d' in k}
    model = VMamba(dict(S1, conv_kernel=7))
    assert model.stages[3].blocks[0].ssm.conv2d.weight.shape == (64, 1, 7, 7)


@pytest.mark.parametrize('scan', SCANS)
def test_scan_reaches_every_block_and_leaves_no_trace(scan):
    torch.manual_seed(0)
    plain = VMamba(S1)
    torch.manual_seed(0)
    model = VMamba(dict(S1, scan=scan))
    assert all(b.ssm.scan == scan for stage in model.stages for b in stage.blocks)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    x = torch.randn(2, 3, 31, 44)
    outs = model(x)
    assert not any(torch.allclose(one, other) for one, other in zip(outs, plain(x), strict=True))
    sum(out.square().mean() for out in outs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_drop_path_grows_linearly():
    model = VMamba(S1, drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (2,)], ids=str)
def test_out_indices(out_indices):
    model = VMamba(S1, out_indices=out_indices).eval()
    every = VMamba(S1).eval()
    result = model.load_state_dict(every.state_dict(), strict=False)
    assert not result.missing_keys
    x = torch.randn(1, 3, 40, 32)
    outs, all_outs = model(x), every(x)
    assert len(outs) == len(out_indices)
    for i, out in zip(out_indices, outs, strict=True):
        torch.testing.assert_close(out, all_outs[i])


def test_gradient_checkpointing_is_exact():
    torch.manual_seed(0)
    plain, saving = VMamba(S1, drop_path_rate=0.3), VMamba(S1, drop_path_rate=0.3, with_cp=True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x)[-1].sum().backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize('frozen_stages', range(-1, 5))
def test_frozen_stages(frozen_stages):
    model = VMamba(S1, frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    frozen = {'patch_embed'} if frozen_stages >= 0 else set()
    frozen |= {f'stages.{i}' for i in range(frozen_stages)}
    frozen |= {f'norm{i}' for i in range(frozen_stages)}
    for name, p in model.named_parameters():
        inside = any(name.startswith(f + '.') for f in frozen)
        assert p.requires_grad != inside, name
    for i, stage in enumerate(model.stages):
        assert stage.training == (i >= frozen_stages)
    if frozen_stages < 4:
        model(torch.randn(1, 3, 32, 32))[-1].sum().backward()


def test_norm_eval_keeps_batch_norms_in_eval():
    model = VMamba(S1, norm_eval=True)
    model.patch_embed.norm1 = nn.BatchNorm2d(4)
    model.train()
    assert not model.patch_embed.norm1.training and model.stages[0].training


def test_get_layer_depth():
    model = VMamba(S1)
    depth = {name: model.get_layer_depth(f'backbone.{name}', 'backbone.')
             for name, _ in model.named_parameters()}
    assert depth['patch_embed.conv1.weight'] == (0, 7)
    assert depth['stages.0.blocks.0.ssm.Ds'] == (1, 7)
    assert depth['stages.0.downsample.conv.weight'] == (1, 7)
    assert depth['stages.2.blocks.1.norm1.weight'] == (4, 7)
    assert depth['stages.3.blocks.0.mlp.fc1.bias'] == (5, 7)
    assert depth['norm3.weight'] == (6, 7)
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)


@pytest.mark.parametrize('arch', [S1, OTHER], ids=['s1', 'other'])
def test_one_graph_under_compile(arch):
    model = VMamba(arch).eval()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        for out, expected in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(out, expected)


@pytest.mark.parametrize('arch', [S1, OTHER], ids=['s1', 'other'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_half_precision(dtype, arch):
    torch.manual_seed(0)
    model, x = VMamba(arch).eval(), torch.randn(1, 3, 32, 48)
    exact = model(x)
    with torch.autocast('cpu', dtype):
        cast = model(x)
    half = model.to(dtype)(x.to(dtype))
    for outs in (cast, half):
        for out, expected in zip(outs, exact, strict=True):
            assert out.isfinite().all()
            assert (out - expected).abs().mean() < 0.05


@pytest.mark.parametrize('key', ['window_size', 'depth', 'pretrain_img_size'])
def test_left_over_keyword_says_delete(key):
    with pytest.raises(TypeError, match=f"'{key}'.*_delete_=True"):
        VMamba(S1, **{key: 7})


def test_mmsegs_pretrained_key_is_explained():
    with pytest.raises(TypeError, match='pretrained=None beside the backbone'):
        VMamba(S1, pretrained='open-mmlab://resnet50_v1c')


def test_a_change_of_a_published_architecture():
    with torch.device('meta'):
        model = VMamba(dict(base='tiny_s1l8', depths=(2, 2, 4, 2), act='gelu'))
        assert model.arch == dict(VMamba.arch_settings['tiny_s1l8'], depths=(2, 2, 4, 2),
                                  act='gelu')
        assert VMamba(dict(base='tiny_s1l8')).arch == VMamba('tiny_s1l8').arch
        assert VMamba(model.arch).arch == model.arch
    assert VMamba.arch_settings['tiny_s1l8']['depths'] == (2, 2, 8, 2)


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(arch='tiny'), "arch='tiny' does not exist.*tiny_s1l8"),
    (dict(arch=7), 'a name or a dict'),
    (dict(arch=dict(S1, stem='swin')), r"stem.*'patch' or 'conv'"),
    (dict(arch=dict(S1, scan='zigzag')), "scan='zigzag' does not exist.*'cross', 'unidirectional'"),
    (dict(arch=dict(S1, scan=4)), "scan.*a str, such as 'cross'"),
    (dict(arch=dict(S1, depths=(1, 1, 1))), '4 ints'),
    (dict(arch=dict(S1, gate=1)), 'True or False'),
    (dict(arch=dict(S1, dt_rank='full')), "'auto' or an int"),
    (dict(arch=dict(S1, act='tanh')), "act.*'silu', 'gelu' or 'relu'"),
    (dict(arch=dict(S1, conv_kernel=2)), 'conv_kernel.*0 .no convolution. or an odd int'),
    (dict(arch=dict(S1, conv_kernel=None)), 'conv_kernel'),
    (dict(arch=dict(S1, ssm_init='ones')), "ssm_init.*'mamba', 'random' or 'zero'"),
    (dict(arch=dict(S1, mlp_ratio=0.01)), 'mlp_ratio.*no channel.*at least 1/.*0 for no MLP'),
    (dict(arch=dict(S1, ssm_ratio=0.01)), 'ssm_ratio.*no channel.*at least 1/'),
    (dict(arch=dict(S1, mlp_ratio=float('inf'))), 'mlp_ratio.*a number'),
    (dict(arch={**S1, 'dims': 3}), r"unknown keys \['dims'\]"),
    (dict(arch={k: v for k, v in S1.items() if k != 'gate'}), r"lacks \['gate'\]"),
    (dict(arch=dict(base='tiny')), "base.*'tiny' does not exist.*tiny_s1l8"),
    (dict(arch=dict(base=dict(S1))), 'base.*does not exist.*tiny_s1l8'),
    (dict(arch=dict(base='tiny_s1l8', depth=3)), r"unknown keys \['depth'\]"),
    (dict(arch=dict(base='tiny_s1l8', stem='swin')), r"stem.*'patch' or 'conv'"),
    (dict(out_indices=(4,)), 'out_indices'), (dict(out_indices=(1, 0)), 'out_indices'),
    (dict(frozen_stages=5), 'frozen_stages'), (dict(drop_path_rate=1.0), 'drop_path_rate'),
    (dict(in_channels=0), 'in_channels')], ids=lambda v: next(iter(v)) if isinstance(v, dict)
    else '')
def test_wrong_values_name_the_choices(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VMamba(**{'arch': S1, **kwargs})


@pytest.mark.parametrize('stem', ['conv', 'patch'])
@pytest.mark.parametrize(('images', 'in_channels'), [(1, 3), (4, 3), (3, 4)])
def test_images_of_other_channels(stem, images, in_channels):
    model = VMamba(dict(S1, stem=stem), in_channels=in_channels).eval()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(
                ValueError, match=f'to have {in_channels} channels, but got {images}.*in_channels'):
            model(torch.randn(1, images, 16, 16))


def test_building_and_running_is_quiet(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        VMamba(S1)(torch.randn(1, 3, 8, 8))
    assert capsys.readouterr() == ('', '')
