"""The checker is checked: whatever is done to the backward pass of an op, on any case of any op, gradcheck finds it.

A case is run, the vjp of one op in its graph is exchanged for a wrong one, and the whole is given to gradcheck. Run as
a script, this file makes every mutant there is and prints the table (some minutes); the suite takes some of each case.

    PYTHONPATH=. python tests/test_mutants.py [op ...]
"""

import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from unittest.mock import patch

import numpy as np
import pytest

from tensorlite import GradcheckError, Tensor, grad, gradcheck, ops
from tensorlite.autograd import unbroadcast
from tensorlite.gradcheck import UndecidedWarning, compare
from tensorlite.gradcheck.cases import CASES, Case

SHARE = 29  # the suite takes every 29th mutant

# --- what is done to a vjp: a mutation makes wrong ones for a node, as many as there are places to go wrong in ---


class NotMade(Exception):  # noqa: N818 - no error
    """The mutation has nothing to act on here."""


def of_each_gradient(change):
    """The mutation that applies change(g, shape of the input, gy, vjp) to one gradient."""

    def wrong(vjp, i, shape, gy):
        gradients = [*vjp(gy)]
        if gradients[i] is None:
            raise NotMade
        gradients[i] = change(np.array(gradients[i]), shape, gy, lambda gy: vjp(gy)[i])
        return gradients

    return lambda node: [partial(wrong, node.vjp, i, p.shape) for i, p in enumerate(node.parents) if p is not None]


def transposed(g, *_):
    if g.ndim < 2:
        raise NotMade
    return g.swapaxes(-1, -2).reshape(g.shape)


def without_sum(g, shape, gy, vjp):
    """One of the terms that the gradient of a smaller input is a sum of: of the engine's, or else of the vjp's own."""
    if g.shape == shape and gy.ndim > len(shape) > 0:
        return vjp(np.where((np.arange(len(gy)) == 0).reshape(-1, *[1] * (gy.ndim - 1)), gy, 0))
    if g.shape == shape or not g.size:
        raise NotMade
    g = g[(0,) * (g.ndim - len(shape))]
    return g[tuple(slice(n) for n in shape)]


def one_off(g, *_):
    if g.size:
        g.flat[g.size // 2] += 0.001 * (np.abs(g).max() or 1)
    return g


def exchanged(g, *_):
    if g.size:
        g.flat[[0, -1]] = g.flat[[-1, 0]]
    return g


def swapped(node):
    def wrong(vjp, i, j, gy):
        gradients = [*vjp(gy)]
        if gradients[i] is None or gradients[j] is None or gradients[i].shape != gradients[j].shape:
            raise NotMade
        gradients[i], gradients[j] = gradients[j], gradients[i]
        return gradients

    wanted = [i for i, parent in enumerate(node.parents) if parent is not None]
    return [partial(wrong, node.vjp, i, j) for i, j in combinations(wanted, 2)]


def kept_arrays(vjp):
    """(cell, place or None, array) for every array that the vjp closes over, in tuples too."""
    for cell in vjp.__closure__ or ():
        kept = cell.cell_contents
        parts = enumerate(kept) if isinstance(kept, tuple) else [(None, kept)]
        yield from ((cell, place, a) for place, a in parts if isinstance(a, np.ndarray))


def replaced(node):
    def wrong(vjp, cell, place, other, gy):
        kept = cell.cell_contents
        cell.cell_contents = other if place is None else (*kept[:place], other, *kept[place + 1 :])
        try:
            return vjp(gy)
        finally:
            cell.cell_contents = kept

    others = {"f": lambda a: 1.5 * a + 0.5, "b": np.invert, "i": np.flip, "u": np.flip}
    return [partial(wrong, node.vjp, cell, place, others[a.dtype.kind](a)) for cell, place, a in kept_arrays(node.vjp)]


UNREAD = "nothing reads that array again"


def write(a) -> None:
    np.add(a, 1, out=a)


def writes_into_gy(node):
    return [lambda gy, vjp=node.vjp: (vjp(gy), write(gy))[0]]


def writes_into_kept(node):
    def wrong(vjp, a):
        return lambda gy: (vjp(gy), write(a))[0]  # which keeps a, as the vjp does

    return [wrong(node.vjp, a) for _, _, a in kept_arrays(node.vjp) if a.dtype.kind == "f"]


# The mutation, and why the gradients of an op may be right all the same.
MUTATIONS = {
    "sign": (of_each_gradient(lambda g, *_: -g), "the gradient is 0"),
    "1 % off": (of_each_gradient(lambda g, *_: 1.01 * g), "the gradient is 0"),
    "1e-5 off": (of_each_gradient(lambda g, *_: (1 + 1e-5) * g), "the gradient is 0"),
    "none": (of_each_gradient(lambda *_: None), "the gradient is 0"),
    "swapped": (swapped, "both gradients are the same"),
    "transposed": (of_each_gradient(transposed), "the matrix is symmetric, or a single row or column"),
    "no sum": (of_each_gradient(without_sum), "there is one term that is not 0"),
    "replaced": (replaced, "the gradient takes of this array only what is left of it, such as its signs, or is 0"),
    "one off": (of_each_gradient(one_off), "the gradient has no elements"),
    "exchanged": (of_each_gradient(exchanged), "the two elements are equal"),
    "gy written": (writes_into_gy, UNREAD),
    "kept written": (writes_into_kept, UNREAD),
}


# --- the mutants of a case ---


@dataclass(frozen=True)
class Mutant:
    """A case of which one op's vjp is wrong."""

    case: Case
    place: int  # of the op in the graph
    mutation: str
    number: int  # of the mutation's wrong vjps
    watch: Callable = lambda node, wrong: wrong  # what is put in the place of the right vjp

    def __call__(self, *inputs):
        y = self.case.fn(*inputs)
        if y.requires_grad:
            node = nodes_of(y)[self.place]
            node.vjp = self.watch(node, MUTATIONS[self.mutation][0](node)[self.number])
        return y


def mutants(case: Case) -> list[Mutant]:
    return [
        Mutant(case, place, name, number)
        for place, node in enumerate(nodes_of(case.fn(*leaves(case))))
        for name, (mutation, _) in MUTATIONS.items()
        for number in range(len(mutation(node)))
    ]


def nodes_of(y) -> list:
    """The ops that y was made by, the last first."""
    found, waiting = {}, [y.node]
    while waiting:
        node = waiting.pop()
        if node is not None and node.vjp is not None and node not in found:
            found[node] = None
            waiting += node.parents
    return list(found)


def leaves(case: Case) -> list[Tensor]:
    return [Tensor(a.copy(), requires_grad=a.dtype.kind == "f") for a in case.arrays()]


def numbers(fn, case: Case) -> list[np.ndarray]:
    """All that can be seen of a backward pass: the gradients, and what the inputs, the result and gy are afterwards."""
    tensors = leaves(case)
    y = fn(*tensors)
    gy = np.random.default_rng(0).standard_normal(y.shape)
    gradients = grad(y, [t for t in tensors if t.requires_grad], gy)
    return [*gradients, *[t.data for t in tensors], y.data, gy]


def same(a: list, b: list) -> bool:
    """Up to rounding."""
    return all(np.allclose(x, y, 1e-9, 1e-12, equal_nan=True) for x, y in zip(a, b, strict=True))


@patch.object(compare, "ENOUGH", 1)  # wrong elements, to be quick: gradcheck goes on to show ten
@np.errstate(all="ignore")
def outcome(mutant: Mutant) -> str:
    """What becomes of it: "caught", "not made", "survived", or why it is equivalent."""
    try:
        got = numbers(mutant, mutant.case)
    except (NotMade, TypeError, ValueError, IndexError):  # it stops by itself, at an array that is read-only for one
        return "not made"
    with warnings.catch_warnings(action="error", category=UndecidedWarning):
        for seed in (0, 1):  # one cotangent may nearly cancel what the other shows
            try:
                gradcheck(mutant, *mutant.case.arrays(), seed=seed)
            except GradcheckError:
                return "caught"
            except UndecidedWarning:
                pass
    return reason(mutant) if same(got, numbers(mutant.case.fn, mutant.case)) else "survived"


def reason(mutant: Mutant) -> str:
    """Why the mutant gives the gradients that the case gives, from those of the op that was mutated."""
    op_gradients = []

    def watch(node, wrong):
        wanted, right = [p and p.shape for p in node.parents], node.vjp

        def gradients(vjp, gy):
            return [
                np.zeros(shape) if g is None else unbroadcast(np.array(g), shape)
                for g, shape in zip(vjp(gy), wanted, strict=True)
                if shape is not None
            ]

        def vjp(gy):
            op_gradients[:] = gradients(right, gy), gradients(wrong, gy)
            return wrong(gy)

        return vjp

    numbers(replace(mutant, watch=watch), mutant.case)
    right, wrong = op_gradients
    if not any(g.size for g in right):
        return "there are no elements"
    _, why = MUTATIONS[mutant.mutation]
    return why if why == UNREAD or same(right, wrong) else "the ops before it leave the difference out, or sum it up"


@pytest.mark.parametrize("op", ops.__all__)
def test_what_is_wrong_is_caught(op):
    for number, case in enumerate(c for c in CASES if c.op == op):
        for mutant in mutants(case)[number % SHARE :: SHARE]:
            assert outcome(mutant) != "survived", mutant


def test_every_mutation_is_made_and_caught():
    (case,) = [c for c in CASES if str(c) == "mul: row"]
    assert {m.mutation for m in mutants(case) if outcome(m) == "caught"} == set(MUTATIONS)


def main(names: list[str]) -> None:
    """Print for each op and mutation how many mutants were caught, after a + how many are equivalent, and after a !
    how many survived; then why they are equivalent, with the ops."""
    found, why = defaultdict(Counter), defaultdict(Counter)
    for mutant in (mutant for case in CASES if case.op in names for mutant in mutants(case)):
        op, mutation, became = mutant.case.op, mutant.mutation, outcome(mutant)
        for row in (op, "all"):
            found[row, mutation][became] += 1
        if became not in ("caught", "not made"):
            why[mutation, became][op] += 1
    print(" " * 28, *[f"{name:>12}" for name in MUTATIONS])
    for row in (*names, "all"):
        print(f"{row:28}", *[f"{cell(found[row, name]):>12}" for name in MUTATIONS])
    for (mutation, became), counts in sorted(why.items()):
        print(f"{mutation}, {counts.total()} because {became}: {', '.join(f'{n} {op}' for op, n in counts.items())}")


def cell(outcomes: Counter) -> str:
    caught, survived = outcomes["caught"], outcomes["survived"]
    equivalent = outcomes.total() - caught - survived - outcomes["not made"]
    return f"{caught}" + f"+{equivalent}" * bool(equivalent) + f"!{survived}" * bool(survived)


if __name__ == "__main__":
    main(sys.argv[1:] or ops.__all__)
