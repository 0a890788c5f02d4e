"""The life of a run: when it stops by itself, and what it shows on the way."""

import json

import pytest
from scripts import assert_same_run, log, run, train

from gpt.checkpoint import load_checkpoint
from gpt.config import TrainConfig
from gpt.training.forecast import duration, forecast

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
    assert "has stopped for want of a new best in 2 evaluations: raise --patience to go on" in again.stderr
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
