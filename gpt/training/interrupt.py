"""Ctrl-C, termination and a closed terminal, at a moment that does no harm."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What asks a process to stop, as far as the system has it: SIGBREAK is Ctrl-Break, and Windows' alone.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal of that `number` asks to stop."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__(number)
        self.number = number


class InterruptOnce:
    """Within `with InterruptOnce() as interrupts:` the first of SIGNALS raises Interrupted. Those after it do nothing,
    at whatever distance they come, so that they cannot undo what is done about the first.

    A signal that is ignored, as SIGHUP is under nohup, stays so.
    """

    def __enter__(self) -> "InterruptOnce":
        self._came: int | None = None
        self._before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
        for s in self._before:
            signal.signal(s, self._interrupt)
        return self

    def __exit__(self, *exc) -> None:
        for s, handler in self._before.items():  # of a process that has been told to stop no signal disturbs the end
            signal.signal(s, handler if self._came is None else signal.SIG_IGN)

    def check(self) -> None:
        """Raise again what came: an exception is lost where Python cannot pass it on, as in a finaliser."""
        if self._came is not None:
            raise Interrupted(self._came)

    def _interrupt(self, number: int, frame) -> None:
        if self._came is None:
            self._came = number
            raise Interrupted(number)


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Within `with hold_interrupts():` the SIGNALS wait until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only ever interrupt the main thread
        return
    came: list[int] = []
    handlers = {s: signal.signal(s, lambda number, frame: came.append(number)) for s in SIGNALS}
    try:
        yield
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        for number in came:  # also when the block failed: its error then becomes the context
            signal.raise_signal(number)
