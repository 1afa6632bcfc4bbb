"""Several ways to calculate the same on a CPU: whether they agree, and one run of one of them."""

import torch

from vmamba_mm.testing import relative_error, with_grads


def worst_error(ways, reference, inputs) -> float:
    """The largest relative error of the results and gradients of ways, beside ``reference`` in
    fp64; all are functions of the tensors ``inputs`` by name."""
    y_ref, grads_ref = with_grads(reference, {name: t.double() for name, t in inputs.items()})
    worst = 0.0
    for way in ways:
        y, grads = with_grads(way, inputs)
        worst = max(worst, relative_error(y, y_ref),
                    *(relative_error(grads[name], grads_ref[name]) for name in grads))
    return worst


def run(way, inputs, with_backward: bool) -> None:
    if not with_backward:
        with torch.inference_mode():
            way(**inputs)
        return
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    way(**leaves).sum().backward()
