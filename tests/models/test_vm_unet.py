"""VM-UNet: its skips and sizes, starting from a VMamba, and its loss and masks."""

import copy
import json

import pytest
import torch
from official import shared
from specs import SPECS
from torch import nn

from vmamba_mm.checkpoints.files import read_checkpoint
from vmamba_mm.errors import UserError
from vmamba_mm.families import family_of
from vmamba_mm.heads import DiceLoss
from vmamba_mm.layers import MergeDownsample, PatchExpand
from vmamba_mm.models import VMamba, VMUNet
from vmamba_mm.testing import Segmentor

SPEC = SPECS['vm_unet']
FOUR = SPEC.archs['four']
VANILLA = dict(base='vanilla_small', embed_dims=8, depths=(2, 2, 3, 2), d_state=2)


# --- sizes --------------------------------------------------------------------------------------

@pytest.mark.parametrize('arch, count', [('l2', 27427561), ('l9', 44273833)])
def test_parameters_are_those_of_the_public_code(arch, count):
    with torch.device('meta'):
        model = Segmentor(VMUNet(arch), 1)
    assert sum(p.numel() for p in model.parameters()) == count


def test_expanding_undoes_merging():
    """Rows of a patch come before its columns, and its channels last."""
    expand = PatchExpand(4)
    expand.norm = nn.Identity()
    expand.expand.weight.data = torch.eye(4).repeat(2, 1)  # (p1, p2, c) from the 4 channels, twice
    x = torch.randn(1, 2, 3, 4)
    y = expand(x)
    assert y.shape == (1, 4, 6, 2)
    for row in range(2):
        for column in range(2):
            assert torch.equal(y[:, row::2, column::2], x[..., :2] if column == 0 else x[..., 2:])
    assert PatchExpand(8, 4)(torch.randn(1, 2, 3, 8)).shape == (1, 8, 12, 2)


def test_merging_of_odd_maps():
    crop, x = MergeDownsample(3, odd='crop'), torch.randn(1, 5, 7, 3)
    torch.testing.assert_close(crop(x), crop(x[:, :4, :6]))
    with pytest.raises(ValueError, match="odd='floor' does not exist; choose 'pad' or 'crop'"):
        MergeDownsample(3, odd='floor')


def test_skips():
    """The decoder adds what each stage of the encoder but the first was given."""
    model, given = SPEC.random_model(), {}
    hooks = [stage.register_forward_pre_hook(lambda _, args, i=i: given.update({i: args[0]}))
             for i, stage in enumerate(model.stages)]
    maps = model.forward_stages(torch.randn(1, 3, 64, 32), range(8))
    for hook in hooks:
        hook.remove()
    assert torch.equal(given[4], maps[3])
    for i in (5, 6, 7):
        torch.testing.assert_close(given[i], maps[i - 1] + given[8 - i])
    assert maps[-1].shape == (1, 64, 32, 2)


def test_images_of_any_size_and_of_one_channel():
    model, x = SPEC.random_model(), torch.randn(1, 3, 40, 33)
    padded = torch.zeros(1, 3, 64, 64)
    padded[..., :40, :33] = x
    assert model(x)[0].shape == (1, 2, 40, 33)
    torch.testing.assert_close(model(x)[0], model(padded)[0][..., :40, :33])
    grey = x[:, :1]
    assert torch.equal(model(grey)[0], model(grey.expand(-1, 3, -1, -1))[0])


# --- starting from a VMamba ---------------------------------------------------------------------

@pytest.fixture
def vmamba(tmp_path):
    """A vanilla VMamba with more blocks, and its file by the older official names."""
    model = SPECS['vmamba'].random_model(VMamba(VANILLA).arch, out_indices=(3,))
    states = SPECS['vmamba'].official_classifiers(model, 7)
    path = tmp_path / 'vmamba.pth'
    torch.save(dict(model=states[-1]), path)
    return model, path, states


def test_both_halves_start_from_a_vmamba(vmamba, tmp_path):
    source, path, states = vmamba
    for i, state in enumerate([*states, source.state_dict()]):
        torch.save(dict(model=state), path)
        model = VMUNet(FOUR, init_cfg=dict(type='Pretrained', checkpoint=str(path),
                                           from_vmamba=True))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.init_weights()
        ours, theirs, taken = model.state_dict(), source.state_dict(), 0
        for name, value in ours.items():
            stage, rest = name.split('.')[1], name.split('.', 2)[-1]
            if name.startswith('stages.') and int(stage) > 3:
                name = f'stages.{7 - int(stage)}.{rest}'
            is_new = 'upsample' in name or name.startswith('final_up')
            taken += not is_new
            expected = before[name] if name.startswith('final_up') else \
                before[f'stages.{stage}.{rest}'] if is_new else theirs[name]
            assert torch.equal(value, expected), (i, name)
        assert taken == len(ours) - 3 * 3 - 3


def test_the_public_codes_map():
    """Of each weight that it takes, where one is at hand."""
    path = shared('parity/vm_unet/vmamba_init.json')
    content = json.loads(path.read_text())
    model = VMUNet(dict(embed_dims=2, depths=(2, 2, 2, 2), decoder_depths=(2, 2, 2, 1), d_state=3))
    was, = SPEC.official(copy.deepcopy(model))
    model.load_pretrained(str(path.with_suffix('.pth')), from_vmamba=True)
    official, = SPEC.official(model)
    held = torch.load(path.with_suffix('.pth'), weights_only=True)['model']
    for name, source in content['source'].items():
        name = name.removeprefix('vmunet.')
        if name in official:
            assert torch.equal(official[name], was[name] if source is None else held[source]), name


@pytest.mark.parametrize('change, message', [
    (dict(embed_dims=12), r'is \(12,.*in the model \(8,'),
    (dict(depths=(2, 1, 1, 1)), r'stages.1.blocks.1.* is missing'),
    (dict(d_state=3), 'in the model'),
    (dict(stem='conv', downsample='conv'), 'patch_embed.proj.weight is missing')])
def test_another_vmamba_is_refused(change, message, tmp_path):
    path = tmp_path / 'a.pth'
    torch.save(VMamba(dict(VANILLA, **change)).state_dict(), path)
    model = VMUNet(FOUR)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=f'a.pth holds no vanilla VMamba.*{message}.*Take one with'):
        model.load_pretrained(str(path), from_vmamba=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_vmamba_is_no_vmunet(vmamba):
    """Nor the other way round; nobody starts from one who has not said so."""
    source, path, states = vmamba
    for state in (*states, source.state_dict()):
        assert family_of(state).name == 'vmamba'
    with pytest.raises(UserError):
        VMUNet(FOUR).load_pretrained(str(path))
    whole, = SPEC.official_classifiers(SPEC.random_model(), 1)
    encoder = {k: v for k, v in whole.items() if '_up' not in k and 'final' not in k}
    assert family_of(whole).name == 'vm_unet'
    assert family_of({k.removeprefix('vmunet.'): v for k, v in encoder.items()}).name == 'vmamba'
    torch.save(whole, path)
    with pytest.raises(UserError):
        VMamba(VANILLA).load_pretrained(str(path))


@pytest.mark.parametrize('key', ['', 'model_state_dict'])
@pytest.mark.parametrize('keep_places', [False, True])
def test_official_files(key, keep_places, tmp_path):
    """Bare, and as the trainer's latest.pth; mmengine, which asks to keep places, gets ours too."""
    model = SPEC.random_model()
    state, = SPEC.official_classifiers(model, 3)
    state |= {'vmunet.total_ops': torch.zeros(1)}  # of a profiler
    torch.save({key: state, 'epoch': 3} if key else state, tmp_path / 'best.pth')
    found = read_checkpoint(tmp_path / 'best.pth', keep_places=keep_places)
    segmentor = Segmentor(VMUNet(FOUR), 3)
    segmentor.load_state_dict(found['state_dict'])
    assert found['meta']['task'] == 'seg' and found['meta']['arch'] == FOUR
    for name, value in model.state_dict().items():
        assert torch.equal(segmentor.backbone.state_dict()[name], value)


# --- loss ---------------------------------------------------------------------------------------

def test_dice_of_two_classes_as_published():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 1, 4, 5).double(), torch.randint(0, 2, (3, 4, 5))
    p, t = logits.sigmoid().flatten(1), target.flatten(1)
    expected = 1 - ((2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()
    torch.testing.assert_close(DiceLoss()(logits, target), expected.float())
    # A perfect prediction has none, and the opposite has nearly all.
    sure = (target[:, None] * 2.0 - 1) * 30
    assert DiceLoss()(sure, target) < 1e-4 and DiceLoss()(-sure, target) > 0.9
    assert DiceLoss()(torch.full((1, 1, 4, 5), -30.0), torch.zeros(1, 4, 5).long()) < 1e-4


def test_dice_of_several_classes_as_published():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 3, 5))
    p, expected = logits.softmax(1), 0.0
    for c in range(4):
        q, t = p[:, c], (target == c).float()
        expected += 1 - (2 * (q * t).sum() + 1e-5) / ((q * q).sum() + (t * t).sum() + 1e-5)
    loss = DiceLoss(per_image=False, squared=True, smooth=1e-5, loss_weight=2.0)
    torch.testing.assert_close(loss(logits, target), expected / 4 * 2)


def test_dice_leaves_pixels_out():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 4, 6))
    loss, part = DiceLoss(), DiceLoss()(logits[..., :4], target[..., :4])
    ignored = target.clone()
    ignored[..., 4:] = 255
    torch.testing.assert_close(loss(logits, ignored), part)
    weight = torch.ones(2, 4, 6)
    weight[..., 4:] = 0
    torch.testing.assert_close(loss(logits, target, weight), part)
