"""Factors of the channels of a branch (layer scale, arXiv 2103.17239), by the CUDA kernel
``layer_scale.cu``."""

from vmamba_mm.ops.core.launch import CODES, TYPES, Instance, cached, device_limits, kernel
from vmamba_mm.ops.fused.channels import as_template


def scale_instance(type_: str, forward: bool) -> Instance:
    return Instance('fused/layer_scale.cu', f'layer_scale<{type_}, {as_template(forward)}>')


#: What is compiled to check it, which is all that there is, and the lowest compute capability that
#: it is for.
INSTANCES: dict[Instance, int] = {
    scale_instance(type_, forward): low
    for type_, low in (('Half', 75), ('BFloat', 80), ('Float', 75)) for forward in (True, False)}


def _bind(index, dtype, gamma, rows, dim, forward):
    wide = -(-dim // 128)
    blocks = min(-(-rows // 8), max(1, -(-8 * device_limits(index)[0] // wide)))
    return blocks, kernel(index, scale_instance, TYPES[dtype], forward).bind(
        (blocks, wide, 1), (32, 8, 1), rows=rows, dim=dim, gamma_type=CODES[gamma])


@cached
def forward_launch(index, dtype, gamma, rows, dim):
    """The forward for these dtypes, which are those of the branch and of the factors. It takes the
    addresses ``branch`` (rows, D), ``gamma``, and ``scaled`` (rows, D), fp32."""
    return _bind(index, dtype, gamma, rows, dim, True)[1]


@cached
def backward_launch(index, dtype, gamma, rows, dim):
    """Blocks, each of which leaves a part (2, D) of the gradients by the factors and by a bias of
    the branch, and the backward.

    It takes the addresses ``branch``, ``gamma``, ``grad``, ``dbranch``, which may be ``grad``, and
    ``partials``.
    """
    return _bind(index, dtype, gamma, rows, dim, False)
