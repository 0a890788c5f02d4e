"""How often gradcheck accuses a correct gradient, cannot decide, and catches a planted error, over drawn functions.

    python bench/gradcheck_study.py
    python bench/gradcheck_study.py --draws 100000 --planted 2000 --json bench/results/gradcheck.json

A draw is a smooth function of one variable and a point x, of any size from 1e-8 to 1e8: one or two of exp, log, tanh,
sin, cos, sigmoid, powers, roots and rational functions inside each other, with arguments of x's own size and others,
shifted, scaled to results from 1e-8 to 1e8, and sometimes beside a constant that is larger than they are. Points where
the function or its derivative is 0 or overflows are drawn anew. Errors are planted by a factor of 1 + e into one of
five such derivatives, where the rest are right; lost in rounding are those that do not show in the result, as where
tanh is 1: there any gradient passes that would not either.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import write_results

from tensorlite import Tensor, record
from tensorlite.gradcheck.compare import check

ANY = {  # of any argument
    "exp": lambda u: u.exp(),
    "tanh": lambda u: u.tanh(),
    "sin": lambda u: u.sin(),
    "cos": lambda u: u.cos(),
    "sigmoid": lambda u: u.sigmoid(),
    "u^2": lambda u: u**2,
    "u^3": lambda u: u**3,
    "1 / (1 + u^2)": lambda u: 1 / (1 + u * u),
    "u / (1 + u^2)": lambda u: u / (1 + u * u),
    "sqrt(1 + u^2)": lambda u: (1 + u * u).sqrt(),
}
POSITIVE = {
    "log": lambda u: u.log(),
    "sqrt": lambda u: u.sqrt(),
    "u^-1": lambda u: u**-1,
    "u^-2": lambda u: u**-2,
    "u^2.5": lambda u: u**2.5,
}
ERRORS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
ELEMENTS, WRONG = 5, 2  # of a planted draw, and the index of the wrong one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10_000, help="correct gradients (default: %(default)s)")
    parser.add_argument("--planted", type=int, default=200, help="wrong ones of each size (default: %(default)s)")
    parser.add_argument("--large", type=int, default=1_000_000, help="elements of an input (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    correct = study_correct(args.draws, np.random.default_rng(args.seed))
    print(f"{args.draws} correct gradients: {correct['accused']} accused, {correct['undecided']} undecided")
    rows = [study_planted(e, args.planted, np.random.default_rng(args.seed + 1)) for e in ERRORS]
    print(table(rows))
    large = [study_large(name, args.large) for name in ("x * x", "tanh")]
    write_results(args.json, results=[{"what": "correct", **correct}, *rows, *large])


def study_correct(draws: int, rng) -> dict:
    count = Counter(accused=0, undecided=0)
    for _ in range(draws):
        name, fn, x = draw(rng)
        report = check(fn, x)
        count["accused"] += report.error is not None
        count["undecided"] += report.undecided
        if report.error:
            print(f"accused: {name} at {x!r}: {report.error}")
    return {"draws": draws, **count}


def study_planted(error: float, draws: int, rng) -> dict:
    """What becomes of a gradient off by this factor, less 1."""
    count = Counter(caught=0, undecided=0, hidden=0, passed=0)
    for _ in range(draws):
        functions, points = map(list, zip(*(draw(rng)[1:] for _ in range(ELEMENTS)), strict=True))
        functions[WRONG] = planted(functions[WRONG], error)

        def fn(*inputs, functions=functions):
            return [f(x) for f, x in zip(functions, inputs, strict=True)]

        report = check(fn, *points)
        element = next(e for e in report.worst if e.name == f"input {WRONG}")
        verdicts = {"caught": element.wrong, "undecided": element.undecided, "hidden": element.expected == 0}
        count[next((verdict for verdict, holds in verdicts.items() if holds), "passed")] += 1
    return {"what": "planted", "error": error, "draws": draws, **count}


def study_large(name: str, size: int) -> dict:
    """The seconds of processor time that an input of so many elements takes."""
    fn = {"x * x": lambda x: x * x, "tanh": lambda x: x.tanh()}[name]
    x, times = np.random.default_rng(0).standard_normal(size), []
    for _ in range(5):
        start = time.process_time()
        report = check(fn, x)
        times.append(time.process_time() - start)
        assert report.error is None
    seconds = round(min(times), 3)  # what it takes when nothing else runs
    print(f"{name} of {size} elements: {seconds:.2f} s")
    return {"what": "large", "function": name, "elements": size, "seconds": seconds}


def planted(fn: Callable, error: float) -> Callable:
    return lambda x: fn(record(x.data, (x,), lambda gy: (gy * (1 + error),)))


def draw(rng) -> tuple[str, Callable, float]:
    """A function with its name, and a point, where neither value nor derivative is 0 or overflows."""
    while True:
        name, fn, x = _draw(rng)
        leaf = Tensor(np.float64(x), requires_grad=True)
        with np.errstate(all="ignore"):
            y = fn(leaf)
            y.backward()
        values = np.abs([y.item(), leaf.grad.item()])
        if np.isfinite(values).all() and values.min() > 1e-30 and values.max() < 1e30:
            return name, fn, x


def _draw(rng) -> tuple[str, Callable, float]:
    x = float(10 ** rng.uniform(-8, 8))
    argument = float(10 ** rng.uniform(-3, 1.3)) if rng.random() < 0.7 else x
    shift = float(rng.uniform(0, 2)) if rng.random() < 0.5 else 0.0
    positive = rng.random() < 0.4
    first = str(rng.choice([*POSITIVE] if positive else [*ANY]))
    second = str(rng.choice([*ANY])) if rng.random() < 0.5 else ""
    a = float(10 ** rng.uniform(-8, 8))
    beside = float(rng.uniform(-10, 10)) if rng.random() < 0.25 else 0.0
    if not positive and rng.random() < 0.5:
        x = -x
    inner, outer, b = {**ANY, **POSITIVE}[first], ANY.get(second, lambda u: u), argument / abs(x)

    def fn(t: Tensor) -> Tensor:
        return a * (outer(inner(b * t + shift)) + beside)

    return f"{a:.2g} * ({second}({first}({b:.3g} x + {shift:.3g})) + {beside:.3g})", fn, x


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| error in one element | caught | undecided | lost in rounding | passed |", "|---|---|---|---|---|"]
    for row in rows:
        shares = " | ".join(f"{row[key] / row['draws']:.1%}" for key in ("caught", "undecided", "hidden", "passed"))
        lines.append(f"| {row['error']:.0e} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
