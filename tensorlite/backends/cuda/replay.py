"""Work on the GPU that is done again and again: captured as a CUDA graph, then launched as one."""

import contextlib
import gc
import threading

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, which CuPy has no name for
WARM_UP = 3  # calls before the capture: kernels are compiled and loaded, and memory is at hand


class GraphStream:
    """The stream that graphs are captured and launched on, and the memory for what is made in them.

    cupy: the module, or what stands for it. The memory is a pool of its own, or others would write into it between
    launches. Graphs share it: they are launched one after the other, and none leaves anything for later. What lies idle
    in the common pool is given back when it is needed, but not while capturing, when to free memory may be an error.
    """

    def __init__(self, cupy):
        self._cuda, self._memory, self._give_back = cupy.cuda, [], cupy.get_default_memory_pool().free_all_blocks
        self._lock = threading.RLock()  # what one thread launches would get into the graph of another
        self._give_back()
        self.stream, self._pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool(self._allocate)

    def _allocate(self, size: int):
        """What the pool is made of. It is kept here: a pool short of memory gives back what lies idle, where graphs
        still write."""
        try:
            self._memory.append(self._cuda.Memory(size))
        except self._cuda.runtime.CUDARuntimeError as error:
            if error.status != OUT_OF_MEMORY or self.stream.is_capturing():
                raise
            self._give_back()
            self._memory.append(self._cuda.Memory(size))
        return self._cuda.MemoryPointer(self._memory[-1], 0)

    @contextlib.contextmanager
    def at_work(self):
        """Within it work goes to the stream, after what was begun before and before what comes after."""
        with self._lock:
            outer = self._cuda.get_current_stream()
            self.stream.wait_event(outer.record())
            try:
                with self.stream, self._cuda.using_allocator(self._pool.malloc):
                    yield
            finally:  # of work that failed, too: what it reads is saved then
                outer.wait_event(self.stream.record())

    def capture(self, function):
        """A graph of what function() launches."""
        self._give_back()
        collecting = gc.isenabled()
        gc.disable()  # an object that gives something of the device back would end the capture
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
    """`replay()` does what `function()` does. After a few calls it is captured, and from then on launched as a graph,
    which spares the CPU the launching of every kernel. Without a stream for that it is called each time.

    What `function` reads and writes lies in arrays that exist before, and so does whatever changes from call to call:
    a graph holds the addresses of arrays and the values of numbers. Nothing in it may wait for the device or come
    from the host, and no array made in it may be used after it.
    """

    def __init__(self, stream: GraphStream | None, function):
        self._stream, self._function = stream, function
        self._calls, self._graph = 0, None

    def __call__(self) -> None:
        if self._stream is None:
            self._function()
            return
        self._calls += 1
        with self._stream.at_work():
            if self._calls <= WARM_UP:
                self._function()
                return
            if self._graph is None:
                self._graph = self._stream.capture(self._function)
            self._graph.launch(self._stream.stream)
