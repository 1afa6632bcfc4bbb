"""``spatial_mixer`` and ``channel_mixer`` by torch's matrix products and the CUDA kernels of
``shift_mix``, ``bi_wkv``, ``squared_relu`` and ``sigmoid_gate``."""

import torch
from torch import Tensor

from vmamba_mm.ops.core.launch import TYPES, why_not_beside
from vmamba_mm.ops.fused.cast import cast
from vmamba_mm.ops.fused.gates import cuda as gates
from vmamba_mm.ops.scan_kernels.cuda import dense
from vmamba_mm.ops.shift_mix import cuda as shifts
from vmamba_mm.ops.wkv import cuda as wkv

_BLOCKS, _EPS = 32, 1e-6  # of the official mode, as bi_wkv has them by default


def _why_not(x: Tensor, weights, dtype: torch.dtype) -> str | None:
    if torch.compiler.is_compiling():
        return 'torch.compile has better kernels around the WKV'
    if dtype not in TYPES or any(size % 4 for weight in weights for size in weight.shape):
        return 'a product is not of multiples of 4'
    return why_not_beside(x, *weights)


def spatial_why_not(x, for_k, for_v, for_r, key, value, receptance, output, w, u, official, pixels,
                    share, dtype) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    tokens = x.flatten(1, 2)
    return (_why_not(x, (key, value, receptance, output), dtype)
            or shifts.why_not(x, for_k, for_v, for_r, pixels, share, x.shape[-1], dtype)
            or wkv.bi_why_not(w, u, tokens, tokens, _BLOCKS * official, _EPS))


def channel_why_not(x, for_k, for_r, key, value, receptance, pixels, share, head_dim, dtype
                    ) -> str | None:
    return (_why_not(x, (key, value, receptance), dtype)
            or shifts.why_not(x, for_k, for_r, None, pixels, share, head_dim, dtype))


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _wkv_arguments(x, w, u, official):
    tokens = x.shape[1] * x.shape[2]
    return w / tokens, u / tokens, *((_BLOCKS, _EPS) if official else (0, 0.0))


def spatial_forward(x, for_k, for_v, for_r, key, value, receptance, output, w, u, official, pixels,
                    share, dtype, save):
    """The result; for the backward the mixtures, k, v, r and the WKV; empty unless ``save``."""
    mixtures = shifts.forward(x, for_k, for_v, for_r, pixels, share, x.shape[-1], dtype)
    key, value, receptance, output = cast([key, value, receptance, output], dtype)
    k, v, r = (torch.mm(_flat(t), weight.T) for t, weight in zip(
        mixtures, (key, value, receptance), strict=True))
    shape = len(x), -1, len(key)
    scaled_w, scaled_u, *mode = _wkv_arguments(x, w, u, official)
    y = wkv.bi_forward(scaled_w, scaled_u, k.view(shape), v.view(shape), *mode)
    result = torch.mm(gates.sigmoid_gate(r, _flat(y)), output.T).view(*x.shape[:-1], -1)
    if save:
        return result, *mixtures, k, v, r, _flat(y)
    return result, *(x.new_empty(0, dtype=dtype) for _ in range(7))


def spatial_backward(grad, x, for_k, for_v, for_r, key, value, receptance, output, w, u, mixed_k,
                     mixed_v, mixed_r, k, v, r, y, official, pixels, share, dtype):
    """Gradients by x and the parameters, in their dtypes."""
    half_key, half_value, half_receptance, half_output = cast([key, value, receptance, output],
                                                              dtype)
    grad = dense(grad.reshape(-1, grad.shape[-1]).to(dtype))
    doutput = torch.mm(grad.T, gates.sigmoid_gate(r, y)).to(output.dtype)
    dr, dy = gates.sigmoid_gate_backward(torch.mm(grad, half_output), r, y)
    shape = len(x), -1, len(key)
    scaled_w, scaled_u, *mode = _wkv_arguments(x, w, u, official)
    dw, du, dk, dv = wkv.bi_backward(dy.view(shape), scaled_w, scaled_u, k.view(shape),
                                     v.view(shape), *mode)
    tokens = x.shape[1] * x.shape[2]
    products = [(_flat(dk), mixed_k, key, half_key), (_flat(dv), mixed_v, value, half_value),
                (dr, mixed_r, receptance, half_receptance)]
    dweights, dmixtures = _through(products, x)
    dx, *dshares = shifts.backward(*dmixtures, x, for_k, for_v, for_r, pixels, share, x.shape[-1],
                                   dtype)
    return dx, *dshares, *dweights, doutput, (dw / tokens).to(w.dtype), (du / tokens).to(u.dtype)


def _through(products, x):
    """The gradients by the weights, and by the maps (B, H, W, C), of products, from those by their
    results, the maps, the weights, and the weights as they were multiplied."""
    dweights = [torch.mm(grad.T, _flat(mixed)).to(weight.dtype)
                for grad, mixed, weight, _ in products]
    return dweights, [torch.mm(grad, half).view(x.shape) for grad, _, _, half in products]


def channel_forward(x, for_k, for_r, key, value, receptance, pixels, share, head_dim, dtype, save):
    """The result; for the backward the mixtures, k, r and what the gate multiplies; empty unless
    ``save``."""
    mixed_k, mixed_r, _ = shifts.forward(x, for_k, for_r, None, pixels, share, head_dim, dtype)
    key, value, receptance = cast([key, value, receptance], dtype)
    k, r = torch.mm(_flat(mixed_k), key.T), torch.mm(_flat(mixed_r), receptance.T)
    values = torch.mm(gates.squared_relu(k), value.T)
    result = gates.sigmoid_gate(r, values).view(*x.shape[:-1], -1)
    if save:
        return result, mixed_k, mixed_r, k, r, values
    return result, *(x.new_empty(0, dtype=dtype) for _ in range(5))


def channel_backward(grad, x, for_k, for_r, key, value, receptance, mixed_k, mixed_r, k, r, values,
                     pixels, share, head_dim, dtype):
    """Gradients by x and the parameters, in their dtypes."""
    half_key, half_value, half_receptance = cast([key, value, receptance], dtype)
    dr, dvalues = gates.sigmoid_gate_backward(grad.reshape(r.shape).to(dtype), r, values)
    dvalue = torch.mm(dvalues.T, gates.squared_relu(k)).to(value.dtype)
    dk = gates.squared_relu_backward(torch.mm(dvalues, half_value), k)
    (dkey, dreceptance), dmixtures = _through([(dk, mixed_k, key, half_key),
                                               (dr, mixed_r, receptance, half_receptance)], x)
    dx, dfor_k, dfor_r, _ = shifts.backward(*dmixtures, None, x, for_k, for_r, None, pixels, share,
                                            head_dim, dtype)
    return dx, dfor_k, dfor_r, dkey, dvalue, dreceptance
