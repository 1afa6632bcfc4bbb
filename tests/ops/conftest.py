import pytest
import torch
from kernel_folder import compilations, kernels_folder  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """Fill every ``torch.empty`` with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
