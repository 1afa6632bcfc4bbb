"""Models of tasks on clouds of points, for mmengine's Runner: classes and parts of objects."""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.ops.points import AUGMENTS, farthest_points, interpolate_points, take_points
from vmamba_mm.registry import MODELS

POOLS = 'avg', 'max', 'avg+max', 'cls+avg'
MODES = 'tensor', 'loss', 'predict'


@MODELS.register_module()
class PointPreprocessor(BaseDataPreprocessor):
    """Puts clouds on the device, samples their points there and changes them at random.

    Args:
        num_points: of a cloud, by farthest point sampling; in training so many random ones of
            ``pool`` that are sampled so, the same of all clouds of a batch. None keeps all points,
            of which those of a batch then have as many each.
        pool: at most so many; None for ``num_points``.
        augments: of a training, each ``dict(type='rotate', axis='y')``,
            ``dict(type='scale_shift', scale=(0.8, 1.25), shift=0.1, per_axis=False)`` or
            ``dict(type='jitter', std=0.01, clip=0.05)``, see ``vmamba_mm.ops.points.augment``.
        votes: in a test, so many views of a cloud, each sampled as in training and changed by
            ``vote_augments``; 0 for the cloud itself.
        vote_augments: as ``augments``.

    Raises:
        ValueError: on a value that is not allowed, with the choices.
    """

    def __init__(self, num_points: int | None = None, pool: int | None = None,
                 augments: Sequence[dict] = (), votes: int = 0,
                 vote_augments: Sequence[dict] = (dict(type='scale_shift'),)):
        super().__init__()
        if pool is not None and (num_points is None or pool < num_points):
            raise ValueError(f'pool={pool!r} must be at least num_points={num_points!r}')
        self.num_points, self.pool, self.votes = num_points, pool or num_points, votes
        self.augments, self.vote_augments = map(_make_augments, (augments, vote_augments))

    def forward(self, data: dict, training: bool = False) -> dict:
        """
        Args:
            data: ``inputs``, a list of (N, C) or (B, N, C), and ``data_samples``.

        Returns:
            ``inputs`` (B, N, C), or with ``votes`` (B, V, N, C), and ``data_samples``.

        Raises:
            UserError: on clouds of several sizes or of too few points, and on points that are not
                finite.
        """
        inputs = data['inputs']
        if not isinstance(inputs, Tensor):
            if len({cloud.shape for cloud in inputs}) > 1:
                sizes = ', '.join(str(len(cloud)) for cloud in inputs)
                raise UserError('the clouds of a batch must have as many points each, got '
                                f'{sizes}: sample them in the pipeline')
            inputs = torch.stack(list(inputs))
        finite = inputs.isfinite().flatten(1).all(1)
        if not finite.all():
            name = _name_of(data.get('data_samples'), int(finite.long().argmin()))
            raise UserError(f'{name} has points that are NaN or infinite: remove them')
        if self.num_points is not None and inputs.shape[1] < self.num_points:
            name = _name_of(data.get('data_samples'), 0)
            raise UserError(f'{name} has {inputs.shape[1]} points, and {self.num_points} are to be '
                            'sampled: leave it out, or take fewer num_points')
        data = self.cast_data(dict(inputs=inputs, data_samples=data.get('data_samples')))
        if training:
            data['inputs'] = self._draw(data['inputs'], self.augments)
        elif self.votes:
            data['inputs'] = torch.stack([self._draw(data['inputs'], self.vote_augments)
                                          for _ in range(self.votes)], 1)
        elif self.num_points is not None:
            data['inputs'] = _sample(data['inputs'], self.num_points)
        return data

    def _draw(self, points: Tensor, augments: Sequence) -> Tensor:
        if self.num_points is not None:
            pool = min(self.pool, points.shape[1])
            if pool < points.shape[1]:
                points = _sample(points, pool)
            points = points[:, torch.randperm(pool, device=points.device)[:self.num_points]]
        for augment in augments:
            points = augment(points)
        return points


def _name_of(samples: Sequence | None, number: int) -> str:
    """The file of a cloud, if its sample says it."""
    path = samples[number].get('path') if samples else None
    return path or 'a cloud'


def _sample(points: Tensor, num: int) -> Tensor:
    return take_points(points, farthest_points(points, num))


def _make_augments(augments: Sequence[dict]) -> list:
    made = []
    for settings in augments:
        options = {k: v for k, v in settings.items() if k != 'type'}
        if settings.get('type') not in AUGMENTS:
            raise ValueError(f"an augment's type={settings.get('type')!r} does not exist; choose "
                             f'one of {tuple(AUGMENTS)}')
        made.append(functools.partial(AUGMENTS[settings['type']], **options))
    return made


class PointModel(BaseModel):
    """What the models of clouds have in common: the modes of mmengine.

    A subclass gives :meth:`tensor`, :meth:`losses` and :meth:`fill`.
    """

    def __init__(self, data_preprocessor: dict | nn.Module | None = None,
                 init_cfg: dict | list[dict] | None = None):
        if not isinstance(data_preprocessor, nn.Module):
            data_preprocessor = MODELS.build(
                dict(type='vmamba_mm.PointPreprocessor') | (data_preprocessor or {}))
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)

    def forward(self, inputs: Tensor, data_samples: Sequence | None = None, mode: str = 'tensor'):
        """
        Args:
            inputs: (B, N, C), and to 'predict' of several views (B, V, N, C).
            data_samples: one for each cloud.
            mode: 'tensor' for what the model gives, 'loss' for a dict of losses, 'predict' for the
                samples with what was predicted.
        """
        if mode == 'tensor':
            return self.tensor(inputs, data_samples)
        if mode == 'loss':
            return self.losses(inputs, data_samples)
        if mode == 'predict':
            samples = data_samples or [BaseDataElement() for _ in inputs]
            self.fill(inputs, samples)
            return samples
        raise ValueError(f'mode={mode!r} does not exist; choose one of {MODES}')

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Depth of a parameter for layer-wise decay of the learning rate."""
        return self.backbone.get_layer_depth(param_name, 'backbone.')


@MODELS.register_module()
class PointHead(nn.Module):
    """The classifier of PointMamba: the tokens' mean, maximum or class token, and three layers.

    Args:
        in_channels: C.
        num_classes: of the logits.
        pool: 'avg' (published), 'max', 'avg+max' for both side by side, or 'cls+avg' for the class
            token, the last, beside the mean of all.
        hidden_dims: of the layers between.
        drop_rate: dropout after each of them.

    Shape: (B, T, C) -> (B, num_classes).

    Raises:
        ValueError: on another ``pool``.
    """

    def __init__(self, in_channels: int, num_classes: int, pool: str = 'avg',
                 hidden_dims: int = 256, drop_rate: float = 0.5):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f'pool={pool!r} does not exist; choose one of {POOLS}')
        self.pool, self.num_classes = pool, num_classes
        layers, dims = [], in_channels * len(pool.split('+'))
        for _ in range(2):
            layers += [nn.Linear(dims, hidden_dims), nn.BatchNorm1d(hidden_dims), nn.ReLU(),
                       nn.Dropout(drop_rate)]
            dims = hidden_dims
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(dims, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        pools = dict(avg=lambda: tokens.mean(1), max=lambda: tokens.max(1).values,
                     cls=lambda: tokens[:, -1])
        return self.fc(self.layers(torch.cat([pools[p]() for p in self.pool.split('+')], 1)))


@MODELS.register_module()
class PointClassifier(PointModel):
    """A backbone of clouds with ``out_type='raw'`` and a head: logits of a cloud.

    In a test the logits of all views of a cloud are averaged, before the softmax (voting).

    Args:
        backbone: such as :class:`vmamba_mm.models.PointMamba`.
        head: :class:`PointHead`.
        data_preprocessor: config of a :class:`PointPreprocessor`, its type by default.
        init_cfg: mmengine's.

    Shape: (B, N, C) -> (B, classes).
    """

    def __init__(self, backbone: dict | nn.Module, head: dict | nn.Module,
                 data_preprocessor: dict | None = None, init_cfg: dict | list[dict] | None = None):
        super().__init__(data_preprocessor, init_cfg)
        self.backbone, self.head = _build(backbone), _build(head)
        _need_tokens(self.backbone, type(self).__name__)

    def tensor(self, inputs: Tensor, data_samples: Sequence | None = None) -> Tensor:
        return self.head(self.backbone(inputs)[-1])

    def losses(self, inputs: Tensor, data_samples: Sequence) -> dict[str, Tensor]:
        labels = torch.stack([sample.gt_label for sample in data_samples]).flatten()
        logits = self(inputs).float()
        return dict(loss=F.cross_entropy(logits, labels),
                    accuracy=(logits.argmax(1) == labels).float().mean() * 100)

    def fill(self, inputs: Tensor, samples: Sequence) -> None:
        """Give each sample its ``pred_score`` (classes) and ``pred_label`` (1)."""
        views = inputs.unbind(1) if inputs.dim() == 4 else (inputs,)
        logits = sum(self(view).float() for view in views) / len(views)
        for sample, score in zip(samples, logits.softmax(1), strict=True):
            sample.pred_score, sample.pred_label = score, score.argmax(0, keepdim=True)


# --- parts ----------------------------------------------------------------------------------------

class FeaturePropagation(nn.Module):
    """Features of points from those of centres: interpolated, and two layers (PointNet++, arXiv
    1706.02413, section 3.4).

    Args:
        in_channels: of the centres' features.
        dims: channels after each layer.
        num_neighbors: centres that are interpolated between. The public code takes three of the
            centres in three orders, among which each is three times: that is the nearest one.

    Shape: features (B, G, in_channels), centres (B, G, 3), points (B, N, 3) -> (B, dims[-1], N).
    """

    def __init__(self, in_channels: int, dims: Sequence[int], num_neighbors: int = 1):
        super().__init__()
        self.num_neighbors = num_neighbors
        widths = [in_channels + 3, *dims]
        self.convs = nn.ModuleList(nn.Conv1d(*pair, 1) for pair in
                                   zip(widths[:-1], widths[1:], strict=True))
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim) for dim in dims)

    def forward(self, features: Tensor, centres: Tensor, points: Tensor) -> Tensor:
        near = interpolate_points(features, centres, points.to(centres.dtype), self.num_neighbors)
        x = torch.cat([points.to(near.dtype), near], 2).transpose(1, 2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return x


@MODELS.register_module()
class PartSegHead(nn.Module):
    """The decoder of PointMamba's segmentation of parts: logits of each point.

    Each point gets the features of the nearest centre, the mean over the orders that the centre's
    token is in; beside them, the maximum and mean of all tokens, and the category of the object.

    Args:
        in_channels: C of each of the backbone's outputs.
        num_classes: parts, of all categories together.
        num_categories: of objects.
        num_neighbors: as of :class:`FeaturePropagation`.
        drop_rate: dropout before the last layers.

    Shape: what :meth:`vmamba_mm.models.PointMamba.encode` returns, points (B, N, 3) and categories,
    (B) numbers or (B, num_categories), to (B, N, num_classes).
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, num_categories: int = 16,
                 num_neighbors: int = 1, drop_rate: float = 0.5):
        super().__init__()
        dims = sum(in_channels)
        self.num_categories = num_categories
        self.label_conv = nn.Sequential(nn.Conv1d(num_categories, 64, 1, bias=False),
                                        nn.BatchNorm1d(64), nn.LeakyReLU(0.2))
        self.propagation = FeaturePropagation(dims, (4 * in_channels[0], 1024), num_neighbors)
        self.convs = nn.ModuleList([nn.Conv1d(1024 + 2 * dims + 64, 512, 1),
                                    nn.Conv1d(512, 256, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(512), nn.BatchNorm1d(256)])
        self.drop = nn.Dropout(drop_rate)
        self.conv_seg = nn.Conv1d(256, num_classes, 1)

    def forward(self, encoded, points: Tensor, categories: Tensor) -> Tensor:
        tokens = torch.cat(encoded.features, 2)
        if categories.dim() == 1:
            categories = F.one_hot(categories, self.num_categories)
        label = self.label_conv(categories.to(tokens.dtype).unsqueeze(2))
        whole = torch.cat([tokens.max(1).values.unsqueeze(2), tokens.mean(1).unsqueeze(2), label],
                          1)
        local = self.propagation(_by_centre(tokens, encoded.orders), encoded.centres,
                                 points[..., :3])
        # What is of the whole cloud is the same for all points: its part of the layer runs once.
        conv = self.convs[0]
        own, shared = conv.weight.split([local.shape[1], whole.shape[1]], 1)
        x = F.conv1d(local, own) + F.conv1d(whole, shared, conv.bias)
        x = self.drop(F.relu(self.norms[0](x)))
        x = F.relu(self.norms[1](self.convs[1](x)))
        return self.conv_seg(x).transpose(1, 2)


def _by_centre(tokens: Tensor, orders: Tensor) -> Tensor:
    """Tokens (B, K G, C), and one more of the class, in K orders (B, K, G): the mean of those of
    each group (B, G, C)."""
    batch, count, size = orders.shape
    tokens = tokens[:, :count * size].unflatten(1, (count, size))
    parts = [take_points(part, order.argsort(1)) for part, order in
             zip(tokens.unbind(1), orders.unbind(1), strict=True)]
    return sum(parts) / count


@MODELS.register_module()
class PointSegmentor(PointModel):
    """A backbone of clouds and a decoder of parts: logits of each point.

    Args:
        backbone: such as :class:`vmamba_mm.models.PointMamba`.
        decode_head: :class:`PartSegHead`.
        data_preprocessor: config of a :class:`PointPreprocessor`, its type by default, that samples
            no points: each keeps its place, as the parts have theirs.
        init_cfg: mmengine's.

    Shape: (B, N, C), with the categories of the objects, to (B, N, parts). In a test the logits of
    all views of a cloud, which are of the same points in the same order, are averaged.

    Raises:
        ValueError: on a preprocessor with ``num_points``.
    """

    def __init__(self, backbone: dict | nn.Module, decode_head: dict | nn.Module,
                 data_preprocessor: dict | None = None, init_cfg: dict | list[dict] | None = None):
        super().__init__(data_preprocessor, init_cfg)
        num = getattr(self.data_preprocessor, 'num_points', None)
        if num is not None:
            raise ValueError(f'data_preprocessor.num_points={num} would take points apart from '
                             'their parts: leave it out, and sample both in the pipeline, by '
                             f'SamplePoints(num={num})')
        self.backbone, self.decode_head = _build(backbone), _build(decode_head)

    def tensor(self, inputs: Tensor, data_samples: Sequence | Tensor | None = None) -> Tensor:
        """
        Args:
            inputs: (B, N, C).
            data_samples: with ``category`` (1), or the categories themselves, (B) or
                (B, num_categories).
        """
        if not isinstance(data_samples, Tensor):
            if data_samples is None:
                raise UserError('the segmentation of parts needs the category of each object')
            data_samples = torch.stack([sample.category for sample in data_samples]).flatten()
        return self.decode_head(self.backbone.encode(inputs), inputs, data_samples)

    def losses(self, inputs: Tensor, data_samples: Sequence) -> dict[str, Tensor]:
        labels = torch.stack([sample.gt_parts for sample in data_samples])
        logits = self(inputs, data_samples).float()
        return dict(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    def fill(self, inputs: Tensor, samples: Sequence) -> None:
        """Give each sample its ``pred_scores`` (N, parts), logits."""
        views = inputs.unbind(1) if inputs.dim() == 4 else (inputs,)
        logits = sum(self(view, samples).float() for view in views) / len(views)
        for sample, scores in zip(samples, logits, strict=True):
            sample.pred_scores = scores


def _build(part: dict | nn.Module) -> nn.Module:
    return part if isinstance(part, nn.Module) else MODELS.build(part)


def _need_tokens(backbone: nn.Module, name: str) -> None:
    if getattr(backbone, 'out_type', 'raw') != 'raw':
        raise ValueError(f"{name} needs out_type='raw' of its backbone, got "
                         f'{backbone.out_type!r}')
