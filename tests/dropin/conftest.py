import pytest

import vmamba_mm.dropin


@pytest.fixture(autouse=True)
def dropin():
    """mamba_ssm and the others are importable in the test, and gone after it."""
    vmamba_mm.dropin.install()
    yield vmamba_mm.dropin
    vmamba_mm.dropin.uninstall()
