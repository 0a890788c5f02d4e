"""Ctrl-C and termination at a moment that does no harm."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def interrupt_on_terminate() -> None:
    """Let SIGTERM, with which schedulers stop a job, do what Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Within `with hold_interrupts():` Ctrl-C and SIGTERM wait until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only ever interrupt the main thread
        return
    came: list[int] = []
    handlers = {s: signal.signal(s, lambda number, frame: came.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
        for number in came:  # also when the block failed: its error then becomes the context
            signal.raise_signal(number)
