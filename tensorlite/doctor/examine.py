"""Every check in turn, and a verdict. Nothing that a check raises gets past this, however broken the machine is."""

import contextlib
import os
import re
import sys
import warnings
from dataclasses import dataclass

from tensorlite.doctor.checks import CHECKS, Check, Machine, Problem

WORKS, NOT_HERE = "--backend cupy works here", "--backend cupy does not work here"
WIDTH = max(len(check.name) for check in CHECKS)


@dataclass(frozen=True)
class Result:
    """outcome: ok, missing, failed or skipped. hint: what to do, where that is known."""

    check: Check
    outcome: str
    detail: str
    hint: str = ""

    def __str__(self) -> str:
        line = f"{self.check.name:{WIDTH}}  {self.outcome:7}  {self.detail}"
        return f"{line}\n{'':{WIDTH}}  {'':7}  -> {self.hint}" if self.hint else line


def main() -> int:
    """examine() in a process of its own."""
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None  # CuPy's half-made objects would print a traceback when they go
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not have a message's characters
    try:
        return examine()
    except KeyboardInterrupt:
        return 130
    except OSError:  # of our output: its reader has gone, or its disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def examine() -> int:
    """Print every result and the verdict: 0 if --backend cupy works here, 1 if not."""
    machine, results = Machine(), {}
    for check in CHECKS:
        lacking = " and ".join(name for name in check.needs if results[name].outcome != "ok")
        result = Result(check, "skipped", f"needs {lacking}") if lacking else attempt(check, machine)
        results[check.name] = result
        print(result, flush=True)
    line = verdict([*results.values()])
    print(line, flush=True)
    return 0 if line.startswith(WORKS) else 1


def attempt(check: Check, machine: Machine) -> Result:
    """What comes of the check, whatever it raises."""
    try:
        return Result(check, "ok", check.look(machine))
    except (Exception, SystemExit) as error:  # a library that calls sys.exit() is no reason to stop
        detail = first_line(error)
        if isinstance(error, Problem):
            return Result(check, error.outcome, detail, error.hint)
        outcome = "missing" if isinstance(error, ModuleNotFoundError) else "failed"
        return Result(check, outcome, detail, hint_for(f"{check.name}: {type(error).__name__}: {detail}", machine))


def first_line(error: BaseException) -> str:
    """What it says in one line. CuPy's ImportError is a page of general advice; what happened is in its cause."""
    if isinstance(error, ImportError) and error.__cause__ is not None:
        error = error.__cause__
    lines = []
    with contextlib.suppress(Exception):  # its __str__ may be broken too
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" =-")]
    name = [] if lines and isinstance(error, (Problem, ModuleNotFoundError)) else [type(error).__name__]
    return ": ".join(name + lines[:1])


def hint_for(problem: str, machine: Machine) -> str:
    """What to do about an error of someone else's: the first of these whose pattern fits."""
    no_gpu = "start a container with --gpus all; on a machine without an NVIDIA GPU use --backend numpy"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        no_gpu = f"CUDA_VISIBLE_DEVICES is {hidden!r}, which hides the GPUs: run: unset CUDA_VISIBLE_DEVICES"
    hints = {
        r"Insufficient_?Driver": f"update the NVIDIA driver to one for CUDA {machine.cuda_major()}",
        r"No_?Device": no_gpu,
        r"out_?of_?memory|MemoryAllocation": "end what else uses the GPU's memory: nvidia-smi lists it",
        r"^GPU: ": "restart the machine, or the container with --gpus all: the driver is there and does not start",
        r"^CuPy: (Attribute|Import)Error": machine.install(afresh=True),  # one of two wheels was uninstalled, say
        r"not ?found|(can|could )not open|fail[a-z ]+ find|No_?(Binary|KernelImage)|gpu-arch": machine.install(),
    }
    return next((hint for pattern, hint in hints.items() if re.search(pattern, problem, re.IGNORECASE)), "")


def verdict(results: list[Result]) -> str:
    """Whether the backend works, and if not, why and what to do."""
    bad = [result for result in results if result.outcome in ("missing", "failed")]
    bad = [result for result in bad if not result.check.without] or bad
    if not bad:
        return WORKS
    reason = ", ".join(f"{result.check.name} {result.outcome}" for result in bad)
    if len(bad) == 1:
        reason += f" ({bad[0].detail})"
    limits = dict.fromkeys(result.check.without for result in bad)
    hints = "; then ".join(dict.fromkeys(result.hint for result in bad if result.hint))
    if "" in limits:
        return f"{NOT_HERE}: {reason}; {hints or 'use --backend numpy'}"
    return f"{WORKS}, {' and '.join(limits)}: {reason}" + (f"; {hints}" if hints else "")


if __name__ == "__main__":
    sys.exit(main())
