"""The runtimes that a network is exported to: what is needed, how a file is written and run."""

import importlib.util
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vmamba_mm.errors import UserError
from vmamba_mm.integrations.export import native
from vmamba_mm.integrations.export.network import AnySize, Network
from vmamba_mm.ops.plain import plain_ops

OPSET = 20
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Target:
    """A runtime.

    Args:
        suffix: of its files.
        modules: that must be there.
        install: how they come.
        write: write(network, example, is_dynamic, file) makes the file.
        load: load(file) gives what runs it.
        nodes: nodes(file) counts what the graph consists of; None where that says nothing.
        is_fixed: whether its files take the example's batch and size only.
    """

    suffix: str
    modules: tuple[str, ...]
    install: str
    write: Callable[[Network, Tensor, bool, Path], None]
    load: Callable[[Path], Run]
    nodes: Callable[[Path], int] | None = None
    is_fixed: bool = False

    def check(self, name: str) -> None:
        """Raise UserError unless the runtime is here."""
        missing = [m for m in self.modules if importlib.util.find_spec(m) is None]
        if missing:
            others = [key for key, target in TARGETS.items() if key != name and all(
                importlib.util.find_spec(m) for m in target.modules)]
            instead = f', or choose --to {" or ".join(others)}' if others else ''
            raise UserError(f'--to {name} needs {", ".join(missing)}: {self.install}{instead}')


def record(network: Network, example: Tensor, is_dynamic: bool, way: str, is_fixed: bool = False
           ) -> torch.export.ExportedProgram:
    """The network as a graph without our ops, for any batch (unless ``is_fixed``) and, if asked
    for, any size.

    Raises:
        UserError: where something binds the network to a size.
    """
    dynamic = {0: torch.export.Dim.DYNAMIC}
    if is_dynamic:
        dynamic.update({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC})
    # A batch of one would be taken for a number that never changes.
    batch = example if is_fixed else torch.cat((example, example.roll(1, -1)))
    with torch.no_grad(), plain_ops(way), AnySize(), _quiet():
        try:
            return torch.export.export(
                network, (batch,), dynamic_shapes=None if is_fixed else (dynamic,))
        except NotImplementedError as err:
            raise UserError(f'this model cannot be exported: {err}') from err
        except Exception as err:
            if not is_dynamic:
                raise
            height, width = example.shape[2:]
            raise UserError(
                'this model cannot be exported for images of any size, since a part of it is made '
                f'for one: leave out --dynamic and choose --size {height} {width} or another '
                f'({type(err).__name__}: {" ".join(str(err).split())[:160]})') from err


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell those who develop them."""
    loggers = [logging.getLogger(name) for name in (
        'torch.onnx', 'onnxscript', 'torch.export', 'torch._export', 'torch._dynamo')]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# --- ONNX -----------------------------------------------------------------------------------------

def _write_onnx(network: Network, example: Tensor, is_dynamic: bool, file: Path, way: str = 'node'
                ) -> None:
    from vmamba_mm.integrations.export.translations import translations

    program = record(network, example, is_dynamic, way)
    count = len(network(example))
    names = network.output_names if count == 1 else [f'map{i}' for i in range(count)]
    with _quiet():
        exported = torch.onnx.export(
            program, (), input_names=['image'], output_names=names, opset_version=OPSET,
            custom_translation_table=translations(), dynamo=True, verbose=False)
        exported.save(str(file))


def _load_onnx(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, ['CPUExecutionProvider'])
    return lambda image: [torch.from_numpy(y) for y in session.run(None, {'image': image.numpy()})]


def count_nodes(file: Path) -> Counter:
    """The nodes of an ONNX file by kind, those in the bodies of loops too.

    Raises:
        UserError: if there is one that is not of ONNX's standard.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    counts = Counter()
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        for node in graph.node:
            counts[node.op_type] += 1
            graphs += [a.g for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    domains = {entry.domain for entry in model.opset_import} - {'', 'ai.onnx'}
    if domains:
        raise UserError(f'{file} has operators of {", ".join(sorted(domains))}, which are not of '
                        'the standard')
    return counts


# --- OpenVINO -------------------------------------------------------------------------------------

def _write_openvino(network: Network, example: Tensor, is_dynamic: bool, file: Path) -> None:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / 'network.onnx'
        _write_onnx(network, example, is_dynamic, onnx_file, way='first')
        model = openvino.convert_model(str(onnx_file))
        openvino.save_model(model, str(file), compress_to_fp16=example.dtype == torch.float16)


def _load_openvino(file: Path) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(str(file), 'CPU', {
        'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda image: [torch.from_numpy(y) for y in compiled(image.numpy()).values()]


def _count_openvino(file: Path) -> int:
    import openvino

    return len(openvino.Core().read_model(str(file)).get_ops())


# --- AOTInductor ----------------------------------------------------------------------------------

def _write_pt2(network: Network, example: Tensor, is_dynamic: bool, file: Path) -> None:
    native.load()
    program = record(network, example, is_dynamic, 'native')
    with _quiet():
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    native.put_beside(file)


def _load_pt2(file: Path) -> Run:
    native.load()
    runner = torch._inductor.aoti_load_package(str(file))

    def run(image: Tensor) -> list[Tensor]:
        outputs = runner(image)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return run


# --- TensorRT -------------------------------------------------------------------------------------

def _write_tensorrt(network: Network, example: Tensor, is_dynamic: bool, file: Path) -> None:
    import torch_tensorrt

    if not torch.cuda.is_available():
        raise UserError('--to tensorrt builds an engine for the GPU at hand, and torch finds none '
                        'here: run it where the engine will run')
    program = record(network.cuda(), example.cuda(), is_dynamic, 'unrolled', is_fixed=True)
    engine = torch_tensorrt.dynamo.compile(program, arg_inputs=[example.cuda()],
                                           use_explicit_typing=True)
    torch_tensorrt.save(engine, str(file), arg_inputs=[example.cuda()])


def _load_tensorrt(file: Path) -> Run:
    import torch_tensorrt

    engine = torch_tensorrt.load(str(file)).module()
    return lambda image: [y.cpu() for y in engine(image.cuda())]


_EXTRA = "pip install 'vmamba_mm[export]'"
TARGETS = {
    'onnx': Target('.onnx', ('onnx', 'onnxscript', 'onnxruntime'), _EXTRA, _write_onnx, _load_onnx,
                   lambda file: count_nodes(file).total()),
    'openvino': Target('.xml', ('onnx', 'onnxscript', 'openvino'), _EXTRA, _write_openvino,
                       _load_openvino, _count_openvino),
    'pt2': Target('.pt2', (), '', _write_pt2, _load_pt2),
    'tensorrt': Target('.ep', ('torch_tensorrt',), 'pip install torch-tensorrt on a machine with '
                       'an NVIDIA GPU', _write_tensorrt, _load_tensorrt, is_fixed=True)}
