import os

import emulated_cuda
import pytest
import torch
from kernel_folder import compilations, kernels_folder  # noqa: F401 (fixtures)


@pytest.fixture(scope='session')
def compiled(tmp_path_factory):
    """A folder for emulated kernels (emulated_cuda.py): one for all processes of a run."""
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    (folder / 'emulated_kernels').mkdir(exist_ok=True)
    return folder / 'emulated_kernels'


@pytest.fixture(params=['sm_90', pytest.param('cuda', marks=pytest.mark.gpu(nvidia=True))])
def device(request):
    """'cuda', or a GPU that is emulated on the CPU; a test may have others as its parameters."""
    return request.param


@pytest.fixture
def place(device, compiled):
    """The device of tensors, in a context where the kernels run on it."""
    if device == 'cuda':
        yield 'cuda'
        return
    if emulated_cuda.IS_MISSING:
        pytest.skip('needs Linux and a C++ compiler')
    with emulated_cuda.emulated_gpu(compiled, (int(device[3]), int(device[4]))):
        yield 'cpu'


@pytest.fixture(params=['emulated', emulated_cuda.CUDA, 'sm_75'])
def kernels(request, compiled):
    """'cpu', where the kernels are emulated, or 'cuda'."""
    with emulated_cuda.with_kernels(request.param, compiled) as device:
        yield device


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Fill every ``torch.empty`` with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=os.environ.get('TRITON_INTERPRET') == '1')
def numbers_are_indices(monkeypatch):
    """Triton 3.6 takes int() of an array of shape (1,) for the bounds of a loop: NumPy 2.4 refuses.

    It is the interpreter alone that does so; compiled kernels have no NumPy in them.
    """
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor, *scope):
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    monkeypatch.setattr(interpreter, '_patch_lang_tensor', patch_and_mend)
