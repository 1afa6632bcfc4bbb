"""``nc_ssd`` by the CUDA kernels in ``kernels/nc_ssd``: fp16, bf16 and fp32 on the tensor cores.

One launch sums the states over tokens, backwards both of them, and one does the rest, token by
token. Where there are few sequences, spans of them are summed first, and by one more launch the
spans. The kernels need sm_80.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vmamba_mm.ops.core.backends import wants_grad
from vmamba_mm.ops.core.launch import (
    CODES,
    TYPES,
    Instance,
    cached,
    device_limits,
    kernel,
    pointer,
    why_not_beside,
)
from vmamba_mm.ops.fused.add_norm import cuda as norm
from vmamba_mm.ops.fused.channels import as_template, why_not_channels
from vmamba_mm.ops.nc_ssd.chunked import scale_of
from vmamba_mm.ops.scan_kernels import cuda as scan_kernels

_CHUNK, _BLOCK, _WIDTH = 64, 16, 64  # Q and BLOCK in ssd.cuh; WIDTH in nc_ssd_bwd.cu
_STATES = 16, 32, 48, 64, 128  # N of the kernels
_MOST_SPANS, _MOST_SAMPLES = 32, 65535  # the latter are blocks of a launch in a second dimension

#: Spans of a sequence in the sum of states, for tests.
force_spans: int | None = None
#: Bytes of shared memory of a block of nc_ssd_out, for tests.
force_shared: int | None = None


def why_not(x, dt, A, B, C, D, dt_bias, dt_softplus, positive) -> str | None:
    """The reason why the kernels cannot take these inputs, or None."""
    reason = scan_kernels.why_not(x, 0, 1) or why_not_beside(x, dt, A, B, C, D, dt_bias)
    if reason is not None:
        return reason
    (batch, _, heads, dim), (groups, state) = x.shape, B.shape[2:]
    if dim % 8:
        return f'P is {dim}; the kernels take multiples of 8'
    if state % 8 or state > _STATES[-1]:
        return f'N is {state}; the kernels take multiples of 8 up to {_STATES[-1]}'
    if batch > _MOST_SAMPLES or batch * heads * dim * state >= 2**31:
        return f'the batch is of more than {_MOST_SAMPLES} samples, or 2^31 numbers of states'
    training = wants_grad(x, dt, A, B, C, D, dt_bias)
    return _why_not_here(x.device.index, x.dtype.itemsize, heads // groups, state, training)


@torch.compiler.assume_constant_result
def _why_not_here(index: int, size: int, heads: int, state: int, training: bool) -> str | None:
    """For so many heads of a group, and elements of ``size`` bytes."""
    return _why_not_on(index, size, heads, state, training)


@cached
def _why_not_on(index: int, size: int, heads: int, state: int, training: bool) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f'a GPU of compute capability {capability} is too old for them'
    states = _padded(state)
    shared = max(_states_shared(size, states), _Output(_WIDTH, 2).shared(size, states, False),
                 _backward_shared(size, states, heads) if training else 0)
    if shared > device_limits(index)[2]:
        return (f'N={state} and {heads} heads of a group need {shared} bytes of shared memory, and '
                f'this GPU has {device_limits(index)[2]}')
    return None


def _padded(state: int) -> int:
    """N of the kernels for so many states."""
    return next(n for n in _STATES if n >= state)


# --- shared memory, in bytes, for elements of ``size`` bytes -----------------------------------

def _tile(columns: int, size: int, rows: int = _CHUNK) -> int:
    return rows * (columns * size + 16)


def _width(states: int) -> int:
    """Columns of a block of nc_ssd_states."""
    return 128 if states <= 64 else 64


def _states_shared(size: int, states: int) -> int:
    """As NcStatesShared."""
    width = _width(states)
    stages = 2 if size == 4 else 3
    return stages * (_tile(width, size) + _tile(states, size)) + 2 * width // 8 * _CHUNK * 4


def _pitch(size: int, columns: int) -> int:
    """Elements from a row of the state to the next in nc_ssd_out."""
    return -(-columns // 32) * 32 + 16 // size


class _Output(NamedTuple):
    """How a block of nc_ssd_out is made up: so many ``columns`` and, of C, ``stages`` chunks."""
    columns: int
    stages: int

    def shared(self, size: int, states: int, norm: bool) -> int:
        """As NcOutputShared, and what is behind it."""
        state = states * _pitch(size, self.columns) * size
        return (4 * _CHUNK * 4 + 16 + self.stages * _tile(states, size) + state
                + (2 * self.columns * 4 if norm else 0))


def _output(size: int, states: int, columns: int, norm: bool, most_shared: int) -> _Output:
    """All columns of a group, or as many as fit. A norm needs all: it has less of C in their place,
    and the result may still not fit."""
    def fits(columns, stages):
        return _Output(columns, stages).shared(size, states, norm) <= most_shared

    if fits(columns, 2) or norm:
        return _Output(columns, 2 if fits(columns, 2) else 1)
    parts = next(n for n in range(2, columns) if fits(_part(columns, n), 2))
    return _Output(_part(columns, parts), 2)


def _part(columns: int, parts: int) -> int:
    """Columns of each of so many blocks: a multiple of what a block has at a time."""
    return -(-columns // parts // _WIDTH) * _WIDTH


def _backward_shared(size: int, states: int, heads: int) -> int:
    """As NcBackwardShared, and the rows behind it."""
    stage = 2 * _tile(_WIDTH, size) + 2 * _tile(_WIDTH, size, states)
    stages = 1 if size == 4 and states > 64 else 2
    return stages * stage + _tile(states, size) + 5 * heads * _CHUNK * 4


# --- what is compiled -------------------------------------------------------------------------

def _instance(name: str, type_: str, fast: bool, states: int, norm: bool | None = None
              ) -> Instance:
    flags = '' if norm is None else f', {as_template(norm)}'
    return Instance(f'nc_ssd/{name}.cu', f'{name}<{type_}, {as_template(fast)}, {states}{flags}>')


def _sum_instance(type_: str) -> Instance:
    return Instance('nc_ssd/nc_ssd_sum.cu', f'nc_ssd_sum<{type_}>')


def _compiled() -> Iterator[tuple[Instance, int]]:
    # Types and N: those of the published models, and the largest.
    for type_, fast, states in (('Half', False, 64), ('Half', False, 48), ('BFloat', False, 64),
                                ('Float', False, 64), ('Float', True, 64), ('BFloat', False, 128)):
        for name in ('nc_ssd_states', 'nc_ssd_bwd'):
            yield _instance(name, type_, fast, states), 80
        for with_norm in (False, True):
            yield _instance('nc_ssd_out', type_, fast, states, with_norm), 80
        yield _sum_instance(type_), 80


#: What is compiled to check it, and the lowest compute capability that it is for.
INSTANCES: dict[Instance, int] = dict(_compiled())


# --- launches ---------------------------------------------------------------------------------

class _Strides(NamedTuple):
    """Of a map (B, L, H, ...), in elements."""
    b: int
    l: int  # noqa: E741
    h: int


_ABSENT = _Strides(0, 0, 0)


class _Call(NamedTuple):
    """Sizes and dtypes of a call. Types are those of parameters, None for absent ones."""
    index: int
    dtype: torch.dtype
    fast: bool
    batch: int
    length: int
    heads: int
    dim: int
    groups: int
    state: int
    dt: torch.dtype
    A: torch.dtype
    bias: torch.dtype | None
    softplus: bool
    positive: bool

    @property
    def columns(self) -> int:
        return self.heads // self.groups * self.dim

    @property
    def chunks(self) -> int:
        return -(-self.length // _CHUNK)

    @property
    def state_size(self) -> int:
        """Numbers of the states of the batch."""
        return self.batch * self.groups * self.state * self.columns

    def fields(self, **strides: _Strides) -> dict[str, int]:
        weigh = dict(weigh_A_type=CODES[self.A], weigh_bias_type=CODES.get(self.bias, 0),
                     weigh_dt_type=CODES[self.dt], weigh_softplus=int(self.softplus),
                     weigh_positive=int(self.positive))
        return weigh | self.sizes(**strides)

    def sizes(self, **strides: _Strides) -> dict[str, int]:
        return dict(length=self.length, groups=self.groups, dim=self.dim, state=self.state,
                    columns=self.columns, chunks=self.chunks,
                    **{f'{name}_{side}': value for name, of in strides.items()
                       for side, value in of._asdict().items()})

    def kernel(self, name: str, *args):
        return kernel(self.index, _instance, name, TYPES[self.dtype], self.fast,
                      _padded(self.state), *args)


class _States(NamedTuple):
    """``run`` launches the sums; it needs ``parts`` numbers in fp32."""
    run: Callable[..., None]
    parts: int


@cached
def _states_launch(call: _Call, first: int, jobs: int, x: _Strides, dt: _Strides, B: _Strides,
                   dy: _Strides = _ABSENT, C: _Strides = _ABSENT) -> _States:
    """The states, the gradients by them (``first`` is 1), or with two jobs both.

    It takes the addresses of x, dt, B, A, bias, and of dy and C, of the result and of parts.
    """
    blocks = -(-call.columns // _width(_padded(call.state)))
    sequences = call.batch * call.groups * blocks
    # Two blocks for each multiprocessor, but not less than two chunks to a block.
    spans = force_spans or max(1, min(2 * device_limits(call.index)[0] // (sequences * jobs),
                                      call.chunks // 2, _MOST_SPANS))
    span = -(-call.chunks // spans)
    spans = -(-call.chunks // span)
    scale = scale_of(call.length, call.dtype)
    launch = call.kernel('nc_ssd_states').bind(
        (sequences, spans, jobs), (128, 1, 1),
        _states_shared(call.dtype.itemsize, _padded(call.state)), batch=call.batch, scale=scale,
        blocks=blocks, span=span, spans=spans, backwards=first,
        **call.fields(x=x, dt=dt, B=B, dy=dy, C=C))
    if spans == 1:
        def launch_states(x, dt, B, A, bias, states, parts, dy=0, C=0):
            launch(x_data=x, dt_data=dt, B_data=B, weigh_A=A, weigh_bias=bias, dy_data=dy,
                   C_data=C, states=states)

        return _States(launch_states, 0)

    add = kernel(call.index, _sum_instance, TYPES[call.dtype]).bind(
        (-(-call.state_size // 512), jobs, 1), (128, 1, 1), scale=scale, spans=spans,
        size=call.state_size)

    def launch_in_spans(x, dt, B, A, bias, states, parts, dy=0, C=0):
        launch(x_data=x, dt_data=dt, B_data=B, weigh_A=A, weigh_bias=bias, dy_data=dy, C_data=C,
               states=parts)
        add(parts=parts, states=states)

    return _States(launch_in_spans, jobs * spans * call.state_size)


@cached
def _output_launch(call: _Call, D: torch.dtype | None, x: _Strides, C: _Strides, y: _Strides,
                   z: _Strides = _ABSENT, norm_dtype: torch.dtype | None = None):
    """The result from the states; with a norm that has parameters of ``norm_dtype``, else None.

    It takes the addresses of x, C, y, states and D, and ``eps``; with a norm those of z,
    norm_weight, norm_bias, and moments if they are to be kept.
    """
    size, states, norm = call.dtype.itemsize, _padded(call.state), norm_dtype is not None
    shape = _output(size, states, call.columns, norm,
                    force_shared or device_limits(call.index)[2])
    parts = -(-call.columns // shape.columns)
    sequences = call.batch * call.groups
    # As many blocks as fit at once, so that each reads the state for several chunks.
    blocks = (2 if norm else 3) * device_limits(call.index)[0]
    spans = max(1, min(blocks // (sequences * parts), call.chunks))
    span = -(-call.chunks // spans)
    return call.kernel('nc_ssd_out', norm).bind(
        (sequences, -(-call.chunks // span), parts), (256, 1, 1),
        shape.shared(size, states, norm), ('eps',), scale=1 / scale_of(call.length, call.dtype),
        width=shape.columns, pitch=_pitch(size, shape.columns), stages=shape.stages, span=span,
        D_type=CODES.get(D, 0), norm_type=CODES.get(norm_dtype, 0),
        **call.sizes(x=x, C=C, y=y, z=z))


@cached
def _backward_launch(call: _Call, D: torch.dtype | None, **strides: _Strides):
    """The gradients from the states and those by them. It takes the addresses of x, dy, dt, B, A,
    bias, D, states, dx, ddt, dB, dC and parts."""
    heads = call.heads // call.groups
    return call.kernel('nc_ssd_bwd').bind(
        (call.chunks * call.groups, call.batch, 1), (256, 1, 1),
        _backward_shared(call.dtype.itemsize, _padded(call.state), heads), batch=call.batch,
        heads=heads, scale=1 / scale_of(call.length, call.dtype), D_type=CODES.get(D, 0),
        **call.fields(**strides))


# --- on tensors -------------------------------------------------------------------------------

def _map(t: Tensor) -> Tensor:
    """With rows that are without gaps and begin at multiples of 16 bytes."""
    b, l, h, last = t.stride()  # noqa: E741
    if last != 1 or (b | l | h) * t.itemsize % 16 or t.data_ptr() % 16 or max(l, h) >= 2**31:
        t = t.contiguous()
        if t.data_ptr() % 16:
            t = t.clone()
    return t


def _strides(t: Tensor) -> _Strides:
    return _Strides(*t.stride()[:3])


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _steps(dt: Tensor) -> Tensor:
    return dt.contiguous() if max(dt.stride()) >= 2**31 else dt


class _Inputs(NamedTuple):
    """Of a call, as the kernels take them."""
    call: _Call
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None

    @classmethod
    def of(cls, x, dt, A, B, C, D, dt_bias, dt_softplus, positive) -> '_Inputs':
        x, B, C, dt = _map(x), _map(B), _map(C), _steps(dt)
        A, D, dt_bias = _dense(A), _dense(D), _dense(dt_bias)
        fast = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        call = _Call(x.get_device(), x.dtype, fast, *x.shape, *B.shape[2:], dt.dtype, A.dtype,
                     _dtype(dt_bias), dt_softplus, positive)
        return cls(call, x, dt, A, B, C, D, dt_bias)

    def find_states(self, states: Tensor, first: int = 0, jobs: int = 1,
                    dy: Tensor | None = None) -> None:
        """Write the states, and the gradients by them, to their place in ``states`` (2, ...)."""
        call, x, dt, A, B, C, _, dt_bias = self
        launch = _states_launch(call, first, jobs, _strides(x), _strides(dt), _strides(B),
                                _ABSENT if dy is None else _strides(dy), _strides(C))
        parts = x.new_empty(launch.parts, dtype=torch.float32) if launch.parts else None
        launch.run(x.data_ptr(), dt.data_ptr(), B.data_ptr(), A.data_ptr(), pointer(dt_bias),
                   states.data_ptr() + first * call.state_size * states.itemsize, pointer(parts),
                   pointer(dy), C.data_ptr())

    def multiply(self, states: Tensor, y: Tensor) -> None:
        """Write the result to ``y``."""
        call, x, _, _, _, C, D, _ = self
        _output_launch(call, _dtype(D), _strides(x), _strides(C), _strides(y))(
            x_data=x.data_ptr(), C_data=C.data_ptr(), y_data=y.data_ptr(),
            states=states.data_ptr(), D=pointer(D), eps=0.0)

    def backward(self, states: Tensor, dy: Tensor, grads: tuple[Tensor, ...] | None = None):
        """Gradients by x, dt, A, B, C, D and dt_bias from the states and those by them; those by x,
        dt, B and C are written to ``grads``, or to new tensors."""
        call, x, dt, A, B, C, D, dt_bias = self
        dx, ddt, dB, dC = grads or (t.new_empty(t.shape) for t in (x, dt, B, C))
        by_chunk = x.new_empty((call.batch * call.chunks, 3, call.heads), dtype=torch.float32)
        _backward_launch(call, _dtype(D), **{name: _strides(t) for name, t in (
            ('x', x), ('dy', dy), ('dt', dt), ('B', B), ('dx', dx), ('ddt', ddt), ('dB', dB),
            ('dC', dC))})(
            x_data=x.data_ptr(), dy_data=dy.data_ptr(), dt_data=dt.data_ptr(),
            B_data=B.data_ptr(), weigh_A=A.data_ptr(), weigh_bias=pointer(dt_bias), D=pointer(D),
            states=states.data_ptr(), dx_data=dx.data_ptr(), ddt_data=ddt.data_ptr(),
            dB_data=dB.data_ptr(), dC_data=dC.data_ptr(), parts=by_chunk.data_ptr())
        # Each is a tensor of its own, not a view at an odd place of memory.
        dA, dbias, dD = (None if t is None else part.to(t.dtype, copy=True)
                         for part, t in zip(by_chunk.sum(0), (A, dt_bias, D), strict=True))
        return dx, ddt, dA, dB, dC, dD, dbias


def forward(x, dt, A, B, C, D, dt_bias, dt_softplus, positive) -> Tensor:
    """Shapes as in :func:`vmamba_mm.ops.nc_ssd`."""
    inputs = _Inputs.of(x, dt, A, B, C, D, dt_bias, dt_softplus, positive)
    y, states = x.new_empty(x.shape), x.new_empty(inputs.call.state_size)
    inputs.find_states(states)
    inputs.multiply(states, y)
    return y


def backward(grad, x, dt, A, B, C, D, dt_bias, dt_softplus, positive):
    """Gradients by x, dt, A, B, C, D and dt_bias (None where there is none)."""
    inputs, dy = _Inputs.of(x, dt, A, B, C, D, dt_bias, dt_softplus, positive), _map(grad)
    states = x.new_empty(2 * inputs.call.state_size)
    inputs.find_states(states, jobs=2, dy=dy)
    return inputs.backward(states, dy)


# --- with a norm and a gate -------------------------------------------------------------------

def why_not_norm(x, dt, A, B, C, D, dt_bias, z, norm_weight, norm_bias, dt_softplus, positive, eps
                 ) -> str | None:
    """The reason why the kernels cannot take these inputs of ``nc_ssd_norm``, or None."""
    (_, _, heads, dim), (groups, state) = x.shape, B.shape[2:]
    if groups > 1:
        return f'{groups} groups; the norm is over the channels of one'
    if z.dtype != x.dtype:
        return f'z is {z.dtype}, and x {x.dtype}'
    if (reason := why_not_channels(x, heads * dim, (norm_weight, norm_bias))) is not None:
        return reason
    if (reason := why_not(x, dt, A, B, C, D, dt_bias, dt_softplus, positive)) is not None:
        return reason
    return _why_not_norm_here(x.device.index, x.dtype.itemsize, heads * dim, state)


@torch.compiler.assume_constant_result
def _why_not_norm_here(index: int, size: int, columns: int, state: int) -> str | None:
    shared, most = _Output(columns, 1).shared(size, _padded(state), True), device_limits(index)[2]
    if shared > most:
        return f'{columns} channels need {shared} bytes of shared memory, and this GPU has {most}'
    return None


def _gate(z: Tensor) -> Tensor:
    """With rows that are evenly spaced and begin at multiples of 16 bytes."""
    b, l, last = z.stride()  # noqa: E741
    if last != 1 or b != l * z.shape[1] and len(z) > 1 or l * z.itemsize % 16 \
            or z.data_ptr() % 16 or l >= 2**31 or l < z.shape[2]:
        return scan_kernels.dense(z)
    return z


def forward_norm(x, dt, A, B, C, D, dt_bias, z, norm_weight, norm_bias, dt_softplus, positive, eps,
                 save) -> tuple[Tensor, Tensor, Tensor]:
    """(result, states, moments), empty for the last two unless ``save``."""
    inputs = _Inputs.of(x, dt, A, B, C, D, dt_bias, dt_softplus, positive)
    call, z, norm_weight = inputs.call, _gate(z), norm_weight.contiguous()
    norm_bias = norm_bias.to(norm_weight.dtype).contiguous()
    y, states = x.new_empty(z.shape), x.new_empty(call.state_size)
    moments = x.new_empty((call.batch * call.length if save else 0, 2), dtype=torch.float32)
    inputs.find_states(states)
    _output_launch(call, _dtype(D), _strides(inputs.x), _strides(inputs.C),
                   _Strides(*y.stride()[:2], call.dim), _Strides(*z.stride()[:2], call.dim),
                   norm_weight.dtype)(
        x_data=inputs.x.data_ptr(), C_data=inputs.C.data_ptr(), y_data=y.data_ptr(),
        states=states.data_ptr(), D=pointer(inputs.D), z_data=z.data_ptr(),
        norm_weight=norm_weight.data_ptr(), norm_bias=norm_bias.data_ptr(),
        moments=moments.data_ptr() if save else 0, eps=eps)
    return y, states if save else x.new_empty(0), moments


def backward_norm(grad, x, dt, A, B, C, D, dt_bias, z, norm_weight, norm_bias, states, moments,
                  dt_softplus, positive, eps, grads=None, dz=None):
    """Gradients by the ten tensors, of which some may have a place, as in ``_Inputs.backward`` and
    ``gated_backward``; the result before the norm is calculated again."""
    inputs = _Inputs.of(x, dt, A, B, C, D, dt_bias, dt_softplus, positive)
    y = x.new_empty(x.shape)
    inputs.multiply(states, y)
    dy, dweight, dbias, dz = norm.gated_backward(grad, y.flatten(2), moments, norm_weight,
                                                 norm_bias, _gate(z), dz)
    del y
    dy = dy.view(x.shape)
    both = x.new_empty(2 * inputs.call.state_size)
    both[:inputs.call.state_size].copy_(states)
    inputs.find_states(both, first=1, dy=dy)
    return *inputs.backward(both, dy, grads), dz, dweight, dbias.to(norm_bias.dtype)
