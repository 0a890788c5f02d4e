"""What a training run tells the user: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

from gpt.terminal import say, show

READ_SECONDS = 0.2  # how often the loss is read back and shown; reading makes a GPU wait
LINE_SECONDS = 30.0  # how often a plain line is printed when there is no terminal


class Reporter:
    """Lines go to standard output, the progress bar to standard error."""

    def __init__(self, first_step: int, last_step: int):
        self.first, self.last = first_step, last_step
        self.start = self.shown = self.printed = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            self.bar = tqdm(total=last_step, initial=first_step, unit="step", dynamic_ncols=True)

    def line(self, text: str = "") -> None:
        """A line of output that stays."""
        with tqdm.external_write_mode():  # without the bar
            say(text)

    def text(self, text: str) -> None:
        """Text of a model's, which is shown as it is."""
        with tqdm.external_write_mode():
            show(text)

    def due(self) -> bool:
        """Whether it is time to read the loss back, or to show anything."""
        return time.monotonic() - self.shown >= READ_SECONDS

    def step(self, step: int, loss: float) -> None:
        """`step` steps are done, the last one at this loss."""
        self.shown = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif self.shown - self.printed >= LINE_SECONDS:
            self.printed = self.shown
            rate = (step - self.first) / (self.shown - self.start)
            left = tqdm.format_interval((self.last - step) / rate)
            self.line(f"at step {step} of {self.last}: loss {loss:.4f}, {rate:.3g} steps/s, {left} left")

    def evaluating(self, done: int, total: int) -> None:
        """`done` of the evaluation's `total` batches are done."""
        if not self.due():
            return
        self.shown = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(f"evaluating, {done} of {total} batches")
        elif self.shown - self.printed >= LINE_SECONDS:
            self.printed = self.shown
            self.line(f"evaluating: {done} of {total} batches")

    def close(self, step: int) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str("", refresh=False)  # which may speak of an evaluation
            self.bar.update(step - self.bar.n)
            self.bar.close()
