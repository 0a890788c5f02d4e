"""The life of a run: when it stops by itself, and what it shows on the way."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from scripts import assert_same_run, log, run, train

from gpt import BigramLanguageModel
from gpt.checkpoint import load_checkpoint
from gpt.config import TrainConfig, load_preset
from gpt.inspect import described
from gpt.runs import read
from gpt.text.dataset import Split
from gpt.training.evaluate import whole_loss
from gpt.training.forecast import duration, forecast
from gpt.training.verdict import entropy_given, verdict

QUICK = ("--max-iters=12", "--eval-interval=3")


def test_time_runs_out_at_a_step_and_nothing_is_lost(cwd):
    train(cwd, *QUICK, "--out=whole")
    stopped = train(cwd, *QUICK, "--out=run", "--max-minutes=0")
    assert stopped.stdout.endswith("stopped and saved after step 0; go on with: python train.py --resume --out run\n")
    again = train(cwd, "--out=run2", "--max-minutes=1e-9", *QUICK)
    assert "stopped and saved after step 0" in again.stdout
    run("train.py", "--resume", "--out=run", cwd=cwd)  # which has all the time again
    assert_same_run(cwd / "whole", cwd / "run")


@pytest.mark.parametrize(
    ("given", "said"), [("-1", "must be at least 0, got -1.0"), ("nan", "got nan"), ("x", "a number")]
)
def test_impossible_minutes(cwd, given, said):
    assert said in train(cwd, f"--max-minutes={given}", status=2).stderr


def test_patience_ends_a_run_as_if_it_were_done(cwd):
    """At a rate of 0 no evaluation is better than the first."""
    done = train(cwd, *QUICK, "--learning-rate=0", "--patience=2", "--out=run")
    loss = log(cwd / "run")[0]["val_loss"]
    worse = f"no evaluation of the last 2 was better than {loss:.4f} by its standard error"
    assert f"stopped at step 6: {worse} (--patience 2)\n" in done.stdout
    assert "--- sample ---" in done.stdout
    assert [row["step"] for row in log(cwd / "run")] == [0, 3, 6]
    again = run("train.py", "--resume", "--out=run", status=2, cwd=cwd)
    assert "the run in run stopped after 2 evaluations without a new best: raise --patience" in again.stderr
    run("train.py", "--resume", "--out=run", "--patience=0", cwd=cwd)
    assert log(cwd / "run")[-1]["step"] == 12


def test_patience_counts_on_after_a_resume(cwd):
    options = (*QUICK, "--learning-rate=0.3", "--patience=3", "--max-iters=60")
    train(cwd, *options, "--out=whole")
    train(cwd, *options, "--out=run", "--max-iters=6")
    assert load_checkpoint(cwd / "run/last.safetensors").progress.loss_to_beat is not None
    run("train.py", "--resume", "--out=run", "--max-iters=60", cwd=cwd)
    assert_same_run(cwd / "whole", cwd / "run")
    assert 6 < log(cwd / "run")[-1]["step"] < 60


def test_samples_on_the_way_disturb_nothing_and_are_kept(cwd):
    train(cwd, *QUICK, "--out=whole")
    done = train(cwd, *QUICK, "--out=run", "--sample-interval=4")
    rows = [json.loads(row) for row in (cwd / "run/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 8, 12]
    assert all(f"--- sample at step {row['step']} ---\n{row['text'].strip()}\n" in done.stdout for row in rows)
    assert len({row["text"] for row in rows}) == 4
    assert_same_run(cwd / "whole", cwd / "run")
    train(cwd, *QUICK, "--out=short", "--sample-interval=4", "--max-iters=8")
    run("train.py", "--resume", "--out=short", "--max-iters=12", cwd=cwd)
    assert (cwd / "short/samples.jsonl").read_bytes() == (cwd / "run/samples.jsonl").read_bytes()


def test_the_final_sample_is_the_best_models(cwd):
    train(cwd, *QUICK, "--learning-rate=0.5", "--out=run")
    best = load_checkpoint(cwd / "run/best.safetensors").progress.step
    assert best < 12
    options = ("--max-new-tokens=500", "--temperature=1", "--model=run", "--out=text")
    run("sample.py", *options, cwd=cwd)
    assert (cwd / "text").read_text() == (cwd / "run/sample.txt").read_text()


# --- how long it takes ---


@pytest.mark.parametrize(("seconds", "said"), [
    (0, "0.0 ms"), (2e-4, "0.2 ms"), (0.0124, "12 ms"), (0.98, "980 ms"), (1.04, "1.0 s"), (9.96, "10 s"), (89, "89 s"),
    (90, "1.5 min"), (5399, "90 min"), (5400, "1.5 h"), (172799, "48 h"), (300000, "3.5 days"),
])  # fmt: skip
def test_durations_are_said_in_the_unit_that_suits_them(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("step", "evaluated", "interval", "last", "expected"), [
    (0, -1, 3, 12, [0, 3, 6, 9, 12]), (0, -1, 5, 12, [0, 5, 10, 12]), (5, 5, 5, 12, [10, 12]), (7, 5, 5, 12, [10, 12]),
    (10, 5, 5, 12, [10, 12]), (12, 10, 5, 12, [12]), (0, -1, 9, 0, [0]), (20, 20, 5, 12, []),
])  # fmt: skip
def test_the_evaluations_that_are_left_are_counted(step, evaluated, interval, last, expected):
    left = forecast(TrainConfig(eval_interval=interval, max_iters=last), step, evaluated, (1.0, 100.0))
    assert (left.evaluations, left.steps) == (len(expected), max(0, last - step))
    assert left.seconds == left.steps + 100 * len(expected)


@pytest.mark.parametrize(
    ("evaluation", "advice"), [(1.0, ""), (40.0, "--eval-iters 20 instead of 200 would save 6.6 min")]
)
def test_evaluations_that_take_long_are_named(evaluation, advice):
    config = TrainConfig(max_iters=5000, eval_interval=500)
    said = forecast(config, 0, -1, (0.02, evaluation)).described(config)
    assert said.startswith(f"about {duration(100 + 11 * evaluation)}: 5,000 steps of 20 ms, 11 evaluations of ")
    assert said.endswith(advice or duration(evaluation))


def test_a_run_says_how_long_it_takes_before_its_first_evaluation(cwd):
    before, said, _ = train(cwd, *QUICK, "--out=run").stdout.partition("\ntime: about ")
    assert said
    assert "step 0" not in before


# --- what to make of it ---

COUNTED = {"uniform": 4.0, "unigram": (3.3, 3.3), "bigram": (2.5, 2.5)}
TOGETHER, APART, OVER = "stay together", "part since step", "overfitting: since step"
FITS = {  # train and val losses of the evaluations, and what is said of them
    "falling": ([4.0, 3.0, 2.0, 1.9], [4.0, 3.01, 2.01, 1.92], TOGETHER),
    "apart": ([4.0, 3.0, 2.0, 1.6], [4.0, 3.0, 2.2, 2.0], f"{APART} 20, by 0.4000 in the end"),
    "apart for a while": ([4.0, 2.5, 2.0, 1.9], [4.0, 3.0, 2.0, 1.9], TOGETHER),
    "overfitting": ([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.5, 3.0], f"{OVER} 20 the val loss has risen by 0.5000"),
    "diverging": ([4.0, 3.0, 3.5, 3.6], [4.0, 3.0, 3.5, 3.6], "since step 10 both losses have risen, by 0.6000: lower"),
    "noise": ([4.0, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 2.02], TOGETHER),
    "too short": ([4.0, 3.0], [4.0, 3.0], "too few evaluations"),
}


@pytest.mark.parametrize("name", FITS)
def test_the_verdict(name):
    train_losses, val_losses, said = FITS[name]
    rows = [
        {"step": 10 * i, "train_loss": a, "train_stderr": 0.01, "val_loss": b, "val_stderr": 0.01}
        for i, (a, b) in enumerate(zip(train_losses, val_losses, strict=True))
    ]
    first, second = verdict(rows, COUNTED, "run/best.safetensors")
    best = min(val_losses)
    assert first.startswith(f"best val loss {best:.4f} ± 0.0100 at step {10 * val_losses.index(best)}, ")
    assert f" {4 - best:.2f} below uniform, " in first
    assert f"{abs(best - 2.5):.2f} {'below' if best <= 2.5 else 'above'} bigram: run/best.safetensors" in first
    assert said in second


def test_a_harder_validation_text_is_no_overfitting():
    rows = [{"step": i, "train_loss": 2.0 - i, "val_loss": 2.3 - i} for i in range(3)]
    assert APART in verdict(rows, COUNTED, "")[1]
    assert TOGETHER in verdict(rows, COUNTED | {"bigram": (2.0, 2.4)}, "")[1]


def test_no_verdict_without_a_log():
    assert verdict([{"step": 0, "train_loss": None, "val_loss": None}], COUNTED, "") == []


# --- one batch, and all of a text ---


def test_the_floor_of_a_batch_is_what_counting_gives():
    x, y = np.array([[0, 1, 0], [0, 1, 0]]), np.array([[1, 0, 2], [1, 0, 1]])
    assert entropy_given(x, y, context=3) == pytest.approx(2 * math.log(2) / 6)  # after 0 1 0 comes 2 or 1
    by_symbol = -(3 * math.log(3 / 4) + math.log(1 / 4)) / 6  # after 0 comes 1 three times and 2 once, after 1 always 0
    assert entropy_given(x, y, context=1) == pytest.approx(by_symbol)


@pytest.mark.parametrize(("options", "said"), [
    (["--learning-rate=0.03", "--max-iters=150", "--n-embd=32"], "the batch was learnt: by step "),
    (["--learning-rate=0"], "the batch was not learnt: its loss came to "),
])  # fmt: skip
def test_overfitting_says_whether_the_batch_was_learnt(cwd, options, said):
    done = train(cwd, "--overfit", "--eval-interval=50", "--out=run", *options)
    assert said in done.stdout
    config = load_checkpoint(cwd / "run/last.safetensors").config
    assert (config.gpt.dropout, config.train.overfit) == (0.0, True)


@pytest.mark.parametrize(
    ("length", "block", "record"), [(17, 4, 0), (16, 4, 0), (18, 4, 0), (5, 4, 0), (24, 5, 6), (24, 3, 6)]
)
def test_a_whole_loss_counts_every_target_once(length, block, record):
    ids = np.random.default_rng(0).integers(0, 5, length).astype(np.uint8)
    model = BigramLanguageModel(5, block, seed=1)
    model.token_table.data[...] *= 50
    logits = model.token_table.data.astype(float)
    losses = np.log(np.exp(logits).sum(axis=1))[ids[:-1]] - logits[ids[:-1], ids[1:]]
    if record:
        losses = losses[[i for i in range(len(losses)) if i % record < block]]
    mean, stderr = whole_loss(model, Split(ids, block, record))
    assert mean == pytest.approx(losses.mean(), rel=1e-5)
    assert stderr >= 0


def test_eval_only_prints_the_losses_of_all_of_a_text(cwd):
    train(cwd, *QUICK, "--out=run")
    before = {file: file.read_bytes() for file in sorted(cwd.rglob("*")) if file.is_file()}
    out = run("train.py", "--eval-only=run", cwd=cwd).stdout
    assert "text: text.txt, which it was trained on\n" in out
    assert "over all 2,793 tokens; uniform" in out
    assert "over all 311 tokens; uniform" in out
    (cwd / "other.txt").write_text((cwd / "text.txt").read_text()[500:])
    assert "which it was not trained on" in run("train.py", "--eval-only=run", "--data=other.txt", cwd=cwd).stdout
    (cwd / "other.txt").unlink()
    assert {file: file.read_bytes() for file in sorted(cwd.rglob("*")) if file.is_file()} == before
    for other in ("--max-iters=3", "--resume", "nanogpt-cpu", "--out=x"):
        err = run("train.py", "--eval-only=run", other, cwd=cwd, status=2).stderr
        assert " has no effect with --eval-only, which takes --data: leave one of them out" in err


def test_a_dry_run_says_what_a_run_would_be_and_writes_nothing(cwd):
    (cwd / "text.txt").write_text("x")
    done = train(cwd, *QUICK, "--dry-run", "--out=run")
    assert {path.name for path in cwd.iterdir()} == {"text.txt"}
    sections = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert sections == ["parameters", "memory, about", "a step", "time"]
    assert re.search(r"^  in all +4,184$", done.stdout, re.MULTILINE)
    assert re.search(r"^time\n  about .+: 12 steps of .+, 5 evaluations of .+\n$", done.stdout, re.MULTILINE)
    assert "not allowed with" in train(cwd, "--dry-run", "--resume", status=2).stderr


# --- which run, and which text ---


def test_a_run_is_named_where_a_folder_is_asked_for(cwd):
    train(cwd, *QUICK)
    train(cwd, *QUICK, "--seed=2")
    assert sorted(path.name for path in (cwd / "runs").iterdir()) == [f"little-shakespeare-text{n}" for n in ("", "-2")]
    name = "little-shakespeare-text"
    for written in (name, f"runs/{name}"):
        again = run("train.py", "--resume", written, f"--max-iters={13 + len(written)}", cwd=cwd).stdout
        assert f"run: runs/{name}\n" in again
        sampled = run("sample.py", "--model", written, "--max-new-tokens=1", cwd=cwd).stderr
        assert sampled.startswith(f"runs/{name}/best.safetensors: step ")
    twice = run("train.py", "--resume", name, "--out=runs/x", cwd=cwd, status=2).stderr
    assert f"--resume {name} and --out runs/x name two runs: leave one of them out" in twice


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_folder_of_texts_is_one_text(cwd, kind):
    (cwd / "texts/below").mkdir(parents=True)
    texts = {"b.txt": "second\n" * 30, "a.txt": "first\n" * 30, "c": "\ufeffthird\n" * 30, ".hidden": "x" * 99}
    for name, text in texts.items():
        (cwd / "texts" / name).write_text(text, encoding="utf-8")
    (cwd / "one.txt").write_text("first\n" * 30 + "second\n" * 30 + "third\n" + "\ufeffthird\n" * 29, encoding="utf-8")
    several = " ".join(f"--data=texts/{name}" for name in ("c", "a.txt", "b.txt"))
    for out, data, said in (
        ("o", "--data=one.txt", "text: one.txt; "),
        ("s", several, "3 texts, joined in this order: a.txt, b.txt, c\n"),
        ("t", "--data=texts", "texts: 3 files, joined in this order: a.txt, b.txt, c\n"),
    ):
        assert said in train(cwd, *QUICK, *data.split(), f"--tokenizer={kind}", f"--out={out}").stdout
        assert_same_run(cwd / out, cwd / "o")
    assert load_preset(str(cwd / "s/config.toml")).train.data == [
        str(cwd / "texts" / n) for n in ("c", "a.txt", "b.txt")
    ]
    assert read(cwd / "s").values()["text"] == "c and 2 more"
    assert described(load_checkpoint(cwd / "s/best.safetensors"))[2].endswith("texts/b.txt")
    for out in "st":
        run("train.py", "--resume", f"--out={out}", "--max-iters=13", cwd=cwd)
    (cwd / "texts/c").unlink()
    assert "is not the text that" in run("train.py", "--resume", "--out=t", "--max-iters=14", cwd=cwd, status=2).stderr


def test_strings_of_a_and_b_are_judged_by_symbol(cwd):
    done = run("train.py", "bigram", "--data=ab", "--max-iters=300", "--eval-iters=2", "--learning-rate=0.1", cwd=cwd)
    after = re.search(r"loss after an a ([\d.]+), at best ln 2 = 0.6931; after a b ([\d.]+), at best 0\n", done.stdout)
    assert float(after[1]) == pytest.approx(math.log(2), abs=0.01)
    assert float(after[2]) < 0.05


def test_the_newest_run_may_lie_anywhere(cwd, tmp_path_factory):
    far = tmp_path_factory.mktemp("far") / "run"
    train(cwd, *QUICK)
    for out, shown in (("near", "near"), (far, str(far))):
        train(cwd, *QUICK, f"--out={out}")
        said = run("sample.py", "--max-new-tokens=1", cwd=cwd).stderr
        assert said.startswith(f"{shown}/best.safetensors: step 12")
    assert f"run: {far}\n" in run("train.py", "--resume", "--max-iters=13", cwd=cwd).stdout
    shutil.rmtree(far)
    assert run("sample.py", "--max-new-tokens=1", cwd=cwd).stderr.startswith("near/best.safetensors: ")
    (cwd / "below").mkdir()  # from where nothing was begun
    here = run("sample.py", cwd=cwd / "below", env={"XDG_CACHE_HOME": str(cwd / "cache")}, status=2).stderr
    assert "there is no run in " in here
    for broken in ("[", "[]", json.dumps({str(cwd): 3}), json.dumps({str(cwd): [3, "\0", "x" * 5000, "near"]})):
        (cwd / "cache/tensorlite/runs.json").write_text(broken)
        assert run("sample.py", "--max-new-tokens=1", cwd=cwd).stderr.count("\n") == 1
