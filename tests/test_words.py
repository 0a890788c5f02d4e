"""docs/from-pytorch.md says of every name what is true of it, and every name in it is PyTorch's."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the field knows

import tensorlite as tl
from tensorlite import Tensor, nn, optim, words

TEXT = (Path(__file__).parents[1] / "docs" / "from-pytorch.md").read_text()
SAME, OTHER = TEXT.split("## The same")[1].split("## By another name")
TORCH = (torch, F, torch.Tensor, torch.autograd)
OTHERS = {"Tensor", "cast", "nn", "ops", "optim", "random"}  # of PyTorch's names, what means or holds something else


def listed(what: str) -> list[str]:
    return re.findall(r"`(\w+)`", SAME.split(f"- {what}")[1].split("\n- ")[0].split("of `torch.nn.utils`")[0])


def test_what_is_listed_as_the_same_is_in_both():
    functions = [n for n in tl.__all__ if n not in OTHERS and any(hasattr(place, n) for place in TORCH)]
    assert listed("Functions") == sorted(functions)
    methods = [n for n in dir(Tensor([])) if not n.startswith("_") and hasattr(torch.Tensor, n)]
    assert listed("Methods") == sorted(methods)
    assert listed("`torch.nn`") == sorted(n for n in nn.__all__ if hasattr(torch.nn, n))
    assert all(hasattr(optim, n) and hasattr(torch.optim, n) for n in listed("`torch.optim`"))


def test_the_table_is_what_the_errors_say():
    shown = dict(re.findall(r"^\| `(.*?)` \| (.*) \|$", OTHER, re.MULTILINE))
    prefixed = {f"nn.{n}": w for n, w in words.LAYERS.items()} | {f"optim.{n}": w for n, w in words.OPTIMIZERS.items()}
    keywords = {f"{n}=": f"{w}=" for n, w in words.KEYWORDS.items()}
    shown = {name: ours.replace(r"\|", "|") for name, ours in shown.items()}
    assert shown == words.FUNCTIONS | prefixed | keywords


@pytest.mark.parametrize(
    ("table", "places"),
    [(words.FUNCTIONS, (*TORCH, torch.nn)), (words.LAYERS, (torch.nn,)), (words.OPTIMIZERS, (torch.optim,))],
)
def test_every_name_is_pytorchs(table, places):
    assert not [name for name in table if not any(hasattr(place, name) for place in places)]


# What a formula of the table says, beside PyTorch's own.
X, Y = (np.random.default_rng(i).uniform(0.2, 0.8, (3, 4)) for i in range(2))
FORMULAS = [
    ("argmin", lambda x, y: x.argmin()),
    ("amax", lambda x, y: x.amax()),
    ("binary_cross_entropy", lambda x, y: F.binary_cross_entropy(x, y)),
    ("binary_cross_entropy_with_logits", lambda x, y: F.binary_cross_entropy_with_logits(x, y)),
    ("flip", lambda x, y: x.flip(0)),
    ("kl_div", lambda x, y: F.kl_div(y.log(), x, reduction="sum")),
    ("l1_loss", lambda x, y: F.l1_loss(x, y)),
    ("leaky_relu", lambda x, y: F.leaky_relu(x - 0.5)),
    ("logsumexp", lambda x, y: x.logsumexp(1)),
    ("mse_loss", lambda x, y: F.mse_loss(x, y)),
    ("norm", lambda x, y: x.norm()),
    ("prod", lambda x, y: x.prod()),
    ("reciprocal", lambda x, y: x.reciprocal()),
    ("rsqrt", lambda x, y: x.rsqrt()),
    ("softplus", lambda x, y: F.softplus(x - 0.5)),
    ("square", lambda x, y: x.square()),
    ("eq", lambda x, y: x.eq(y)),
    ("unbind", lambda x, y: x.unbind()[0]),
    ("isnan", lambda x, y: x.isnan()),
]
SHIFTED = ("leaky_relu", "softplus")  # so that there is something below 0


@pytest.mark.parametrize(("name", "theirs"), FORMULAS, ids=[name for name, _ in FORMULAS])
def test_a_formula_computes_what_its_name_says(name, theirs):
    formula = words.FUNCTIONS[name].split(", for ")[0]
    formula = {"amax": "max(x)", "unbind": "list(x)[0]"}.get(name, formula)
    x, y = Tensor(X - 0.5 if name in SHIFTED else X), Tensor(Y)
    names = {n: getattr(tl, n) for n in ("abs", "argmax", "exp", "log", "max", "maximum")}
    ours = eval(formula, names | {"x": x, "y": y, "p": x, "q": y, "axis": 1})  # noqa: S307
    np.testing.assert_allclose(ours.data, theirs(torch.tensor(X), torch.tensor(Y)).numpy(), rtol=1e-12)
