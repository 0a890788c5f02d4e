"""The microscope: what is watched, explained and drawn of a forward and a backward pass."""

import json
import math
import re
import warnings
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from cases import CASES

import tensorlite as tl
from gpt.models.gpt import GPT
from gpt.models.shape import GPTConfig
from tensorlite import Tensor, nn, record
from tensorlite.tools import draw, explain, watch
from tensorlite.tools.graph import Graph, rule
from tensorlite.tools.layout import Box, boxes_of
from tensorlite.tools.traps import trap

SHAPE = GPTConfig(vocab_size=11, block_size=8, n_layer=3, n_head=2, n_embd=16)


def leaves(*values):
    return [Tensor(np.asarray(value, float), requires_grad=True) for value in values]


def watched(n_layer: int = 3):
    """What watch() saw of one pass of a small GPT."""
    model = GPT(GPTConfig(**vars(SHAPE) | {"n_layer": n_layer}))
    ids = np.arange(16).reshape(2, 8) % 11
    with watch(model) as seen:
        loss = model(ids, ids)[1]
        loss.backward()
    return seen


def test_a_chain_is_explained():
    a, b, c, f = leaves(2.0, -3.0, 10.0, -2.0)
    e = a * b
    d = e + c
    loss = d * f
    assert (
        explain(loss)
        == """\
3 steps back through 3 ops; leaves: 4
  1  loss = mul(d, f)                 the start: gy 1
     ga = gy * b, gb = gy * a  ->  d -2, f 4
  2  d = add(e, c)                    its use, step 1, is done: gy -2
     ga = gy, gb = gy  ->  e -2, c -2
  3  e = mul(a, b)                    its use, step 2, is done: gy -2
     ga = gy * b, gb = gy * a  ->  a 6, b -4
gradients: f 4, c -2, a 6, b -4"""
    )
    assert (a.grad, b.grad, c.grad, f.grad) == (6.0, -4.0, -2.0, 4.0)


def test_gradients_that_meet_and_sums_over_broadcast_axes_are_told():
    x, w, bias = Tensor(np.ones((4, 3))), *leaves(np.eye(3), np.zeros(3))
    h = x @ w + bias
    text = explain((h * h + h).sum())
    assert "all 3 uses, steps 2, 3 and 3, are done and added up: gy (4, 3)" in text
    assert "h (4, 3) |g| 3.46 (1 of 3)" in text
    assert "h (4, 3) |g| 3.46 (2 of 3), h (4, 3) |g| 3.46 (3 of 3)" in text
    assert "bias (4, 3) |g| 10.4 summed over axis 0 to (3,)" in text
    assert "gradients: bias (3,) |g| 20.8, w (3, 3) |g| 36" in text


def test_leaves_without_a_name_are_told_one_by_one():
    kept = leaves(2.0, 3.0)
    few = explain(kept[0] * kept[1])
    kept = leaves(*[1.0] * 20)
    many = explain(sum(kept[1:], kept[0]))
    assert few.endswith("gradients: leaf 3, leaf 2")
    assert many.endswith("gradients of 20 leaves: |g| 4.47 in all, the largest leaf 1")


def test_a_gpt_is_explained_by_its_modules():
    seen = watched(6)
    folded, opened = explain(seen), explain(seen, depth=9)
    assert len(folded.splitlines()) <= 20
    assert re.search(r"transformer.h.5 \(Block\) +gy \(2, 8, 16\) \|g\| .*2 add, 4 linear, gelu, 2 layer_norm", folded)
    assert len(opened.splitlines()) == 2 * len(seen.ops) + 2
    block = explain(seen, inside="transformer.h.4")
    assert block.startswith("10 steps back through 66 ops")
    assert "linear(#25, weight, bias)" in block or "linear(" in block
    assert "transformer.h.4.mlp.c_fc, models/gpt.py:" in block
    assert "transformer.h.5" not in block
    whole = explain(seen, depth=0).splitlines()
    assert len(whole) == 3
    assert whole[1].split()[:3] == ["1-66", "GPT", "(GPT)"]


def test_what_no_gradient_reaches_is_said():
    with watch() as seen:
        (a,) = leaves(2.0)
        a * a
    assert explain(seen) == "no gradient went back: 1 ops were recorded"
    with pytest.raises(TypeError, match="expected a Tensor, or what watch"):
        explain(3.0)
    with pytest.raises(RuntimeError, match="does not depend on anything that requires grad"):
        explain(Tensor(1.0))


@pytest.mark.parametrize("name", dict.fromkeys(case.op for case in CASES))
def test_every_op_gives_its_rule(name):
    with watch() as seen:
        for case in CASES:
            if case.op == name:
                case.fn(*[Tensor(x, requires_grad=True) if x.dtype.kind == "f" else x for x in case.arrays()])
    assert seen.ops
    for op in seen.ops:
        assert rule(op.module, op.op).startswith("g"), op.op


def test_an_op_of_the_users_own_is_seen_with_its_rule():
    a, b = leaves(2.0, 3.0)
    with watch() as seen:
        loss = tl.exp(harmonic(a, b))
        loss.backward()
    assert [op.op for op in seen.ops] == ["harmonic", "exp"]
    assert seen.ops[0].seconds > 0
    for text in (explain(seen), explain(tl.exp(harmonic(a, b)))):
        assert "= harmonic(a, b)" in text
        assert "ga = gy * (y / a)^2, gb = gy * (y / b)^2  ->  a 1.195, b 0.5312" in text


def harmonic(a, b):
    """1 / (1 / a + 1 / b).  ga = gy * (y / a)^2, gb = gy * (y / b)^2."""
    y = 1 / (1 / a.data + 1 / b.data)
    return record(y, (a, b), lambda gy: (gy * (y / a.data) ** 2, gy * (y / b.data) ** 2))


def test_a_module_called_twice_is_two_boxes_and_a_second_model_has_its_class_before_it():
    first, second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with watch(first) as seen:
        second(first(first(np.ones((2, 4), np.float32)))).sum().backward()
    assert [op.path for op in seen.ops] == ["", "", "Sequential.0", "Sequential.1", ""]
    assert seen.ops[0].call is not seen.ops[1].call


@pytest.mark.parametrize(("a", "b", "result", "said"), [
    ((5, 1), (5,), (5, 5), "reshape(5,)"), ((5,), (5, 1), (5, 5), "reshape(5,)"),
    ((7, 5, 1), (7, 5), None, ""), ((5, 5, 1), (5, 5), (5, 5, 5), "reshape(5, 5)"),
    ((1, 1), (1,), (1, 1), ""), ((5, 1), (1, 5), (5, 5), ""), ((5, 3), (3,), (5, 3), ""), ((5,), (), (5,), ""),
    ((2**15, 1), (1, 2**14), (2**15, 2**14), "2.0 GiB"), ((2**15, 2**14), (2**14,), (2**15, 2**14), ""),
])  # fmt: skip
def test_broadcasting_that_is_seldom_meant(a, b, result, said):
    told = trap("sub", (a, b), result, 4)
    assert said in told if said else told is None


def test_a_column_against_a_row_is_named_with_its_line():
    (prediction,) = leaves(np.ones((5, 1)))
    with watch(), pytest.warns(UserWarning, match=r"sub: \(5, 1\) against \(5,\) broadcasts to \(5, 5\)") as caught:
        ((prediction - np.ones(5)) ** 2).mean()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ((prediction - np.ones(5)) ** 2).mean()  # without watch nothing is said


def faulty(x, vjp):
    return record(x.data, (x,), vjp)  # the line that is named


@pytest.mark.parametrize(("vjp", "kind"), [
    (lambda gy: (gy / None,), TypeError), (lambda gy: (np.ones(7),), ValueError), (lambda gy: (gy, gy), ValueError),
])  # fmt: skip
def test_an_error_on_the_way_back_names_the_line_that_made_the_node(vjp, kind):
    (x,) = leaves(np.ones(3))

    def backward():
        faulty(x, vjp).sum().backward()

    def forward():
        faulty(x, vjp).sum()
        raise kind

    line = faulty.__code__.co_firstlineno + 1
    with pytest.raises(kind) as caught, watch():
        backward()
    assert [note.split(", made at ")[1] for note in caught.value.__notes__] == [f"{__file__}:{line}"]
    with pytest.raises(kind) as caught, watch():
        forward()
    assert not hasattr(caught.value, "__notes__")


def test_a_layout_has_inputs_above_and_opens_what_fits():
    seen = watched(6)
    whole = boxes_of(Graph(seen.ops, seen.names))
    assert whole.call.kind == "GPT"
    transformer = next(child for child in whole.children if isinstance(child, Box))
    blocks = [child for child in transformer.children if isinstance(child, Box)]
    assert transformer.is_open
    assert [block.call.path for block in blocks] == [f"transformer.h.{i}" for i in range(6)]
    assert not any(block.is_open for block in blocks)
    assert [len(row) for row in transformer.rows] == [2, 1, *[1] * 6, 1]


def test_on_a_device_too(device, tmp_path):
    model = GPT(SHAPE).to(device.name)
    ids = device.asarray(np.arange(16).reshape(2, 8) % 11)
    with watch(model) as seen:
        model(ids, ids)[1].backward()
    here = watched()
    assert [(op.op, op.path, op.node.shape) for op in seen.ops] == [(op.op, op.path, op.node.shape) for op in here.ops]
    for there, ours in zip(seen.ops, here.ops, strict=True):
        assert there.incoming.norm == pytest.approx(ours.incoming.norm, rel=1e-3)
    draw(seen, tmp_path / "graph.html")


def test_a_still_picture_is_well_formed(tmp_path):
    draw(watched(), tmp_path / "graph.svg", title="<three> & layers")
    root = ET.parse(tmp_path / "graph.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"h.0 · Block  10 ops", "lm_head · linear", "transformer.wte.weight"} <= set(texts)
    assert root.find("{http://www.w3.org/2000/svg}title").text == "<three> & layers"


def test_a_page_of_a_gpt_is_small_and_what_is_not_finite_does_not_spoil_it(tmp_path):
    with np.errstate(all="ignore"):
        x, y = leaves(1e300, 0.0)
        draw((x * x) / y, tmp_path / "inf.html")
        seen = watched(6)
    draw(seen, tmp_path / "graph.html")
    text = (tmp_path / "graph.html").read_text()
    assert len(text) < 100_000
    for name in ("graph", "inf"):
        page = (tmp_path / f"{name}.html").read_text()
        items = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
        assert items[0]["kind"] == "box"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["graph.html", "inf.html"]


def test_a_picture_goes_where_it_was_asked_for(tmp_path):
    (x,) = leaves(2.0)
    with pytest.raises(ValueError, match=r"ends in \.html or \.svg, got .*graph\.png"):
        draw(x * x, tmp_path / "graph.png")
    with pytest.raises(FileNotFoundError):
        draw(x * x, tmp_path / "nowhere" / "graph.html")
    assert math.isclose(x.grad, 4.0)
    assert not list(tmp_path.iterdir())
