"""What reaches the user: lines that hold nothing raw, and an output that may fail at any time."""

import contextlib
import re
import signal
import sys

MOST = 200  # characters of an input that a message repeats

# What a terminal or a pager takes for a command: C0, DEL, C1, other line ends, and marks that turn the order around.
_RAW = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_ESCAPED = {code: repr(chr(code))[1:-1] for code in _RAW}
_BROKEN_PIPE = 128 + getattr(signal, "SIGPIPE", 13)


class OutputError(Exception):
    """Standard output takes nothing more. status: what to exit with."""

    def __init__(self, error: OSError):
        super().__init__(f"cannot write the output: {error.strerror or error}")
        self.status = _BROKEN_PIPE if isinstance(error, BrokenPipeError) else 2  # as what `| head` ends


def printable(text: str, keep: str = "") -> str:
    """`text` with an escape, such as \\x1b, for each control character that is not in `keep`."""
    return text.translate(_ESCAPED | {ord(character): character for character in keep})


def shortened(text: str) -> str:
    """`text`, or its two ends and the number of its characters if it has more than MOST."""
    return text if len(text) <= MOST else f"{text[: MOST // 2]}... ({len(text):,} characters) ...{text[-MOST // 4 :]}"


def message(text: str) -> str:
    """A sentence of ours as one line for a terminal, in which no word and no argument of the command is too long."""
    given = [value for word in sys.argv[1:] for value in (word, word.partition("=")[2])]
    given += [repr(value)[1:-1] for value in given]  # as some quote it
    for value in sorted((value for value in given if len(value) > MOST), key=len, reverse=True):
        text = text.replace(value, shortened(value))
    return re.sub(rf"\S{{{MOST + 1},}}", lambda word: shortened(word[0]), printable(text))


def write(text: str) -> None:
    """Write to standard output at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from None


def show(text: str) -> None:
    """Write text of a model's or a user's: as it is, but for a terminal without control characters."""
    write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)


SHADES = ((0.01, 203), (0.05, 215), (0.2, 223), (0.5, 195), (1.0, 117))  # up to which probability, a colour's number


def shaded(text: str, probability: float) -> str:
    """`text` in black on a background from red, for what was improbable, to blue: to be told apart by any eye, on light
    terminals and dark ones."""
    colour = next(number for most, number in SHADES if probability <= most)
    lines = [f"\x1b[38;5;16;48;5;{colour}m{line}\x1b[0m" if line else "" for line in printable(text, "\n").split("\n")]
    return "\n".join(lines)  # a line's end would be coloured to the edge of the window


def say(line: str) -> None:
    """Write one line of ours."""
    write(printable(line) + "\n")


def warn(text: str) -> None:
    """Write a line of ours to standard error, about something that goes on all the same."""
    print(printable(f"warning: {text}"), file=sys.stderr)


def tell(line: str) -> None:
    """`say`, on standard error if that fails, and in vain if that does too."""
    with contextlib.suppress(OSError):
        try:
            say(line)
        except OutputError:
            print(printable(line), file=sys.stderr, flush=True)
