"""Workers: one job at a time on several cores, on arrays that the workers share.

Every worker runs the same function and takes its share of the work. On Linux the workers are this process and forked
copies of it: threads would hand the interpreter's lock to one another at every NumPy call, which takes a third of a
small model's step. Elsewhere a fork is not safe, and they are threads.

The workers form a ring of pipes. Each reads from the one before it and writes to the one after it: commands, turns and
reports of being done travel round the ring, and so does the news that a worker is gone, as the end of its pipe.
"""

import contextlib
import ctypes
import os
import select
import signal
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from gpt.errors import UserError
from gpt.training.interrupt import SIGNALS, hold_interrupts

PROCESSES = sys.platform == "linux" and hasattr(os, "fork") and Path("/proc/self/fd").exists()

_COMMAND = struct.Struct("<bq")  # which function, its argument
_TURN, _DONE = b"t", b"d"

# How often a process looks for a message, a millisecond in all, before it sleeps: most come sooner, and to be woken
# takes longer than the work between two turns of a small model. Worth 3 % of its step.
_LOOKS = 1000


_PR_SET_PDEATHSIG = 1  # of prctl: the signal to get when the caller ends


class WorkerLostError(UserError):
    """A worker was killed, or failed and has said why."""


class WorkerGone(Exception):  # noqa: N818 - as StopIteration, the way to end rather than a mistake
    """The worker at the other end of a pipe has ended."""


class Worker:
    """Number `index` of `count` workers, and its two ends of the ring's pipes."""

    def __init__(self, index: int, count: int, source: int, sink: int):
        self.index, self.count, self.source, self.sink = index, count, source, sink
        if PROCESSES:
            os.set_blocking(source, False)

    def share(self, items: Sequence) -> Sequence:
        """Every count-th item, beginning with the worker's own."""
        return items[self.index :: self.count]

    def wait_turn(self) -> None:
        """Wait until the worker before this one has called `pass_turn` once more."""
        if self.count > 1:
            self.receive(_TURN)

    def pass_turn(self) -> None:
        if self.count > 1:
            self.send(_TURN)

    def send(self, message: bytes) -> None:
        try:
            os.write(self.sink, message)
        except BrokenPipeError:
            raise WorkerGone from None

    def receive(self, expected: bytes) -> None:
        message = self.read(len(expected))
        assert message == expected, f"worker {self.index}: expected {expected!r}, got {message!r}"

    def read(self, size: int) -> bytes:
        message, looks = b"", 0
        while len(message) < size:
            try:
                piece = os.read(self.source, size - len(message))
            except BlockingIOError:  # nothing there yet
                looks += 1
                if looks > _LOOKS:
                    ready = select.poll()
                    ready.register(self.source, select.POLLIN)
                    ready.poll()
                continue
            if not piece:
                raise WorkerGone
            message += piece
        return message

    def close(self) -> None:
        os.close(self.source)
        os.close(self.sink)


class Workers:
    """`count` workers that run `functions` together: each is called as function(worker, argument).

    The caller is worker 0. The others are processes, or threads if not PROCESSES; a process sees the caller's memory as
    it was when it was made, but for shared arrays.
    """

    def __init__(self, count: int, functions: dict[str, Callable]):
        self._functions = functions = {"ready": lambda worker, argument: None} | functions
        self._names = list(functions)
        self._stop: list[Callable] = []  # ends one worker each
        self._me, others = None, []
        try:
            ring = [os.pipe() for _ in range(count)]  # ring[k] leads from worker k to the next
            others = [Worker(k, count, ring[k - 1][0], ring[k][1]) for k in range(1, count)]
            self._me = Worker(0, count, ring[-1][0], ring[0][1])
            for worker in others:
                self._start(worker)
        except (OSError, RuntimeError) as error:  # RuntimeError: of a thread
            self.close()
            why = getattr(error, "strerror", None) or error
            raise UserError(f"cannot start {count} workers: {why}; lower --threads") from None
        finally:
            for worker in others if PROCESSES else ():
                worker.close()  # the copies have theirs
        self.run("ready")  # and no file of the caller's any more, such as a lock

    def run(self, name: str, argument: int = 0, **local) -> None:
        """Run one of the functions on every worker, and return when all are done.

        local: keyword arguments for the caller's own call.
        """
        me = self._me
        if me is None:
            raise RuntimeError("Workers: used after close(), or after a job that failed")
        try:
            if me.count > 1:
                me.send(_COMMAND.pack(self._names.index(name), argument))
            self._functions[name](me, argument, **local)
            if me.count > 1:
                me.receive(_DONE)
        except WorkerGone:
            self.close()
            raise WorkerLostError("a worker process was killed; is the memory full? Lower --threads") from None
        except BaseException:
            self.close()  # the ring is in a state that nobody knows
            raise

    def close(self) -> None:
        """End the other workers, at once if they are processes."""
        if self._me:
            self._me.close()
            self._me = None
            for stop in self._stop:
                stop()

    def _start(self, worker: Worker) -> None:
        if not PROCESSES:
            thread = threading.Thread(target=self._serve, args=(worker,), daemon=True)
            thread.start()
            self._stop.append(thread.join)
            return
        caller = os.getpid()
        with hold_interrupts(), warnings.catch_warnings():
            # Python warns of forking beside threads, for a lock that one of them holds stays taken in the copy. BLAS's
            # are the ones there are; it stops them before a fork.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
            if pid == 0:
                try:
                    # Ctrl-C and a scheduler's signal reach all processes; it is for the caller to end the step.
                    for number in SIGNALS:
                        signal.signal(number, signal.SIG_IGN)
                    _close_all_but(worker.source, worker.sink)
                    if _end_with(caller):
                        self._serve(worker)
                finally:
                    os._exit(0)  # leaving what the caller has yet to write and to clean up alone
        self._stop.append(lambda: (os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)))

    def _serve(self, me: Worker) -> None:
        """Run what comes round the ring, until the worker before this one or the one after it is gone."""
        try:
            while True:
                command = me.read(_COMMAND.size)
                if me.index < me.count - 1:
                    me.send(command)
                which, argument = _COMMAND.unpack(command)
                self._functions[self._names[which]](me, argument)
                if me.index > 1:
                    me.receive(_DONE)
                me.send(_DONE)
        except (WorkerGone, MemoryError):
            pass  # the caller says it
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)  # in a forked process sys.stderr may have been closed
        finally:
            me.close()  # the news for the caller, who may then end this process at once


def _close_all_but(*kept: int) -> None:
    """Close the caller's files, of which a forked process has copies: a lock, say, lasts until all are closed. Standard
    output and error stay."""
    for descriptor in (int(entry.name) for entry in Path("/proc/self/fd").iterdir()):
        if descriptor > 2 and descriptor not in kept:
            with contextlib.suppress(OSError):  # the list's own
                os.close(descriptor)


def _end_with(caller: int) -> bool:
    """Let this process be killed when `caller` ends, which made it; whether it is still there. The end of a pipe would
    be noticed only between two jobs, and an evaluation is a long one."""
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) == 0 and os.getppid() == caller
