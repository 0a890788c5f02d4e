"""What the scripts share: options made from the configuration's fields, and errors told in one sentence."""

import argparse
import os
import sys
import types
from collections.abc import Callable

from gpt.config import GPTConfig, idle_keys, option_fields
from gpt.errors import UserError
from tensorlite import BackendError
from tensorlite.backends import explain_memory_error


def run_script(main: Callable[[], int], memory_options: str) -> None:
    """Call `main` and exit with its status. What the user can mend ends in one sentence and status 2.

    memory_options: what to lower when there is not enough memory.
    """
    name = os.path.basename(sys.argv[0])  # noqa: PTH119
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell's >&-
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have the text's characters
    try:
        status = main()
        sys.stdout.flush()  # here, where a reader that has gone is nothing to complain about
    except (UserError, BackendError) as error:
        status = _complain(f"{name}: error: {error}", 2)
    except MemoryError as error:
        why = explain_memory_error(error)
        status = _complain(f"{name}: error: out of memory ({why}): lower {memory_options}", 2)
    except KeyboardInterrupt:
        status = _complain(f"{name}: interrupted", 130)
    except OSError as error:  # most likely of our output: its reader has gone, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0 if isinstance(error, BrokenPipeError) else _complain(f"{name}: error: {error}", 2)
    sys.exit(status)


def _complain(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """Options may be written with dashes or underscores, never abbreviated; errors are one sentence."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args([_dashes(a) for a in (sys.argv[1:] if args is None else args)], namespace)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def _dashes(argument: str) -> str:
    """--block_size=8 -> --block-size=8."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def add_config_options(parser: Parser, defaults: dict) -> None:
    """One option per field of the configuration. Absent ones leave no trace in the namespace, so that what was given
    explicitly can be told from the preset's values, which are shown as defaults."""
    model = parser.add_argument_group("model")
    training = parser.add_argument_group("data and training")
    idle = idle_keys(defaults.get("model", "gpt"))
    model_fields = GPTConfig.__dataclass_fields__
    for name, f in option_fields().items():
        if not f.metadata["flag"] or name in idle:
            continue
        kinds = f.type.__args__ if isinstance(f.type, types.UnionType) else (f.type,)
        settings = {"default": argparse.SUPPRESS, "help": _help(f, defaults.get(name))}
        if bool in kinds:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kinds[0], "metavar": _metavar(f, kinds[0])}
        group = model if name in model_fields else training
        group.add_argument("--" + name.replace("_", "-"), **settings)


def _help(f, default) -> str:
    if default is None or isinstance(default, bool):
        default = {None: "none", True: "yes", False: "no"}[default]
    return f"{f.metadata['help']} (default: {default})".replace("%", "%%")


def _metavar(f, kind: type) -> str:
    if f.metadata["choices"]:
        return "{" + ",".join(f.metadata["choices"]) + "}"
    return {int: "N", float: "X", str: "TEXT"}[kind]
