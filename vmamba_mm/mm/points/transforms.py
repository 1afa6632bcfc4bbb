"""Steps of a pipeline of clouds, between which a sample has ``points``, (N, C) in fp32.

What changes points at random, and farthest point sampling, come after them, on the device and for a
whole batch: :class:`vmamba_mm.heads.PointPreprocessor`.
"""

from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement

from vmamba_mm.errors import UserError
from vmamba_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadPoints:
    """Read the file ``path`` of a sample, text with a point in each line or NumPy's ``.npy``.

    A sample that has ``points`` already, of a file with all of a data set, keeps them.

    Args:
        columns: how many of the file's become the ``points``: x, y and z, or normals as well.
        part_column: number of the column that has the part of each point, ``gt_parts``.
        num_parts: parts are numbers below it; None for any.

    Raises:
        UserError: if a file is missing, empty or no table of numbers with these columns, or has
            points that are NaN or infinite, or parts that do not exist.
    """

    def __init__(self, columns: int = 3, part_column: int | None = None,
                 num_parts: int | None = None):
        self.columns, self.part_column, self.num_parts = columns, part_column, num_parts

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        if 'points' not in results and not results.get('path'):
            raise UserError('a sample has neither points nor the path of a file: take a data set '
                            'of clouds, such as vmamba_mm.ModelNet40')
        name = results.get('path', 'the cloud')
        table = results['points'] if 'points' in results else read_table(name)
        needed = max(self.columns, (self.part_column or 0) + 1)
        if table.size == 0:
            raise UserError(f'{name} has no points')
        if table.ndim != 2 or table.shape[1] < needed:
            raise UserError(f'{name} has the shape {table.shape}, and a point in each row with '
                            f'{needed} columns is needed')
        points = np.ascontiguousarray(table[:, :self.columns], np.float32)
        if not np.isfinite(points).all():
            row = int(np.argmin(np.isfinite(points).all(1)))
            raise UserError(f'{name} has a point that is NaN or infinite, number {row}: remove it')
        results['points'] = points
        if self.part_column is not None:
            parts = table[:, self.part_column]
            if not np.isfinite(parts).all() or (parts < 0).any():
                raise UserError(f'{name} has a part that is no number from 0 on, in column '
                                f'{self.part_column}')
            if self.num_parts is not None and parts.max() >= self.num_parts:
                raise UserError(f'{name} has the part {parts.max():g} in column '
                                f'{self.part_column}, and parts are numbers from 0 to '
                                f'{self.num_parts - 1}')
            results['gt_parts'] = parts.astype(np.int64)
        return results


def read_table(path: str) -> np.ndarray:
    """A table of numbers, (rows, columns), of a text file, with commas or spaces, or ``.npy``.

    Raises:
        UserError: if it is missing or no table of numbers.
    """
    try:
        if path.lower().endswith('.npy'):
            return np.load(path, allow_pickle=False).astype(np.float32)
        with open(path, encoding='utf-8') as file:
            text = file.read().replace(',', ' ')
        lines = text.strip().splitlines()
        if not lines:
            raise UserError(f'{path} is empty')
        counts = [len(line.split()) for line in lines]
        other = next((i for i, count in enumerate(counts) if count != counts[0]), None)
        if other is not None:
            raise ValueError(f'line 1 has {counts[0]} numbers, and line {other + 1} has '
                             f'{counts[other]}')
        return np.array(text.split(), np.float32).reshape(len(lines), counts[0])
    except OSError as err:
        raise UserError(f'{path} cannot be read ({err.strerror or err})') from err
    except (ValueError, TypeError, EOFError) as err:
        raise UserError(f'{path} is no table of numbers, with a point in each line: {err}') from err


@TRANSFORMS.register_module()
class NormalizePoints:
    """Shift the mean of a cloud to the origin and scale it into the unit sphere.

    A cloud whose points all coincide comes to the origin.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        points = results['points']
        xyz = points[:, :3] - points[:, :3].mean(0)
        radius = np.sqrt((xyz ** 2).sum(1)).max()
        results['points'] = np.concatenate(
            [xyz / radius if radius > 0 else xyz, points[:, 3:]], 1).astype(np.float32)
        return results


@TRANSFORMS.register_module()
class SamplePoints:
    """Take random points of a cloud.

    Args:
        num: how many; None for all, in another order.
        replace: a point may be taken several times; else the cloud needs ``num`` points.
        first: take the first ones in place of random ones, for a test.

    Raises:
        UserError: if there are too few.
    """

    def __init__(self, num: int | None = None, replace: bool = False, first: bool = False):
        self.num, self.replace, self.first = num, replace, first

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        count = len(results['points'])
        num = self.num or count
        if num > count and not self.replace:
            raise UserError(f'{results.get("path", "a cloud")} has {count} points, and {num} are '
                            'to be taken: take fewer, or some several times (replace=True)')
        chosen = np.arange(num) if self.first else \
            np.random.choice(count, num, replace=self.replace)
        for key in ('points', 'gt_parts'):
            if key in results:
                results[key] = results[key][chosen]
        return results


@TRANSFORMS.register_module()
class PackPoints:
    """What the models of clouds take, as :class:`vmamba_mm.heads.PointClassifier`.

    Gives ``inputs``, (N, C) in fp32, and ``data_samples``, a BaseDataElement with ``gt_label`` (1),
    ``category`` (1) and ``gt_parts`` (N) where the sample has them, and ``path``.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        sample = BaseDataElement(metainfo=dict(path=results.get('path', '')))
        for key in ('gt_label', 'category'):
            if key in results:
                sample.set_field(torch.tensor([int(results[key])]), key)
        if 'gt_parts' in results:
            sample.gt_parts = torch.from_numpy(results['gt_parts'])
        return dict(inputs=torch.from_numpy(results['points']), data_samples=sample)
