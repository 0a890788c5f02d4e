"""Work on the GPU that is done again and again: recorded as a CUDA graph, then launched as one."""

import contextlib
import gc
import sys
import threading

WARM_UP = 3  # calls before the recording: kernels are compiled and loaded, and memory is at hand
SLOW = 2.0  # seconds that the first call may take before its user is told why


class Recorder:
    """The stream that recordings are made and launched on, and the memory for what is made in them.

    cupy: the module, or what stands for it. The memory is a pool of its own, or others would write into it between
    launches. Recordings share it: they are launched one after the other, and none leaves anything for later.
    """

    def __init__(self, cupy):
        self._cuda = cupy.cuda
        cupy.get_default_memory_pool().free_all_blocks()  # one pool cannot have what lies idle in another
        self.stream, self._pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()

    @contextlib.contextmanager
    def at_work(self):
        """Within it work goes to the stream, after what was begun before and before what comes after."""
        outer = self._cuda.get_current_stream()
        self.stream.wait_event(outer.record())
        with self.stream, self._cuda.using_allocator(self._pool.malloc):
            yield
        outer.wait_event(self.stream.record())

    def record(self, function):
        """A graph of what function() launches."""
        collecting = gc.isenabled()
        gc.disable()  # an object that gives something of the device back would end the recording
        try:
            self.stream.begin_capture()
            try:
                function()
            except BaseException:
                with contextlib.suppress(Exception):
                    self.stream.end_capture()
                raise
            return self.stream.end_capture()
        finally:
            if collecting:
                gc.enable()


class Replay:
    """`replay()` does what `function()` does. After a few calls it is recorded, and from then on launched as a graph,
    which spares the CPU the launching of every kernel. Without a recorder it is called each time.

    What `function` reads and writes lies in arrays that exist before, and so does whatever changes from call to call:
    a recording holds the addresses of arrays and the values of numbers. Nothing in it may wait for the device or come
    from the host, and no array made in it may be used after it.
    """

    def __init__(self, recorder: Recorder | None, function):
        self._recorder, self._function = recorder, function
        self._calls, self._graph = 0, None

    def __call__(self) -> None:
        self._calls += 1
        with announce_compilation() if self._calls == 1 else contextlib.nullcontext():
            if self._recorder is None:
                self._function()
                return
            with self._recorder.at_work():
                if self._calls <= WARM_UP:
                    self._function()
                    return
                if self._graph is None:
                    self._graph = self._recorder.record(self._function)
                self._graph.launch(self._recorder.stream)


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
