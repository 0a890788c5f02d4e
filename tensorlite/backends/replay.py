"""Work on the GPU that is done again and again: recorded as a CUDA graph, then launched as one."""

import contextlib
import gc
import sys
import threading

WARM_UP = 3  # calls before the recording: kernels are compiled and loaded, and memory is at hand
SLOW = 2.0  # seconds that the first call may take before its user is told why


class Replay:
    """`replay()` does what `function()` does. After a few calls it is recorded, and from then on launched as a graph,
    which spares the CPU the launching of every kernel; without `graph` it is called each time.

    What `function` reads and writes lies in arrays that exist before, and so does whatever changes from call to call:
    a recording holds the addresses of arrays and the values of numbers. Nothing in it may wait for the device or come
    from the host, and no array made in it may be used after it.

    The memory for what it makes is of a pool of the recording's own, or others would write into it between launches.
    cupy: the module, or what stands for it.
    """

    def __init__(self, cupy, function, graph: bool = True):
        self._cupy, self._function, self._wanted = cupy, function, graph
        self._calls, self._graph = 0, None

    def __call__(self) -> None:
        self._calls += 1
        with announce_compilation() if self._calls == 1 else contextlib.nullcontext():
            if self._wanted:
                self._call_or_launch()
            else:
                self._function()

    def _call_or_launch(self) -> None:
        cuda = self._cupy.cuda
        if self._calls == 1:
            self._stream, self._pool = cuda.Stream(non_blocking=True), cuda.MemoryPool()
        outer = cuda.get_current_stream()
        self._stream.wait_event(outer.record())
        with self._stream, cuda.using_allocator(self._pool.malloc):
            if self._calls <= WARM_UP:
                self._function()
            else:
                if self._graph is None:
                    self._graph = self._record()
                self._graph.launch(self._stream)
        outer.wait_event(self._stream.record())

    def _record(self):
        collecting = gc.isenabled()
        gc.disable()  # an object that gives something of the device back would end the recording
        self._stream.begin_capture()
        try:
            self._function()
        except BaseException:
            with contextlib.suppress(Exception):
                self._stream.end_capture()
            raise
        finally:
            if collecting:
                gc.enable()
        return self._stream.end_capture()


@contextlib.contextmanager
def announce_compilation():
    """Within it, say what takes so long if it does."""
    text = "the first step compiles the GPU's kernels; this takes a minute, once on a machine"
    timer = threading.Timer(SLOW, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
