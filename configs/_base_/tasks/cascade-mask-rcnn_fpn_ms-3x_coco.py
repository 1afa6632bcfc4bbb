# Cascade Mask R-CNN + FPN on COCO, 36 epochs with the multi-scale crops of DETR, as Swin's authors
# have it: boxes from four shared convolutions, regressed with GIoU on decoded boxes.
_base_ = ['./mask-rcnn_fpn_ms-3x_coco.py']

head = dict(
    type='Shared4Conv1FCBBoxHead', in_channels=256, conv_out_channels=256, fc_out_channels=1024,
    roi_feat_size=7, num_classes=80, reg_class_agnostic=False, reg_decoded_bbox=True,
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    bbox_coder=dict(
        type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.],
        target_stds=[0.1, 0.1, 0.2, 0.2]),
    loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
heads = [dict(head, bbox_coder=dict(head['bbox_coder'], target_stds=std)) for std in stds]
rcnns = [dict(
    assigner=dict(
        type='MaxIoUAssigner', pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou,
        match_low_quality=False, ignore_iof_thr=-1),
    sampler=dict(
        type='RandomSampler', num=512, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
    mask_size=28, pos_weight=-1, debug=False) for iou in (0.5, 0.6, 0.7)]
model = dict(
    type='CascadeRCNN',
    roi_head=dict(
        type='CascadeRoIHead', num_stages=3, stage_loss_weights=[1, 0.5, 0.25], bbox_head=heads),
    train_cfg=dict(rpn_proposal=dict(nms_pre=2000, max_per_img=2000), rcnn=rcnns))
del head, stds, heads, rcnns
