"""What is compared, by which limit, and what came of it."""

import contextlib
import math
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmamba_mm.errors import UserError
from vmamba_mm.families.parity import Parity
from vmamba_mm.mm.cli import wants_traceback

#: (outputs, gradients) by device and dtype
LIMITS = {
    ('cpu', 'fp64'): (1e-10, 1e-10), ('cuda', 'fp64'): (1e-10, 1e-10),
    # The official numbers are of fp32 on a CPU, where the same sums leave a few rounding errors.
    ('cpu', 'fp32'): (1e-5, 1e-4),
    # Fused kernels sum in another order and use the GPU's fast exponentials.
    ('cuda', 'fp32'): (1e-4, 1e-3),
    # 11 bits, and 8, of each number; a gradient has gone through the model twice.
    ('cpu', 'fp16'): (5e-3, 5e-2), ('cuda', 'fp16'): (5e-3, 5e-2),
    ('cpu', 'bf16'): (5e-2, 3e-1), ('cuda', 'bf16'): (5e-2, 3e-1)}

#: The reason of a limit that is twice the error of plain PyTorch.
TWICE = 'twice the error of plain PyTorch'


class Row(NamedTuple):
    """One comparison; ``problem`` in place of an error where there was none to make.

    ``reason`` is of an omission, if there is neither an error nor a problem, or of the limit.
    """

    file: str
    case: str
    tensor: str
    error: float | None = None
    limit: float | None = None
    problem: str = ''
    reason: str = ''

    @property
    def is_omitted(self) -> bool:
        return self.error is None and not self.problem

    @property
    def failed(self) -> bool:
        # NaN fails.
        return bool(self.problem) or self.error is not None and not self.error <= self.limit

    @property
    def excess(self) -> float:
        """The error as a part of the limit, above 1 for a failure."""
        if self.error is None:
            return math.inf if self.problem else -1.0
        if math.isnan(self.error):
            return math.inf
        return self.error / self.limit if self.limit else math.inf if self.error else 0.0


class Report:
    """Collects the rows of one file.

    Args:
        file: its name.
        parity: of the family, for omissions and limits.
        device: 'cpu' or 'cuda'.
        dtype: a key of ``DTYPES``.
    """

    def __init__(self, file: str, parity: Parity, device: str, dtype: str):
        self.file, self.parity, self.rows = file, parity, []
        self.usual = LIMITS[torch.device(device).type, dtype]
        self.is_exact = device == 'cpu' and dtype in ('fp32', 'fp64')

    def fail(self, case: str, tensor: str, problem: str) -> None:
        self.rows.append(Row(self.file, case, tensor, problem=problem))

    def lack(self, case: str, tensor: str, problem: str) -> None:
        """A failure, unless the family says why the file does not hold this."""
        if not self._excuse(self.parity.absences, case, tensor):
            self.fail(case, tensor, problem)

    def omits(self, case: str, tensor: str) -> bool:
        """Whether the family says why this is not compared; then there is a row with the reason."""
        return self._excuse(self.parity.omissions, case, tensor)

    def _excuse(self, omissions, case, tensor):
        for omission in omissions:
            if omission.holds(self.file, case, tensor):
                self.rows.append(Row(self.file, case, tensor, reason=omission.reason))
                return True
        return False

    @contextlib.contextmanager
    def catch(self, case: str, tensor: str) -> Iterator[None]:
        """A context in which whatever raises is a failure, such as a file that cannot be read."""
        try:
            yield
        except Exception as err:
            if wants_traceback():
                traceback.print_exc()
            text = ' '.join(str(err).split())
            kind = '' if isinstance(err, UserError) else f'{type(err).__name__}: '
            self.fail(case, tensor, f'{kind}{text}')

    def limit(self, case: str, tensor: str) -> tuple[float, str]:
        usual = self.usual[tensor.startswith('grad')]
        for limit in self.parity.limits:
            if limit.holds(self.file, case, tensor):
                return limit.error if self.is_exact else max(limit.error, usual), limit.reason
        return usual, ''

    def allow_twice(self, plain: list[Row], first: int) -> None:
        """Allow the rows from number ``first`` on twice the largest error of ``plain``, the same
        rows of plain PyTorch in the same precision, where that is more than the limit."""
        errors = {}
        for row in plain:
            if row.error is not None:
                errors[row.case, row.tensor] = max(errors.get((row.case, row.tensor), 0), row.error)
        for i, row in enumerate(self.rows[first:], first):
            limit = 2 * errors.get((row.case, row.tensor), math.nan)
            if row.failed and not row.problem and row.limit < limit < math.inf:
                self.rows[i] = row._replace(limit=limit, reason=TWICE)

    def compare(self, case: str, tensor: str, ours: Any, expected: Any,
                scale: float | None = None) -> None:
        """Tensors by relative 2-norm, in whatever lists and dicts they are, all else exactly.

        Args:
            scale: what the error of a tensor that is zero is relative to.
        """
        if self.omits(case, tensor):
            return
        if isinstance(expected, Mapping):
            for key, value in expected.items():
                self.compare(case, f'{tensor}.{key}', _item(ours, key), value, scale)
        elif isinstance(expected, list | tuple) and any(map(_holds_tensors, expected)):
            if not isinstance(ours, list | tuple) or len(ours) != len(expected):
                count = len(ours) if isinstance(ours, list | tuple) else type(ours).__name__
                self.fail(case, tensor, f'{len(expected)} are expected, ours: {count}')
                return
            for i, pair in enumerate(zip(ours, expected, strict=True)):
                self.compare(case, f'{tensor}.{i}', *pair, scale)
        elif ours is None and expected is not None:
            self.fail(case, tensor, 'ours has none')
        elif isinstance(expected, Tensor | float | int) and not isinstance(expected, bool):
            self._compare_numbers(case, tensor, torch.as_tensor(ours), torch.as_tensor(expected),
                                  scale)
        elif _plain(ours) != _plain(expected):
            self.fail(case, tensor, f'is {_plain(ours)!r:.60}, expected {_plain(expected)!r:.60}')
        else:
            self.rows.append(Row(self.file, case, tensor, 0.0, 0.0))

    def _compare_numbers(self, case, tensor, ours, expected, scale):
        if ours.shape != expected.shape:
            self.fail(case, tensor, f'is {tuple(ours.shape)}, expected {tuple(expected.shape)}')
        elif not expected.is_floating_point():
            wrong = (ours.cpu() != expected).double().mean().item() if expected.numel() else 0.0
            self.rows.append(Row(self.file, case, tensor, wrong, 0.0))
        else:
            ours, expected = ours.detach().double().cpu(), expected.double()
            norm = scale or expected.norm().item() or 1e-30
            error = (ours - expected).norm().item() / norm
            limit, reason = self.limit(case, tensor)
            self.rows.append(Row(self.file, case, tensor, error, limit, reason=reason))


def _item(value, key):
    return value.get(key) if isinstance(value, Mapping) else None


def _holds_tensors(value):
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor | Mapping)


def _plain(value):
    """Tensors and tuples as lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
