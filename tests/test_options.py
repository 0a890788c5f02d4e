"""Every option of both scripts has an effect, or a sentence says why not. One without a row here fails."""

import json
import re
import shutil

import pytest
from scripts import TEXT, TINY

import sample
import train
from gpt.cli import run_script

BASE = (*TINY, "--max-iters=6", "--eval-interval=3", "--out=new")
# Option of train.py -> what is added to BASE, and then to that for the option's own sake; and what must differ: the
# log's losses, what is printed, the files of the run, or the exit status with this sentence.
TRAIN = {
    "--activation": ("", "--activation=gelu", "log"),
    "--backend": ("", "--backend=cupy", "the cupy backend cannot"),
    "--batch-size": ("", "--batch-size=3", "log"),
    "--beta1": ("", "--beta1=0.5", "log"),
    "--beta2": ("", "--beta2=0.5", "log"),
    "--bias": ("", "--no-bias", "log"),
    "--block-size": ("", "--block-size=5", "log"),
    "--data": ("", "--data=other.txt", "log"),
    "--dropout": ("", "--dropout=0.6", "log"),
    "--dry-run": ("", "--dry-run", "files"),
    "--dtype": ("", "--dtype=bfloat16", "bfloat16"),
    "--eval-interval": ("", "--eval-interval=2", "log"),
    "--eval-iters": ("", "--eval-iters=3", "log"),
    "--eval-only": ("", "--eval-only=run", "no effect with --eval-only"),
    "--grad-clip": ("", "--grad-clip=0.001", "log"),
    "--gradient-accumulation-steps": ("", "--gradient-accumulation-steps=2", "log"),
    "--graph": ("", "--no-graph", "--no-graph has no effect on the CPU"),
    "--head-bias": ("", "--no-head-bias", "printed"),
    "--help": ("", "--help", "files"),
    "--init-from": ("", "--init-from=run --max-iters=3", "log"),
    "--learning-rate": ("", "--learning-rate=0.01", "log"),
    "--lr-decay-iters": ("", "--lr-decay-iters=6", "log"),
    "--max-iters": ("", "--max-iters=4", "log"),
    "--max-minutes": ("", "--max-minutes=0", "log"),
    "--micro-batch-size": ("", "--micro-batch-size=4", "printed"),
    "--min-lr": ("--lr-decay-iters=6", "--min-lr=9e-4", "log"),
    "--n-embd": ("", "--n-embd=8", "log"),
    "--n-head": ("", "--n-head=1", "log"),
    "--n-layer": ("", "--n-layer=2", "log"),
    "--out": ("", "--out=elsewhere", "files"),
    "--overfit": ("", "--overfit", "log"),
    "--overwrite": ("--out=full", "--overwrite", "full exists and is not empty"),
    "--patience": ("--learning-rate=0", "--patience=1", "log"),
    "--profile": ("", "--profile=1", "--out has no effect with --profile"),
    "--qkv-bias": ("", "--qkv-bias", "printed"),
    "--resume": ("--out=run", "--resume --max-iters=21", "run exists and is not empty"),
    "--sample-interval": ("", "--sample-interval=3", "files"),
    "--seed": ("", "--seed=1", "log"),
    "--tf32": ("", "--tf32", "--tf32 has no effect on the CPU"),
    "--threads": ("", "--threads=1", "printed"),
    "--tie-weights": ("", "--tie-weights", "printed"),
    "--tokenizer": ("", "--tokenizer=byte", "log"),
    "--val-fraction": ("", "--val-fraction=0.4", "log"),
    "--vocab-size": ("--tokenizer=bpe --vocab-size=270", "--vocab-size=260", "printed"),
    "--warmup-iters": ("", "--warmup-iters=5", "log"),
    "--weight-decay": ("", "--weight-decay=90", "log"),
}
# Option of sample.py -> the same.
SAMPLE = {
    "--attention": ("", "--attention=page.html", "files"),
    "--backend": ("", "--backend=cupy", "the cupy backend cannot"),
    "--dtype": ("", "--dtype=bfloat16", "bfloat16"),
    "--graph": ("", "--no-graph", "--no-graph has no effect on the CPU"),
    "--help": ("", "--help", "printed"),
    "--max-new-tokens": ("", "--max-new-tokens=7", "printed"),
    "--model": ("", "--model=full", "said"),
    "--num-samples": ("", "--num-samples=2", "printed"),
    "--out": ("", "--out=written", "files"),
    "--prompt": ("", "--prompt=9", "printed"),
    "--prompt-file": ("", "--prompt-file=other.txt", "printed"),
    "--quiet": ("", "--quiet", "said"),
    "--seed": ("", "--seed=1", "printed"),
    "--show-probs": ("", "--show-probs", "said"),
    "--stop": ("", "--stop=e", "printed"),
    "--temperature": ("", "--temperature=9", "printed"),
    "--tf32": ("", "--tf32", "--tf32 has no effect on the CPU"),
    "--top-k": ("", "--top-k=1", "printed"),
    "--top-p": ("", "--top-p=0.001", "printed"),
}


@pytest.fixture
def observed(cwd, copy, monkeypatch, capsys):
    """observed(script, *arguments): what there is to see of a call, by kind. run/ and full/ are finished runs."""
    (cwd / "text.txt").write_text(TEXT)
    (cwd / "other.txt").write_text(TEXT[:2000])
    shutil.copytree(copy, cwd / "full")

    def call(script, *arguments: str) -> dict:
        before = {path for path in cwd.rglob("*") if path.is_file()}
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_script(script.main, script.MEMORY_ADVICE)
        printed, said = capsys.readouterr()
        new = {path for path in cwd.rglob("*") if path.is_file()} - before
        rows = [json.loads(row) for path in new if path.name == "log.jsonl" for row in path.read_text().splitlines()]
        losses = [(row["step"], row["train_loss"], row["val_loss"], row["lr"]) for row in rows]
        names = {path.relative_to(cwd).as_posix() for path in new}
        for path in new:
            path.unlink()
        printed = re.sub("(?m)^time: .*$|full|run", "", printed)
        return {"status": stop.value.code, "log": losses, "printed": printed, "said": said, "files": names}

    return call


@pytest.mark.parametrize(("script", "name", "row"), [
    *((train, name, row) for name, row in TRAIN.items()), *((sample, name, row) for name, row in SAMPLE.items()),
])  # fmt: skip
def test_an_option_has_an_effect_or_is_refused(script, name, row, observed):
    given, option, differs = row
    base = BASE if script is train else ("--model=run", "--max-new-tokens=30")
    before, after = observed(script, *base, *given.split()), observed(script, *base, *given.split(), *option.split())
    if differs in before:
        assert before[differs] != after[differs]
        assert before["status"] == after["status"] == 0
    else:
        said = [seen["said"] for seen in (before, after) if seen["status"] == 2]
        assert len(said) == 1
        assert differs in said[0]
        assert said[0].count("\n") == 1


@pytest.mark.parametrize(("parser", "rows"), [(train.build_parser({}), TRAIN), (sample.build_parser(), SAMPLE)])
def test_no_option_is_missing(parser, rows):
    spelled = (action.option_strings for action in parser._actions if action.option_strings)
    assert {next(name for name in reversed(names) if not name.startswith("--no-")) for names in spelled} == rows.keys()


# Option -> a value that cannot be, and what is said of it.
IMPOSSIBLE = {
    train: {
        "--activation": ("tanh", "activation must be one of relu, gelu, gelu_tanh, got 'tanh'"),
        "--backend": ("tpu", "argument --backend: invalid choice: 'tpu'"),
        "--batch-size": ("0", "batch_size must be at least 1, got 0"),
        "--beta1": ("1", "beta1 must be at most 0.9999999, got 1.0"),
        "--beta2": ("-0.1", "beta2 must be at least 0, got -0.1"),
        "--block-size": ("3000", "has 2793 tokens, but a block of 3000 needs 3001"),
        "--data": ("nowhere.txt", "cannot read nowhere.txt: No such file or directory"),
        "--dropout": ("1.1", "dropout must be at most 1, got 1.1"),
        "--dtype": ("float16", "argument --dtype: invalid choice: 'float16'"),
        "--eval-interval": ("0", "eval_interval must be at least 1, got 0"),
        "--eval-iters": ("0", "eval_iters must be at least 1, got 0"),
        "--eval-only": ("nowhere", "there is no checkpoint nowhere"),
        "--grad-clip": ("-1", "grad_clip must be at least 0, got -1.0"),
        "--gradient-accumulation-steps": ("0", "gradient_accumulation_steps must be at least 1, got 0"),
        "--init-from": ("nowhere", "nowhere"),
        "--learning-rate": ("inf", "learning_rate must be finite, got inf"),
        "--lr-decay-iters": ("-1", "lr_decay_iters must be at least 0, got -1"),
        "--max-iters": ("-1", "max_iters must be at least 0, got -1"),
        "--max-minutes": ("-1", "--max-minutes must be at least 0, got -1.0"),
        "--micro-batch-size": ("-1", "micro_batch_size must be at least 0, got -1"),
        "--min-lr": ("1", "min_lr has no effect at a constant rate"),
        "--n-embd": ("7", "n_embd must be a multiple of n_head, got 7 and 2"),
        "--n-head": ("0", "n_head must be at least 1, got 0"),
        "--n-layer": ("1.5", "argument --n-layer: expected a whole number such as 1000, got '1.5'"),
        "--out": ("text.txt", "text.txt exists and is not empty"),
        "--patience": ("-1", "patience must be at least 0, got -1"),
        "--profile": ("0", "--profile must be at least 1, got 0"),
        "--sample-interval": ("-1", "sample_interval must be at least 0, got -1"),
        "--seed": ("-1", "seed must be at least 0, got -1"),
        "--threads": ("0", "--threads must be at least 1, got 0"),
        "--tokenizer": ("words", "words"),
        "--val-fraction": ("1", "val_fraction must be at most 0.9, got 1.0"),
        "--vocab-size": ("300", "--vocab-size has no effect without --tokenizer bpe"),
        "--warmup-iters": ("-1", "warmup_iters must be at least 0, got -1"),
        "--weight-decay": ("nan", "weight_decay must be finite, got nan"),
    },
    sample: {
        "--attention": ("nowhere/page", "cannot write nowhere/page: give a file name in a folder that exists"),
        "--backend": ("tpu", "argument --backend: invalid choice: 'tpu'"),
        "--dtype": ("float16", "argument --dtype: invalid choice: 'float16'"),
        "--max-new-tokens": ("-1", "--max-new-tokens must be at least 0, got -1"),
        "--model": ("nowhere", "there is no checkpoint nowhere"),
        "--num-samples": ("0", "--num-samples must be at least 1, got 0"),
        "--out": ("nowhere/text", "cannot write nowhere/text: give a file name in a folder that exists"),
        "--prompt": ("漢", "not in the model's vocabulary of 24: '漢'"),
        "--prompt-file": ("nowhere.txt", "cannot read the prompt nowhere.txt: No such file or directory"),
        "--seed": ("-1", "--seed must be at least 0, got -1"),
        "--stop": ("", "--stop cannot be ''"),
        "--temperature": ("-1", "--temperature must be at least 0, got -1.0"),
        "--top-k": ("0", "--top-k must be at least 1, got 0"),
        "--top-p": ("0", "--top-p must be above 0, got 0.0"),
    },
}


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, rows in IMPOSSIBLE.items() for name in rows])
def test_an_impossible_value_is_one_sentence_and_leaves_nothing(script, name, observed):
    value, said = IMPOSSIBLE[script][name]
    base = () if name == "--eval-only" else BASE if script is train else ("--model=run",)
    seen = observed(script, *base, f"{name}={value}")
    assert (seen["status"], seen["files"], seen["said"].count("\n")) == (2, set(), 1), seen
    assert said in seen["said"]


@pytest.mark.parametrize(("script", "parser"), [(train, train.build_parser({})), (sample, sample.build_parser())])
def test_every_option_with_a_value_has_an_impossible_one(script, parser):
    named = [action.option_strings for action in parser._actions if action.option_strings and action.nargs != 0]
    assert {names[-1] for names in named} == IMPOSSIBLE[script].keys()
