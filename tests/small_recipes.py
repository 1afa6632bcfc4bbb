"""Published recipes: their rates and decay, and with a small model for tests that train a step."""

import copy
import re

from specs import SPECS

#: Pixels of an image of :func:`batch_of`.
SIZE = 64


def make_small(cfg, arch=None, num_classes=5):
    """The config with the first small architecture of its family, or another, and few classes."""
    cfg = copy.deepcopy(cfg)
    arch = arch or SPECS[cfg.model.backbone.type.removeprefix('vmamba_mm.').lower()].first
    # mmengine takes the key out of a dict that it merges.
    cfg.model.backbone.update(arch=dict(arch), init_cfg=None)
    cfg.model.head.update(in_channels=arch['embed_dims'], num_classes=num_classes)
    cfg.data_preprocessor.num_classes = num_classes
    return cfg


def settings_of(model, cfg):
    """{name of a parameter: (factor of the rate, decay)} as the optimizer has them, and that."""
    from mmengine.optim import build_optim_wrapper

    optim_cfg = copy.deepcopy(cfg.optim_wrapper)
    optim_cfg.type = 'OptimWrapper'  # the Amp one refuses a machine without a GPU
    for key in ('dtype', 'loss_scale'):
        optim_cfg.pop(key, None)
    wrapper = build_optim_wrapper(model, optim_cfg)
    of_id = {id(p): (group['lr'] / cfg.optim_wrapper.optimizer.lr, group['weight_decay'])
             for group in wrapper.optimizer.param_groups for p in group['params']}
    return {name: of_id[id(p)] for name, p in model.named_parameters()}, wrapper


def learning_rates(cfg, epoch_length, total):
    """The learning rate of every iteration, stepped as mmengine's ParamSchedulerHook does."""
    import torch
    from mmengine.registry import PARAM_SCHEDULERS
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)],
                                lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for item in cfg.param_scheduler:
        assert 'end' in item
        schedulers.append(PARAM_SCHEDULERS.build(
            item, default_args=dict(optimizer=optimizer, epoch_length=epoch_length)))
    optimizer.step()  # torch warns about a scheduler that steps first
    found = []
    for i in range(1, total + 1):
        found.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            if not scheduler.by_epoch or i % epoch_length == 0:
                scheduler.step()
    return found


def batch_of(scope, num_classes=150):
    """Two images of SIZE pixels with what the task asks of them, for a model of that scope."""
    import torch
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    if scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs
        return demo_mm_inputs(2, (3, SIZE, SIZE), num_items=[2, 3], num_classes=80, with_mask=True)
    if scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample
        labels = torch.randint(0, num_classes, (1, SIZE, SIZE))
        return dict(inputs=list(images), data_samples=[SegDataSample(
            gt_sem_seg=PixelData(data=labels), metainfo=dict(
                img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE))) for _ in images])
    from mmpretrain.structures import DataSample
    return dict(inputs=images, data_samples=[DataSample().set_gt_label(i) for i in (3, 7)])


def narrow_heads(cfg, channels):
    """Make a classifier, a detector or a segmentor narrow, for a backbone with maps of ``channels``
    and images of SIZE pixels; of a pyramid with one map these are those of the pyramid."""
    model = cfg.model
    if cfg.default_scope == 'mmpretrain':
        model.head.in_channels = channels[-1]
        model.data_preprocessor = dict(type='ClsDataPreprocessor', **cfg.data_preprocessor)
    elif cfg.default_scope == 'mmdet':
        narrow_detector(model, channels)
    else:
        if model.decode_head.type == 'FPNHead':
            model.neck.update(in_channels=channels, out_channels=16)
            model.decode_head.update(in_channels=[16] * 4, channels=16)
        else:
            model.decode_head.update(in_channels=channels, channels=16)
            model.auxiliary_head.update(in_channels=channels[2], channels=16)
        model.data_preprocessor.size = (SIZE, SIZE)


def narrow_detector(model, channels):
    """16 channels in neck and heads, Cascade's and RetinaNet's too."""
    maps = model.neck.in_channels
    model.neck.update(in_channels=channels[-1] if isinstance(maps, int) else channels[-len(maps):],
                      out_channels=16)
    if model.type == 'RetinaNet':
        model.bbox_head.update(in_channels=16, feat_channels=16)
        return
    model.rpn_head.update(in_channels=16, feat_channels=16)
    heads = model.roi_head
    for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        part.out_channels = 16
    for head in heads.bbox_head if isinstance(heads.bbox_head, list) else [heads.bbox_head]:
        head.update(in_channels=16, fc_out_channels=32)
        if 'conv_out_channels' in head:
            head.conv_out_channels = 16
    heads.mask_head.update(in_channels=16, conv_out_channels=16)
    model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 20


def take_a_step(cfg, narrowed, behind_zeros=None, num_classes=150):
    """Build the model that ``narrowed(cfg)`` gives, train a step that moves all weights of the
    backbone but for those ``behind_zeros``, a regular expression, and predict; ``num_classes`` are
    those of a segmentor's labels."""
    import torch
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS

    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(narrowed(cfg))).train()
    _, optim_wrapper = settings_of(model, cfg)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    log = model.train_step(batch_of(cfg.default_scope, num_classes), optim_wrapper)
    assert all(value.isfinite().all() for value in log.values())
    for name, p in model.backbone.named_parameters():
        is_still = behind_zeros is not None and re.search(behind_zeros, name)
        assert p.isfinite().all() and (is_still or not torch.equal(p, before[name])), name
    with torch.no_grad():
        assert len(model.eval().test_step(batch_of(cfg.default_scope))) == 2
