"""What the public functions say of tensors that do not fit one another."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def check_shapes(op: str, beside: Mapping[str, Tensor],
                 **expected: tuple[Tensor | None, Sequence[int]]) -> None:
    """Raise ValueError unless each tensor that is not None has the shape beside it.

    Args:
        op: the function that was called.
        beside: by name the tensors that the shapes were taken from, for the message.
        expected: (tensor, shape) by the name of the argument.
    """
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            others = ' and '.join(f'{key} {tuple(t.shape)}' for key, t in beside.items())
            raise ValueError(f'{op} expects {name} of shape {tuple(shape)} beside {others}, got '
                             f'{tuple(tensor.shape)}')
