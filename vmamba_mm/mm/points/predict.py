"""Classes and parts of clouds as files, for tools/predict.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vmamba_mm.config import type_name
from vmamba_mm.errors import UserError
from vmamba_mm.mm.cli.images import KEY, sign, signature
from vmamba_mm.mm.figures import class_name, draw_classes, draw_shares
from vmamba_mm.mm.hooks.data import seed_all
from vmamba_mm.mm.inputs import build_steps
from vmamba_mm.mm.points.draw import picture_of
from vmamba_mm.mm.points.metrics import SHAPENET_PARTS, part_ranges
from vmamba_mm.mm.points.transforms import LoadPoints, PackPoints, SamplePoints


class CloudReader:
    """A cloud of a file as the test pipeline of a config makes it.

    Args:
        cfg: the config.
    """

    def __init__(self, cfg: Any):
        self.steps = build_steps(cfg)
        if not any(isinstance(step, LoadPoints) for step in self.steps):
            raise UserError('the test pipeline has no step that loads a cloud, such as '
                            'vmamba_mm.LoadPoints')
        for step in self.steps:
            if isinstance(step, LoadPoints):
                step.part_column = None  # a file to predict has no parts yet

    def __call__(self, path: Path) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """The points of the file, (M, C), what the pipeline makes of them, (M, C), and those that
        it samples, (N, C).

        They are sampled at the end, so that all are at one scale, and the same ones each time.
        """
        results: dict[str, Any] = dict(path=str(path))
        loaded, samplers = None, []
        for step in self.steps:
            if isinstance(step, SamplePoints):
                samplers.append(step)
            elif not isinstance(step, PackPoints):
                results = step(results)
                loaded = results['points'] if loaded is None else loaded
        points = results['points']
        seed_all(0, cuda=False)
        for step in samplers:
            results = step(results)
        return loaded, torch.from_numpy(points), torch.from_numpy(results['points'])


class Classifier:
    """The class of a cloud, beside a picture of it.

    Args:
        model: :class:`vmamba_mm.heads.PointClassifier`.
        cfg: its config, whose test pipeline reads the file.
        meta: of the data set, with the names of the classes.
    """

    done = 'predicted'
    suffixes = ('.png',)

    def __init__(self, model: nn.Module, cfg: Any, meta: Mapping[str, Any]):
        self.model, self.read, self.meta = model, CloudReader(cfg), meta

    def __call__(self, path: Path, out: Path, place: str) -> str:
        loaded, _, sampled = self.read(path)
        with torch.no_grad():
            score = self.model.test_step(dict(inputs=[sampled]))[0].pred_score
        # Names of another set of classes would be wrong ones.
        known = len(self.meta.get('classes') or ()) == len(score)
        text = draw_classes(picture_of(loaded), score, self.meta if known else {}, out)
        sign(out, path)
        return text


class PartSegmentor:
    """The part of each point of a cloud: a picture, and a PLY file with the points of the file.

    The model sees as many points as in a test; from their features all points get a part.

    Args:
        model: :class:`vmamba_mm.heads.PointSegmentor`.
        cfg: its config, whose test pipeline reads the file, and whose metric has the categories.
        meta: of the data set, with names of the parts if it has any.
        category: of the objects, a name.

    Raises:
        UserError: on another category, with the list, and on categories that are not the model's.
    """

    done = 'predicted'
    suffixes = ('.png', '.ply')

    def __init__(self, model: nn.Module, cfg: Any, meta: Mapping[str, Any],
                 category: str | None = None):
        self.model, self.read, self.meta = model, CloudReader(cfg), meta
        parts = _parts_of(cfg)
        head = model.decode_head
        wanted = head.num_categories, head.conv_seg.out_channels
        if (len(parts), sum(parts.values())) != wanted:
            raise UserError(f'the model has {wanted[0]} categories and {wanted[1]} parts, and the '
                            f'metric PartIoU {len(parts)} and {sum(parts.values())}: set parts= of '
                            'PartIoU in test_evaluator')
        if category not in parts:
            given = 'needs' if category is None else f'has no {category!r}:'
            raise UserError(f'--category: a model of parts {given} the category of the objects, '
                            f'one of {", ".join(parts)}')
        if model.data_preprocessor.votes:
            raise UserError('views are averaged in a test alone: predict.py needs '
                            'model.data_preprocessor.votes=0 of a model of parts')
        self.category = list(parts).index(category)
        self.own = part_ranges(parts)[category]

    def __call__(self, path: Path, out: Path, place: str) -> str:
        loaded, points, sampled = self.read(path)
        labels = self.label(points, sampled)
        palette = np.zeros((self.own.stop, 3))
        palette[self.own.start:] = _colours(len(self.own))
        colours = palette[labels]
        write_ply(out.with_suffix('.ply'), loaded[:, :3], labels, colours, signature(path))
        text = draw_shares(picture_of(loaded, colours), labels, self._name, palette,
                           'share of the points', out)
        sign(out, path)
        return f'{len(labels)} points, {text}'

    def label(self, points: torch.Tensor, sampled: torch.Tensor) -> np.ndarray:
        """The parts (M) of points (M, C), of the features of those that were sampled (N, C)."""
        model = self.model
        with torch.no_grad():
            seen = model.data_preprocessor(dict(inputs=[sampled]))['inputs']
            category = torch.tensor([self.category], device=seen.device)
            encoded = model.backbone.encode(seen)
            parts = [model.decode_head(encoded, chunk[None].to(seen), category)[0].float().cpu()
                     for chunk in points.split(8192)]
        own = torch.cat(parts)[:, self.own.start:self.own.stop]
        return own.argmax(1).numpy() + self.own.start

    def _name(self, part):
        return class_name(self.meta, part) if self.meta.get('classes') else f'part {part}'


def _parts_of(cfg):
    """The categories of a config's metric with the number of their parts."""
    evaluators = cfg.get('test_evaluator') or ()
    evaluators = [evaluators] if isinstance(evaluators, dict) else evaluators
    own = next((e.get('parts') for e in evaluators if type_name(e) == 'PartIoU'), None)
    return dict(own or SHAPENET_PARTS)


def _colours(count):
    """Colours that are told apart, (count, 3) from 0 to 255."""
    import matplotlib

    table = matplotlib.colormaps['tab10' if count <= 10 else 'gist_rainbow']
    places = np.arange(count) if count <= 10 else np.linspace(0, 1, count)
    return (table(places)[:, :3] * 255).round()


def write_ply(path: Path, points: np.ndarray, parts: np.ndarray, colours: np.ndarray,
              source: str) -> None:
    """Write a cloud as ASCII PLY: x, y, z, red, green, blue and the number of the part.

    Args:
        path: of the file.
        points, parts, colours: (N, 3), (N) and (N, 3) from 0 to 255.
        source: what it was made from, which becomes a comment.
    """
    names = [f'property {kind} {name}' for kind, name in (
        *(('float', axis) for axis in 'xyz'),
        *(('uchar', colour) for colour in ('red', 'green', 'blue')), ('int', 'part'))]
    header = ['ply', 'format ascii 1.0', f'comment {KEY}: {source}',
              f'element vertex {len(points)}', *names, 'end_header']
    table = np.column_stack([points, colours, parts])
    np.savetxt(path, table, fmt=['%.7g'] * 3 + ['%d'] * 4, header='\n'.join(header), comments='',
               encoding='utf-8')
