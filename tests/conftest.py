"""Fixtures for every test: the backends, and a check that no test leaves a global state behind."""

import shutil
import sys
from pathlib import Path

import browser as chromium
import cuda_on_cpu
import pytest
import strict_cuda
import strict_cupy
from scripts import NOWHERE, train

import gpt.text.sources
import tensorlite.backends
from tensorlite import BackendError, get_backend, manual_seed, random
from tensorlite.autograd import mode


@pytest.fixture(scope="session")
def gpu():
    """The CupyBackend over CuPy; a test is skipped where that cannot run, with the reason."""
    try:
        return get_backend("cupy")
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def backend(request):
    """Each backend in turn, where it can run."""
    return get_backend("numpy") if request.param == "numpy" else request.getfixturevalue("gpu")


@pytest.fixture
def device(monkeypatch):
    """The CupyBackend over the stand-in, loaded as it would be over CuPy, with its kernels run on the CPU."""
    if cuda_on_cpu.MISSING:
        pytest.skip(cuda_on_cpu.MISSING)
    for name, module in strict_cupy.MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    for registry in ("_by_name", "_by_type"):
        monkeypatch.setattr(tensorlite.backends, registry, dict(getattr(tensorlite.backends, registry)))
    tensorlite.backends._by_name.pop("cupy", None)
    yield get_backend("cupy")
    strict_cuda.forget_copies()


@pytest.fixture(params=["stand-in", pytest.param("gpu", marks=pytest.mark.gpu)])
def cuda(request):
    """The CupyBackend over the stand-in, and over CuPy where there is a GPU."""
    if request.param == "stand-in":
        return request.getfixturevalue("device")
    backend = request.getfixturevalue("gpu")
    backend.graph, backend.tf32 = True, False  # whatever an earlier test has set
    return backend


@pytest.fixture(scope="module")  # and no longer: there are tests that look for children which should be none
def browser():
    """A headless Chromium; see tests/browser.py."""
    with chromium.started() as driver:
        yield driver


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """No run in this process draws its losses, which takes longer than to train; those of tests/test_runs.py do."""
    monkeypatch.setattr("gpt.training.session.draw_run", lambda *_: None)


@pytest.fixture(autouse=True)
def no_leaks():
    """Every test starts from seed 0, and fails if it leaves `no_grad` on or a random scope open."""
    manual_seed(0)
    yield
    recording, outer = mode.recording, random._current.outer
    mode.recording, random._current.outer = True, None
    manual_seed(0)
    assert recording, "the test left gradients switched off"
    assert outer is None, "the test left a random scope open"


@pytest.fixture
def cwd(tmp_path, monkeypatch) -> Path:
    """An empty folder to be in, without a cache or a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr(gpt.text.sources, "SHAKESPEARE_URL", NOWHERE)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The folder in which a tiny run of 20 steps, with dropout, went undisturbed into run/."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "stdout").write_text(train(folder, "--out", "run").stdout)
    return folder


@pytest.fixture
def copy(finished, cwd) -> Path:
    """A copy of it to play with, as the current folder."""
    shutil.copytree(finished, cwd, dirs_exist_ok=True)
    return cwd / "run"
