"""``squared_relu`` and ``sigmoid_gate`` by the CUDA kernel ``gates.cu``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import TYPES, Instance, cached, kernel, pointer, why_not_beside
from vmamba_mm.ops.fused.channels import as_template
from vmamba_mm.ops.scan_kernels import cuda as scans
from vmamba_mm.ops.scan_kernels.cuda import dense

_KINDS = SQUARED_RELU, SIGMOID_GATE = 0, 1  # as in gates.cu


def why_not(x: Tensor, other: Tensor | None = None) -> str | None:
    """The reason why the kernel cannot take these inputs, or None."""
    if torch.compiler.is_compiling():
        return 'torch.compile has better kernels of its own'
    if other is not None and other.dtype != x.dtype:
        return f'one is {x.dtype}, the other {other.dtype}'
    if x.dim() == 0 or x.numel() % 4:
        return 'the number of elements is no multiple of 4'
    return why_not_beside(x, other) or scans.why_not(x, 0, 1)


def instance(type_: str, kind: int, backward: bool) -> Instance:
    return Instance('fused/gates.cu', f'gates<{type_}, {kind}, {as_template(backward)}>')


#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = {
    instance(type_, kind, backward): low
    for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75)) for kind in _KINDS
    for backward in (False, True)}


@cached
def gates_launch(index: int, dtype: torch.dtype, kind: int, backward: bool, size: int):
    """It takes the addresses ``x`` and ``y``; with a gate ``other``; backwards ``grad``, and with a
    gate ``dother``."""
    return kernel(index, instance, TYPES[dtype], kind, backward).bind(
        (-(-size // 4096), 1, 1), (256, 1, 1), size=size)


def _run(kind: int, x: Tensor, other: Tensor | None = None, grad: Tensor | None = None
         ) -> list[Tensor]:
    x, other, grad = dense(x), dense(other), dense(grad)
    results = [torch.empty(x.shape, dtype=x.dtype, device=x.device)
               for _ in range(1 if grad is None or other is None else 2)]
    gates_launch(x.get_device(), x.dtype, kind, grad is not None, x.numel())(
        x=x.data_ptr(), other=pointer(other), grad=pointer(grad), y=results[0].data_ptr(),
        dother=pointer(results[1] if len(results) > 1 else None))
    return results


def squared_relu(x: Tensor) -> Tensor:
    return _run(SQUARED_RELU, x)[0]


def squared_relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return _run(SQUARED_RELU, x, grad=grad)[0]


def sigmoid_gate(x: Tensor, other: Tensor) -> Tensor:
    return _run(SIGMOID_GATE, x, other)[0]


def sigmoid_gate_backward(grad: Tensor, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    dx, dother = _run(SIGMOID_GATE, x, other, grad)
    return dx, dother
