"""Values on their way from the host to the device."""

import collections
import threading

import numpy as np

BUFFERS = 16  # a training step takes three, so that the host may be five steps ahead of the device


class Uploads:
    """`uploads(x, values)` copies values into the array x when the current stream comes to it, and waits for nothing.

    cupy: the module, or what stands for it. What a copy reads must still be there at its turn, and as it was: pinned
    memory, in a ring of buffers, each with the event of its last copy, which is over before the buffer is used again.
    Of pageable memory CUDA promises only that it "may" have been read when the call returns (its documentation, "API
    synchronization behavior").
    """

    def __init__(self, cupy):
        self._cuda, self._lock, self._ring = cupy.cuda, threading.Lock(), collections.deque()

    def __call__(self, x, values) -> None:
        with self._lock:
            full = len(self._ring) == BUFFERS
            buffer, copied = self._ring.popleft() if full else (None, self._cuda.Event(disable_timing=True))
            copied.synchronize()
            if buffer is None or buffer.size < x.nbytes:
                buffer = np.frombuffer(self._cuda.alloc_pinned_memory(x.nbytes), np.uint8)
            staged = buffer[: x.nbytes].view(x.dtype).reshape(x.shape)
            staged[...] = values
            x.set(staged)
            copied.record()
            self._ring.append((buffer, copied))
