"""What the scripts share: options made from the configuration's fields, and errors told in one sentence."""

import argparse
import contextlib
import os
import re
import reprlib
import signal
import sys
import types
from collections import deque
from collections.abc import Callable
from dataclasses import Field
from functools import partial

from gpt.advice import argument, as_option, instead_of
from gpt.config import GPTConfig, option_fields
from gpt.errors import UserError
from gpt.models.kinds import MODEL_KINDS
from gpt.terminal import OutputError, message, printable, write
from tensorlite import BackendError
from tensorlite.backends import explain_memory_error

OPTION = re.compile(r"--?[A-Za-z][\w-]*")  # what no text is taken for: those have spaces, or nothing but dashes


def run_script(main: Callable[[], int], memory_advice: str) -> None:
    """Call `main` and exit with its status. What the user can mend ends in one sentence and status 2.

    memory_advice: what to do when there is not enough memory and nobody knows better.
    """
    name = os.path.basename(sys.argv[0])  # noqa: PTH119
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell's >&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have the text's characters
    before = signal.getsignal(signal.SIGINT)
    try:
        if before is not signal.SIG_IGN:  # as it is for a shell's background job
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main()
        write("")  # what --help has left: here, where an output that fails ends as it does everywhere
    except (UserError, BackendError, OSError) as error:
        status = _complain(f"{name}: error: {error}", 2)
    except OutputError as error:
        silent = error.status != 2  # of a reader that has gone there is nothing to say
        status = error.status if silent else _complain(f"{name}: error: {error}", error.status)
    except MemoryError as error:
        why = explain_memory_error(error)
        status = _complain(f"{name}: error: out of memory ({why}): {memory_advice}", 2)
    except KeyboardInterrupt as error:
        status = _complain(f"{name}: interrupted", 128 + getattr(error, "number", signal.SIGINT))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else this process has been told to stop
        signal.signal(signal.SIGINT, before)
    _drop_what_cannot_be_written()
    sys.exit(status)


def _complain(sentence: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(message(sentence), file=sys.stderr)
    return status


def _drop_what_cannot_be_written() -> None:
    """Or Python would try again at its end, and complain."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Parser(argparse.ArgumentParser):
    """Options may be written with dashes or underscores, never abbreviated; errors are one sentence."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        for kind, expected in ((int, "a whole number such as 1000"), (float, "a number such as 0.5 or 1e-3")):
            self.register("type", kind, partial(_number, kind, expected))

    def parse_known_args(self, args=None, namespace=None):
        """What is left over holds no options: one that is unknown is an error."""
        return super().parse_known_args(self._tidied(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")

    def _tidied(self, args: list[str]) -> list[str]:
        """Each option under our own name, in one piece with its value: no part of a value is taken for an option."""
        tidied, rest = [], deque(args)
        while rest:
            given = rest.popleft()
            name, equals, value = given.partition("=")
            if not given:
                self.error("an argument is empty: leave it out, or give a name")
            if not OPTION.fullmatch(name):
                tidied.append(given)
                continue
            option = name.replace("_", "-")
            action = self._option_string_actions.get(option) or self._refuse(name)
            if action.nargs == 0:
                if equals or (rest and rest[0].lower() in ("true", "false")):
                    self.error(f"{option} takes no value: write {' or '.join(action.option_strings)}")
                tidied.append(option)
                continue
            value = value if equals else self._next_value(option, rest)
            if value in ("", "--"):  # of which argparse loses the latter
                self.error(f"{option} cannot be {value!r}: give another value, or leave {option} out")
            tidied.append(f"{option}={value}")
        return tidied

    def _next_value(self, option: str, rest: deque[str]) -> str:
        if not rest:
            self.error(f"{option} needs a value after it")
        if OPTION.fullmatch(rest[0].partition("=")[0]):  # more likely the next option
            self.error(f"{option} needs a value after it; if that is {rest[0]}, write {argument(option, rest[0])}")
        return rest.popleft()

    def _refuse(self, name: str):
        keys = [option.lstrip("-").replace("-", "_") for option in self._option_string_actions]
        self.error(f"unknown option {name}{instead_of(name.lstrip('-').replace('-', '_'), keys, as_option)}")


def _number(kind: type, expected: str, text: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {reprlib.repr(text)}") from None


def add_config_options(parser: Parser, defaults: dict) -> None:
    """One option per field of the configuration, with `defaults` shown in the help."""
    model, training = parser.add_argument_group("model"), parser.add_argument_group("data and training")
    idle, model_fields = MODEL_KINDS[defaults.get("model", "gpt")].ignored, GPTConfig.__dataclass_fields__
    for name, f in option_fields().items():
        if f.metadata["flag"] and name not in idle:
            add_option(model if name in model_fields else training, f, defaults.get(name))


def add_option(group, f: Field, default) -> None:
    """The option of a dataclass's field. One that is not given leaves no trace in the namespace, so that what was given
    can be told from `default`, which is shown in the help."""
    kinds = f.type.__args__ if isinstance(f.type, types.UnionType) else (f.type,)
    settings = {"default": argparse.SUPPRESS, "help": _help(f, default)}
    if bool in kinds:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings |= {"type": kinds[0], "metavar": _metavar(f, kinds[0])}
    if list in kinds:
        settings["action"] = _Several
    group.add_argument(as_option(f.name), **settings)


class _Several(argparse.Action):
    """The value of an option that is given once, the list of those of one that is given several times."""

    def __call__(self, parser, namespace, value, option_string=None):
        before = getattr(namespace, self.dest, [])
        setattr(namespace, self.dest, [*([before] if isinstance(before, str) else before), value] if before else value)


def _help(f, default) -> str:
    if default is None or isinstance(default, bool):
        default = {None: "none", True: "yes", False: "no"}[default]
    return f"{f.metadata['help']} (default: {printable(str(default))})".replace("%", "%%")


def _metavar(f, kind: type) -> str:
    if f.metadata["choices"]:
        return "{" + ",".join(f.metadata["choices"]) + "}"
    return {int: "N", float: "X", str: "TEXT"}[kind]
