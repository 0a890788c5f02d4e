"""Fixtures for every test: the backends, and a check that no test leaves a global state behind."""

import pytest

from tensorlite import BackendError, get_backend, manual_seed, random
from tensorlite.autograd import mode


@pytest.fixture(scope="session", params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request):
    """Each backend in turn; a test is skipped where its backend cannot run, with the reason."""
    try:
        return get_backend(request.param)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def no_leaks():
    """Every test starts from seed 0, and fails if it leaves `no_grad` on or a random scope open."""
    manual_seed(0)
    yield
    recording, scope = mode.recording, random.current()
    mode.recording = True
    manual_seed(0)
    assert recording, "the test left gradients switched off"
    assert not hasattr(scope, "outer"), "the test left a random scope open"
