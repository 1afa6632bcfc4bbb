"""`type='vmamba_mm.VMamba'` in stock mmdet, mmseg and mmpretrain configs, three lines each."""
import re

import pytest

ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1), d_state=1, ssm_ratio=1.0, dt_rank='auto',
            conv_bias=False, gate=False, mlp_ratio=2.0, stem='conv', downsample='conv',
            scan='cross')
VANILLA = dict(ARCH, d_state=4, ssm_ratio=2.0, conv_bias=True, gate=True, mlp_ratio=0,
               stem='patch', downsample='merge')
CHANNELS = [16, 32, 64, 128]
SIZE = (72, 104)  # height and width, no multiples of the stride

# stock config, what a user writes beside the backbone, output norms that the model leaves unused
STOCK = {
    'mask-rcnn': ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
                  f'neck=dict(in_channels={CHANNELS})', ()),
    'cascade-rcnn': ('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
                     f'neck=dict(in_channels={CHANNELS})', ()),
    'cascade-mask-rcnn': ('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py',
                          f'neck=dict(in_channels={CHANNELS})', ()),
    # RetinaNet's FPN starts at the second map.
    'retinanet': ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
                  f'neck=dict(in_channels={CHANNELS})', (0, )),
    'upernet': ('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py',
                f'pretrained=None, decode_head=dict(in_channels={CHANNELS}), '
                f'auxiliary_head=dict(in_channels={CHANNELS[2]})', ()),
    'segformer': ('mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
                  f'decode_head=dict(in_channels={CHANNELS})', ()),
    # FCN reads the last two maps.
    'fcn': ('mmseg::fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py',
            f'pretrained=None, decode_head=dict(in_channels={CHANNELS[3]}), '
            f'auxiliary_head=dict(in_channels={CHANNELS[2]})', (0, 1)),
    'resnet-classifier': ('mmpretrain::resnet/resnet50_8xb32_in1k.py',
                          f'head=dict(in_channels={CHANNELS[3]})', (0, 1, 2)),
    'swin-classifier': ('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
                        f'head=dict(in_channels={CHANNELS[3]})', (0, 1, 2)),
}


def write_config(folder, name, delete=True, arch=ARCH):
    base, rest, _ = STOCK[name]
    path = folder / 'config.py'
    path.write_text(
        f"_base_ = '{base}'\n"
        f"model = dict(backbone=dict({'_delete_=True, ' if delete else ''}"
        f"type='vmamba_mm.VMamba', arch={arch!r}), {rest})\n")
    return path


def build(cfg):
    """The model, ready to train on this machine."""
    import torch
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS
    torch.manual_seed(0)
    if cfg.default_scope == 'mmpretrain':  # the Runner does this for every mmpretrain config
        cfg.model.setdefault('data_preprocessor',
                             dict(type='ClsDataPreprocessor', **cfg.data_preprocessor))
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = SIZE  # its 512 x 512 padding takes most of the time
    model = MODELS.build(cfg.model)
    model.init_weights()
    return revert_sync_batchnorm(model).train()


def batch_for(cfg):
    """Two random training images with their labels."""
    import torch
    rng = torch.Generator().manual_seed(0)
    height, width = SIZE
    images = list(torch.randint(0, 256, (2, 3, height, width), generator=rng, dtype=torch.uint8))
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs
        return demo_mm_inputs(2, (3, height, width), num_items=[2, 3], num_classes=80,
                              with_mask='mask_head' in str(cfg.model))
    if cfg.default_scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        labels = torch.randint(0, 150, (1, height, width), generator=rng)
        samples = [
            SegDataSample(gt_sem_seg=PixelData(data=labels),
                          metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
            for _ in images
        ]
    else:
        from mmpretrain.structures import DataSample
        samples = [DataSample().set_gt_label(i) for i in range(2)]
        images = torch.stack(images)
    return dict(inputs=images, data_samples=samples)


def test_roi_align_sees_the_right_pixels(tmp_path, read_config):
    """mmcv's RoIAlign ignores strides: it must never be handed a channels-last map."""
    import torch
    from mmcv.ops import roi_align
    cfg = read_config(write_config(tmp_path, 'mask-rcnn'))
    model = build(cfg)
    rois = torch.tensor([[0.0, 4.0, 8.0, 60.0, 50.0]])
    for level in model.extract_feat(torch.randn(2, 3, *SIZE)):
        packed = level.clone(memory_format=torch.contiguous_format)
        torch.testing.assert_close(roi_align(level, rois, (7, 7)), roi_align(packed, rois, (7, 7)))


@pytest.mark.parametrize('name', STOCK)
def test_forward_backward(name, tmp_path, read_config):
    import torch
    arch = VANILLA if name in ('mask-rcnn', 'upernet', 'swin-classifier') else ARCH
    cfg = read_config(write_config(tmp_path, name, arch=arch))
    model = build(cfg)
    assert type(model.backbone).__module__.startswith('vmamba_mm.')

    data = model.data_preprocessor(batch_for(cfg), training=True)
    loss, log = model.parse_losses(model(**data, mode='loss'))
    assert torch.isfinite(loss), log
    loss.backward()

    unused = tuple(f'norm{i}.' for i in STOCK[name][2])
    for key, param in model.backbone.named_parameters():
        if key.startswith(unused):
            assert param.grad is None, key
        else:
            assert param.grad is not None, key
            assert torch.isfinite(param.grad).all(), key
            assert param.grad.abs().max() > 0, key

    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(batch_for(cfg)), mode='predict')
    assert len(results) == 2


@pytest.mark.parametrize('name, leftover', [
    ('mask-rcnn', 'depth'),
    ('segformer', 'num_heads'),
    ('swin-classifier', 'img_size'),
])
def test_leftover_key_is_refused(name, leftover, tmp_path, read_config):
    """Merging onto the old backbone without _delete_ says which keys, and what to write."""
    from mmengine.registry import MODELS
    cfg = read_config(write_config(tmp_path, name, delete=False, arch='tiny_s1l8'))
    assert leftover in cfg.model.backbone
    with pytest.raises((TypeError, ValueError), match=re.escape('_delete_=True')) as error:
        MODELS.build(cfg.model)
    assert f"'{leftover}'" in str(error.value)
