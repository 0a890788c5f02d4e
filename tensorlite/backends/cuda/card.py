"""What is known of the GPU that the backend runs on."""

from typing import NamedTuple

from tensorlite.backends.base import BackendError

OWN_BYTES = 9 << 10  # of shared memory, at most, that a kernel itself declares
SHARED_BYTES = (48 << 10) - OWN_BYTES  # that it has beside those without asking for more


class Card(NamedTuple):
    """Asked once, at the start: a device that has failed answers nothing."""

    name: str
    capability: int  # compute capability: 90 is 9.0
    shared: int  # bytes of shared memory that a kernel can ask for
    machine: str  # all of it in words, and what drives it

    @classmethod
    def of(cls, cupy) -> "Card":
        """The current device of `cupy`, the module or what stands for it."""
        runtime = cupy.cuda.runtime
        device, driver = runtime.getDeviceProperties(runtime.getDevice()), runtime.driverGetVersion()
        name, capability = device["name"].decode(), 10 * device["major"] + device["minor"]
        cuda = f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}, CuPy {cupy.__version__}"
        machine = f"{name}, compute capability {capability / 10}, {cuda}"
        return cls(name, capability, device["sharedMemPerBlockOptin"] - OWN_BYTES, machine)

    def share(self, kernel: str, function, size: int) -> None:
        """Let this kernel have so many bytes of shared memory. BackendError if the card has less."""
        if size > self.shared:
            raise BackendError(
                f"{kernel} needs {size:,} bytes of shared memory for so many tokens, and a block has {self.shared:,} "
                f"on {self.name}: take a smaller --block-size, or --backend numpy"
            )
        if size > SHARED_BYTES:
            function.max_dynamic_shared_size_bytes = size
