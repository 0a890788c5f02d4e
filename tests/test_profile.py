"""Profiles: where the time and the memory of passes went, and what that says is true."""

import json
import re
import sys
import threading
import time
import tracemalloc

import numpy as np
import profile_cost
import pytest
from scripts import ROOT, TEXT, TINY, run
from test_divergence import make

import tensorlite as tl
import train
from gpt.errors import UserError
from gpt.models.gpt import GPT
from gpt.models.kinds import build_model
from gpt.models.shape import GPTConfig
from gpt.plan import step_flops
from gpt.training.trainer import Trainer
from tensorlite import Tensor, nn, record
from tensorlite.backends import NumpyBackend
from tensorlite.optim import SGD
from tensorlite.tools import profile
from tensorlite.tools.live import LiveArrays, Maker
from tensorlite.tools.report import WIDTH, by_module, by_op
from tensorlite.tools.trace import OURS, trace_text

SLEEP = 0.03


def tensor(*shape, dtype=np.float32) -> Tensor:
    return Tensor(np.linspace(-1, 1, int(np.prod(shape)), dtype=dtype).reshape(shape), requires_grad=True)


def small_gpt(**changes) -> GPT:
    return GPT(GPTConfig(**{"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16} | changes))


def tokens(model: GPT, rows: int = 2) -> tuple[np.ndarray, np.ndarray]:
    ids = np.arange(rows * (model.block_size + 1)).reshape(rows, -1) % model.vocab_size
    return ids[:, :-1], ids[:, 1:]


@pytest.fixture(scope="module")
def profiled():
    """Of two passes of a small GPT, with an optimiser's steps."""
    model = small_gpt()
    optimizer, (x, y) = SGD(model.parameters(), lr=0.1), tokens(model)
    with profile(model) as p:
        for _ in range(2):
            optimizer.zero_grad()
            model(x, y)[1].backward()
            optimizer.step()
    return p


# --- times ---


def test_the_shares_are_all_of_the_time(profiled):
    total = profiled.spans[0].seconds
    for rows in (by_op(profiled), *(by_module(profiled, depth) for depth in range(5))):
        assert sum(row.seconds for row in rows.values()) == pytest.approx(total)
        seconds = [row.seconds for row in rows.values()]
        assert seconds == sorted(seconds, reverse=True)
        assert min(seconds) >= 0


def test_what_was_called_is_counted(profiled):
    ops, modules = by_op(profiled), by_module(profiled, 9)
    assert (ops["linear"].calls, ops["linear"].backward_calls) == (2 * 9, 2 * 9)
    assert (ops["cross_entropy"].calls, ops["cross_entropy"].backward_calls) == (2, 2)
    assert {name for name in ops if name.startswith("no op")} == {
        "no op: Python, data", "no op: the walk back", "no op: the optimizer"
    }  # fmt: skip
    assert modules["transformer.h.1.mlp.c_fc"].calls == modules["GPT"].calls == 2
    assert modules["transformer.h.1.mlp.c_fc"].flop == 2 * 3 * 2 * (2 * 8) * 16 * 64
    assert {*by_module(profiled, 1)} >= {"GPT", "transformer", "lm_head"}
    assert "transformer.h.0" not in by_module(profiled, 1)


def sleeping(monkeypatch, name: str) -> None:
    kernel = getattr(NumpyBackend, name)

    def slow(*args, **kwargs):
        time.sleep(SLEEP)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(NumpyBackend, name, slow)


@pytest.mark.parametrize(("kernel", "op", "backward"), [("relu", "relu", 0), ("relu_vjp", "relu", 1)])
def test_an_op_that_sleeps_is_on_top(kernel, op, backward, monkeypatch):
    sleeping(monkeypatch, kernel)
    with profile() as p:
        tl.relu(tensor(3) * 2).sum().backward()
    name, row = next(iter(by_op(p).items()))
    assert name == op
    assert (row.forward, row.backward)[backward] >= SLEEP > (row.forward, row.backward)[1 - backward]
    assert p.table().splitlines()[5].startswith(op)


def test_an_op_has_the_time_of_ops_within_it_not_for_its_own(monkeypatch):
    sleeping(monkeypatch, "gemm")
    with profile() as p:
        tl.matmul(tensor(4), tensor(4, 5))  # a vector: by reshaping, and the product of a matrix
    outer, _, inner, _ = [span for span in p.spans if span.kind == "op"]
    assert (outer.name, inner.name, inner.parent) == ("matmul", "matmul", outer)
    assert inner.own_seconds >= SLEEP
    assert outer.seconds >= SLEEP > outer.own_seconds
    assert by_op(p)["matmul"].flop == 2 * 4 * 5  # once


def test_the_profilers_own_time_is_left_out(monkeypatch):
    add = LiveArrays.add
    monkeypatch.setattr(LiveArrays, "add", lambda *args: (time.sleep(SLEEP), add(*args))[1])
    with profile() as p:
        (tensor(3) * 2).sum().backward()
    assert p.cost.seconds >= 4 * SLEEP > SLEEP > p.spans[0].seconds
    assert f"The profiler took {1e3 * p.cost.seconds:,.2f} ms" in p.table()


# What is computed -> its operations forward, and backward. A matrix product of (M, K) and (K, N) has 2 M K N.
FLOP = {
    "linear": (lambda: tl.linear(tensor(2, 3, 4), tensor(5, 4), tensor(5)), 240, 480),
    "linear on data": (lambda: tl.linear(np.ones((6, 4), np.float32), tensor(5, 4)), 240, 240),
    "matmul": (lambda: tensor(7, 2, 3) @ tensor(3, 4), 336, 672),
    "two vectors": (lambda: tl.matmul(tensor(9), tensor(9)), 18, 36),
    "attention": (
        lambda: tl.scaled_dot_product_attention(tensor(2, 3, 4), tensor(2, 5, 4), tensor(2, 5, 6)), 600, 1200
    ),
    "masked": (
        lambda: tl.scaled_dot_product_attention(
            tensor(2, 3, 4), tensor(2, 5, 4), tensor(2, 5, 6), attn_mask=np.ones((3, 5), bool)
        ), 600, 1200,
    ),
    "self-attention": (lambda: tl.self_attention(tensor(2, 5, 3 * 8), n_head=2), 2 * 2 * 2 * 5 * 5 * 8, 3200),
    "a list": (lambda: tl.matmul([[1.0, 2.0]], tensor(2, 3)), 0, 0),  # whose shape nobody has asked for
    "no product": (lambda: tl.exp(tensor(5)), 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOP)
def test_operations_are_counted(name):
    function, forward, backward = FLOP[name]
    with profile() as p:
        function().sum().backward()
    assert sum(span.flop for span in p.spans if span.kind == "op") == forward
    assert sum(span.flop for span in p.spans if span.kind == "vjp") == backward


def test_the_operations_of_a_step_are_those_of_the_plan():
    with make(dropout=0.2) as trainer:
        config = trainer.config
        with profile(trainer.model) as p:
            trainer.train_step()
    whole = type("Config", (), {"gpt": trainer.model.config, "train": config})
    assert sum(span.flop for span in p.spans) == step_flops(whole)


def test_the_benchmark_of_its_cost():
    with make() as trainer:
        (plain, profiled, told, cost), *others = profile_cost.turns(trainer, 2)
    assert len(others) == 1
    assert min(plain, told, cost) > 0
    assert profiled > told


# --- memory ---


def test_the_peak_and_who_held_it_to_the_byte():
    x = tensor(1000)
    with profile() as p:
        y = tl.exp(x)  # keeps its result
        z = y[10:20]  # a view
        del y
        loss = (z * z).sum()  # 10 numbers, then 1
        loss.backward()
    made = {name: (row.made, row.gradients) for name, row in by_op(p).items() if row.made + row.gradients}
    assert made == {"exp": (4000, 4000), "mul": (40, 80), "sum": (4, 0), "getitem": (0, 4000)}
    assert p.live.peak_after == Maker("exp", "", True)
    assert p.live.held_at_peak == {
        Maker("exp", "", False): (1, 4000),
        Maker("getitem", "", True): (1, 4000),
        Maker("exp", "", True): (1, 4000),
        Maker("sum", "", False): (1, 4),
        Maker("sums of gradients", "", False): (1, 4),  # the first one, 1
    }
    assert p.live.peak == 12008
    assert "peak memory 12.0 kB, after exp backward; then held by" in p.table()


def test_what_is_not_the_ops_does_not_count():
    x, ids = tensor(1000), np.zeros(10, np.int64)
    with profile() as p:
        y = x.reshape(10, 100)  # a view of what was there
        y = tl.cast(y, np.float32)  # the same
        tl.embedding(ids, y)  # of the ids a copy is kept
    assert {name: row.made for name, row in by_op(p).items() if row.made} == {"embedding": 10 * 100 * 4 + 10 * 8}


def test_nothing_is_kept_alive():
    with profile() as p:
        for _ in range(3):
            tl.exp(tensor(1000) * 2)
    assert p.live.peak == 8000
    assert p.spans[-1].held == 8000
    with profile() as p, tl.no_grad():
        for _ in range(3):
            tl.exp(tensor(1000) * 2)
    assert p.live.peak == 8000


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_peak_is_most_of_what_python_was_asked_for(dropout):
    """NumPy tells tracemalloc of its arrays; those within an op, and Python's own objects, are what is missing here."""
    model = small_gpt(block_size=32, n_layer=4, n_embd=64, dropout=dropout)
    x, y = tokens(model, 8)
    peaks = []
    for i in range(2):
        model.zero_grad()
        if i == 0:
            with profile(model) as p:
                model(x, y)[1].backward()
            peaks.append(p.live.peak)
        else:
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            model(x, y)[1].backward()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
            tracemalloc.stop()
    assert 0.8 < peaks[0] / peaks[1] < 1.0


# --- what else may happen within the block ---


def failing_vjp(x):
    def vjp(gy):
        raise FloatingPointError("planted")

    return record(x.data * 2, (x,), vjp)


def test_an_error_leaves_everything_as_it_was():
    def before(*_):
        return None

    sys.setprofile(before)
    try:
        for fail in (lambda: tl.matmul(tensor(2), tensor(3)), lambda: failing_vjp(tensor(2)).sum().backward()):
            with pytest.raises((ValueError, FloatingPointError)), profile() as p:
                fail()
            assert sys.getprofile() is before
            assert all(span.end >= span.start for span in p.spans)
            p.table()
    finally:
        sys.setprofile(None)


def test_after_an_error_that_is_caught_the_rest_is_seen():
    with profile() as p:
        for _ in range(2):
            with pytest.raises(FloatingPointError):
                failing_vjp(tensor(2)).sum().backward()
        with pytest.raises(ValueError):
            tl.matmul(tensor(2), tensor(3))
        tl.exp(tensor(2)).sum().backward()
    assert {span.parent.kind for span in p.spans if span.kind == "walk"} == {"all"}
    assert by_op(p)["exp"].backward_calls == 1


def test_other_threads_and_other_times_are_not_seen():
    with profile() as p:
        y = tl.exp(tensor(2)).sum()
        thread = threading.Thread(target=lambda: tl.sin(tensor(2)).sum().backward())
        thread.start()
        thread.join()
    tl.cos(tensor(2))
    y.backward()  # of what was recorded in the block
    assert {span.name for span in p.spans[1:]} == {"exp", "sum"}


def double(x):
    return record(x.data * 2, (x,), lambda gy: (gy * 2,))


def test_an_op_of_ones_own_is_seen_from_its_second_call_on():
    with profile() as p:
        for _ in range(3):
            double(tensor(100)).sum().backward()
    row = by_op(p)["double"]
    assert (row.calls, row.backward_calls, row.gradients) == (2, 3, 1200)


def test_a_block_without_ops():
    with profile() as p:
        pass
    assert "0 backward passes and 0 optimizer steps" in p.table()
    assert "no memory: no op has made an array" in p.table()


def test_a_second_model_is_told_from_the_first():
    first, second = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1))
    with profile(first) as p:
        second(first(tensor(4, 2))).sum().backward()
    assert {"Linear", "Sequential.0"} <= by_module(p, 1).keys()


# --- what is shown ---


def test_the_table(profiled):
    lines = profiled.table().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith("2 backward passes and 2 optimizer steps in ")
    heads = [line for line in lines if line.startswith(("op ", "module, to depth ", "peak memory "))]
    assert len(heads) == 3
    assert sum(line.startswith("all ") and line.endswith(" 100.0%") for line in lines) == 2
    assert any(line.startswith("transformer.h.1 ") for line in lines)
    assert any(line.startswith("transformer.h.1.mlp.c_fc ") for line in profiled.table(depth=4).splitlines())
    assert any(line.split()[:2] == ["gelu", "transformer.h.*.mlp"] for line in lines)


def check_trace(text: str) -> list[dict]:
    """The fields that the format asks for; on each row spans that lie in one another or apart."""
    assert text.startswith(OURS)
    data = json.loads(text, parse_constant=pytest.fail)
    assert data.keys() == {"traceEvents"}
    kinds = {"M": {"args"}, "X": {"ts", "dur", "cat", "tid", "args"}, "C": {"ts", "args"}}
    for event in data["traceEvents"]:
        assert event.keys() >= {"ph", "pid", "name"} | kinds[event["ph"]]
        assert type(event["pid"]) is int
        assert type(event["name"]) is str
        for field in ("ts", "dur"):
            assert event.get(field, 0.0) >= 0
        assert event["ph"] != "C" or all(type(value) is int for value in event["args"].values())
    spans = [event for event in data["traceEvents"] if event["ph"] == "X"]
    for row in {event["tid"] for event in spans}:
        inside = []  # the ends of the spans that are open
        for event in sorted((e for e in spans if e["tid"] == row), key=lambda e: (e["ts"], -e["dur"])):
            end = event["ts"] + event["dur"]
            while inside and inside[-1] <= event["ts"] + 1e-6:
                inside.pop()
            assert not inside or end <= inside[-1] + 2e-3, event
            inside.append(end)
    return data["traceEvents"]


def test_the_trace(profiled, tmp_path):
    profiled.trace(tmp_path / "trace.json")
    events = check_trace((tmp_path / "trace.json").read_text())
    rows = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert rows == {"forward": 1, "backward": 2}
    names = {row: {e["name"] for e in events if e["ph"] == "X" and e["tid"] == row} for row in rows.values()}
    assert {"GPT", "transformer.h.0.mlp", "linear", "step"} <= names[1]
    assert {"backward", "linear"} <= names[2]
    assert max(e["args"]["bytes made by ops"] for e in events if e["ph"] == "C") == profiled.live.peak
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_that_cannot_be_written_leaves_the_old_one(profiled, tmp_path, monkeypatch):
    (tmp_path / "trace.json").write_text("old")
    monkeypatch.setattr("tensorlite.tools.trace.json.dumps", lambda *_, **__: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        profiled.trace(tmp_path / "trace.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("trace.json", "old")]


# --- on a device ---


def test_on_a_device_events_tell_the_time(device):
    with make(dropout=0.2) as trainer:
        shape, data, config = trainer.model.config, trainer.dataset, trainer.config
    model = build_model("gpt", shape, seed=1).to("cupy")
    trainer = Trainer(model, data, config)
    trainer.train_step()
    with profile(model) as p:
        trainer.train_step()
    assert sum(row.seconds for row in by_op(p).values()) == pytest.approx(p.spans[0].seconds)
    check_trace(trace_text(p))
    assert p.live.peak > 0
    assert "Times are the device's, between events" in p.table()
    with profile() as p:
        tl.exp(Tensor(device.asarray([1.0, 2.0], np.float32), requires_grad=True))
    assert "Ops worked on other arrays than numpy's: give profile() their backend." in p.table()
    with profile(backend="cupy") as p:
        tl.exp(Tensor(device.asarray([1.0, 2.0], np.float32), requires_grad=True)).reshape(1, 2)
    assert p.live.peak == by_op(p)["exp"].made == 8


def test_train_profiles_on_a_device_without_a_graph(device, cwd, monkeypatch, capsys):
    (cwd / "text.txt").write_text(TEXT)
    monkeypatch.setattr("sys.argv", ["train.py", *TINY, "--backend=cupy", "--profile=1"])
    assert train.main() == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == (
        "profile of 1 plain step in one process, without a CUDA graph, after 2 to warm up; cupy on a stand-in"
    )
    assert second.startswith("1 backward pass and 1 optimizer step in ")  # the batch is not cut
    check_trace((cwd / "trace.json").read_text())


# --- train.py ---


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A folder in which three steps were profiled, twice, and what was printed."""
    folder = tmp_path_factory.mktemp("stepped")
    again = [run("train.py", "--data=pydoc", "--n-layer=1", "--profile=3", cwd=folder) for _ in range(2)]
    return folder, again[1].stdout


def test_train_profiles_steps_and_writes_a_trace_alone(stepped):
    folder, printed = stepped
    first, second, *_, last = printed.splitlines()
    assert first == ("profile of 3 plain steps in one process, with one thread of BLAS, after 2 to warm up; numpy")
    assert second.startswith("6 backward passes and 3 optimizer steps in ")
    assert last == "trace: trace.json, to be opened in https://ui.perfetto.dev"
    assert {path.name for path in folder.iterdir()} <= {"trace.json", "cache"}
    check_trace((folder / "trace.json").read_text())


def without_times(shown: str) -> list[str]:
    """The lines that stay, each without its times and shares, in an order that has none to do with them."""
    table, memory = shown.split("peak memory")
    columns = [f"{line[:45]}{line[88:]}" for line in table.splitlines()[4:]]  # calls, made and gradients
    return [*sorted(columns), *memory.splitlines()]


def test_what_the_docs_show_is_what_there_is(tmp_path):
    block = re.search(r"```\n\$ python (.*?)\n(.*?)```", (ROOT / "docs" / "profile.md").read_text(), re.DOTALL)
    shown = run(*block[1].split(), cwd=tmp_path).stdout
    assert without_times(shown) == without_times(block[2])


@pytest.mark.parametrize(("options", "said"), [
    ("--resume", "not allowed with argument --profile"),
    ("--dry-run", "not allowed with argument --profile"),
    ("--overwrite", "not allowed with argument --profile"),
    ("--eval-only=x", "--profile has no effect with --eval-only"),
    ("--out=x", "--out has no effect with --profile"),
    ("--max-minutes=1", "--max-minutes has no effect with --profile"),
    ("--threads=1", "--threads has no effect with --profile"),
    ("--graph", "--graph has no effect with --profile"),
])  # fmt: skip
def test_what_does_not_go_with_it(options, said, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--profile=2", options])
    with pytest.raises(UserError, match=said):
        train.main()


def test_a_file_that_is_not_ours_stays(cwd):
    (cwd / "trace.json").write_text("mine")
    (cwd / "text.txt").write_text("a b c\n" * 100)
    error = run("train.py", "--data=text.txt", "--profile=1", cwd=cwd, status=2).stderr
    assert error == "train.py: error: trace.json is there and no trace of ours: move it, or go to another folder\n"
    assert (cwd / "trace.json").read_text() == "mine"
