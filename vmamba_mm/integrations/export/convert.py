"""A model as a file of another runtime, which is run and compared before anyone else gets it."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vmamba_mm.errors import UserError
from vmamba_mm.integrations.export.network import Network
from vmamba_mm.integrations.export.targets import TARGETS

DTYPES = {'fp32': torch.float32, 'fp16': torch.float16}
#: The largest difference of a number by the largest number of its tensor.
LIMITS = {'fp32': 1e-4, 'fp16': 2e-2}


@dataclass(frozen=True)
class Report:
    """What became of a model.

    Attributes:
        nodes: of the graph, those of loops' bodies too; None where that says nothing.
        size: of all files, in bytes.
        errors: by the shape of the images, the largest difference from the model in fp32 by the
            largest number of its tensor.
        limit: that of the errors.
        ms, eager_ms: of a call with one image, and of the model in fp32 as it is.
    """

    nodes: int | None
    size: int
    errors: dict[tuple[int, ...], float]
    limit: float
    ms: float
    eager_ms: float

    @property
    def is_right(self) -> bool:
        return all(error <= self.limit for error in self.errors.values())  # NaN is not

    def lines(self) -> list[str]:
        nodes = '' if self.nodes is None else f'{self.nodes:,} nodes, '
        return [f'{nodes}{self.size / 1e6:.1f} MB',
                *(f'images {" x ".join(map(str, shape))}: largest error {error:.1e} '
                  f'(limit {self.limit:.0e})' for shape, error in self.errors.items()),
                f'one image: {self.ms:.1f} ms, PyTorch {self.eager_ms:.1f} ms '
                f'({self.eager_ms / self.ms:.2f} x its speed; {torch.get_num_threads()} thread(s))']


def export_model(model: nn.Module, to: str, file: str | Path, *, size: Sequence[int] = (224, 224),
                 is_dynamic: bool = False, dtype: str = 'fp32') -> Report:
    """Write a model as a file of another runtime, run the file and compare it with the model.

    The file takes one input, ``image``: (B, C, H, W), normalised as the model's data preprocessor
    does, for any B.

    Args:
        model: a classifier, a segmentor, a detector (of which the backbone and the neck are
            written), a backbone, or one of timm. It becomes a network for inference on the CPU.
        to: 'onnx', 'openvino', 'pt2' (AOTInductor) or 'tensorrt'.
        file: the path; its ending is that of the runtime, such as .onnx.
        size: height and width of the images that the file takes.
        is_dynamic: whether it takes any size, ``size`` being that of the example.
        dtype: 'fp32', or 'fp16' for weights and activations in halves; scans calculate in fp32.

    Raises:
        UserError: on a runtime that does not exist or is not here, a wrong path, a size that the
            model does not take, or a model that cannot be exported so.
    """
    file = Path(file)
    if to not in TARGETS:
        raise UserError(f'--to {to} does not exist; choose one of {", ".join(TARGETS)}')
    if dtype not in DTYPES:
        raise UserError(f'--dtype {dtype} does not exist; choose one of {", ".join(DTYPES)}')
    target = TARGETS[to]
    target.check(to)
    if is_dynamic and target.is_fixed:
        others = ' or '.join(key for key, other in TARGETS.items() if not other.is_fixed)
        raise UserError(f'a file for --to {to} takes one image of one size: leave out --dynamic '
                        f'and choose --size, or choose --to {others}')
    if file.suffix != target.suffix:
        raise UserError(f'a file for --to {to} ends with {target.suffix}, got {file}')
    if not file.absolute().parent.is_dir():
        raise UserError(f'the folder of {file} does not exist')
    network = Network(model.cpu().float())
    example = torch.randn(1, _channels(model), *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            network(example)
    except Exception as err:
        first = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise UserError(f'the model does not take images of {size[0]} x {size[1]} pixels, choose '
                        f'another --size: {first}') from err
    written = network
    if dtype == 'fp16':
        written = copy.deepcopy(network).half()
    target.write(written, example.to(DTYPES[dtype]), is_dynamic, file)
    run = target.load(file)
    errors: dict[tuple[int, ...], float] = {}
    for image in _images(network, example, is_dynamic, target.is_fixed):
        try:
            error = _error(run, network, image, DTYPES[dtype])
        except Exception as err:
            raise UserError(f'{file} does not run on images {" x ".join(map(str, image.shape))}: a '
                            'larger example, or a fixed --size without --dynamic, may help '
                            f'({" ".join(str(err).split())[-200:]})') from err
        errors[tuple(image.shape)] = max(error, errors.get(tuple(image.shape), 0.0))
    with torch.no_grad():
        half = example.to(DTYPES[dtype])
        ms, eager_ms = _times(lambda: run(half), lambda: network(example))
    files = [file, *file.parent.glob(f'{file.name}.data'), *(
        [file.with_suffix('.bin')] if file.suffix == '.xml' else [])]
    return Report(target.nodes and target.nodes(file), sum(f.stat().st_size for f in files), errors,
                  LIMITS[dtype], ms, eager_ms)


def _channels(model: nn.Module) -> int:
    """Those of the images, by the first convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels // module.groups
    return 3


def _images(network: Network, example: Tensor, is_dynamic: bool, is_fixed: bool) -> list[Tensor]:
    """Images to compare by: of other batches and sizes, where the file takes them."""
    channels, height, width = example.shape[1:]
    shapes = [(1 if is_fixed else 3, height, width)]
    if is_dynamic:
        shapes += [(1, height + 37, width + 3), (2, height, 2 * width)]
    images = [example, *(torch.randn(batch, channels, *size) for batch, *size in shapes)]
    kept = []
    for image in images:
        try:
            with torch.no_grad():
                network(image)
        except Exception:  # the model itself does not take this size
            continue
        kept.append(image)
    return kept


def _error(run: Callable, network: Network, image: Tensor, dtype: torch.dtype) -> float:
    with torch.no_grad():
        outputs, expected = run(image.to(dtype)), network(image)
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return float('inf')
    return max(((y.float() - e).abs().max() / e.abs().max().clamp_min(1e-30)).item()
               for y, e in zip(outputs, expected, strict=True))


def _times(*functions: Callable, seconds: float = 2.0, most: int = 50) -> list[float]:
    """The median ms of a call of each, in turn so that a change of the machine's load meets all."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    started = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - started < seconds and len(times[0]) < most):
        for function, of_function in zip(functions, times, strict=True):
            begun = time.perf_counter()
            function()
            of_function.append((time.perf_counter() - begun) * 1e3)
    return [statistics.median(of_function) for of_function in times]
