"""The GPU backend. This is the only module that imports cupy."""

from tensorlite.backends.base import Backend, BackendError

_INSTALL = "pip install cupy-cuda12x, or cupy-cuda13x if `nvidia-smi` shows CUDA 13"


class CupyBackend(Backend):
    name = "cupy"

    def __init__(self, cupy, special):
        self.xp = cupy
        self._special = special

    def to_numpy(self, x):
        return self.xp.asnumpy(x)

    def erf(self, x):
        return self._special.erf(x)


def load() -> CupyBackend:
    """The backend, if there is a CuPy with a device to run on. BackendError says what is missing."""
    try:
        import cupy
        from cupyx.scipy import special
    except ImportError as error:
        raise BackendError(f"the cupy backend cannot import CuPy ({error}): {_INSTALL}") from None
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(
            f"the cupy backend found CuPy {cupy.__version__} but no usable GPU ({error}): "
            "install or update the NVIDIA driver, or use --backend numpy"
        ) from None
    if devices == 0:
        raise BackendError("the cupy backend found no NVIDIA GPU on this machine: use --backend numpy")
    return CupyBackend(cupy, special)
