"""train.py: its options, its files, its errors in one sentence, and runs that survive whatever stops them."""

import contextlib
import importlib.util
import io
import math
import os
import pty
import re
import signal
import sys
import termios
from pathlib import Path

import pytest
from scripts import (
    AGAIN,
    LOG_KEYS,
    RUN,
    TEXT,
    TINY,
    assert_complaint,
    assert_same_run,
    log,
    run,
    start_long,
    tiny,
    train,
)

import gpt.text.sources
import gpt.training.loop
import gpt.training.report
import train as script
from gpt.advice import FOREIGN, as_option
from gpt.checkpoint import load_checkpoint, save_checkpoint
from gpt.cli import run_script
from gpt.config import PRESETS, load_preset, option_fields
from gpt.errors import UserError
from gpt.models.kinds import MODEL_KINDS
from gpt.training.report import Reporter
from sample import build_parser

HUGE = 10**15
SPLITS = ("train", "val")
pytestmark = pytest.mark.usefixtures("cwd")


def main(*args, capsys) -> tuple[int, str, str]:
    """(status, stdout, stderr) of train.py in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            run_script(script.main, script.MEMORY_ADVICE)
    return stop.value.code, *capsys.readouterr()


# --- options ---


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_help_lists_every_option_with_the_presets_value(capsys, preset):
    status, out, err = main(*([preset] if preset else []), "--help", capsys=capsys)
    assert (status, err) == (0, "")
    text = re.sub(r"\s+", " ", out)
    values = load_preset(preset or "little-shakespeare").to_dict()
    for name, f in option_fields().items():
        flag, value = "--" + name.replace("_", "-"), str(values.get(name))
        if f.metadata["flag"] and name not in MODEL_KINDS[values["model"]].ignored:
            value = {"None": "none", "True": "yes", "False": "no"}.get(value, value)
            assert re.search(
                rf" {flag}[ ,].{{,80}}{re.escape(f.metadata['help'])} \(default: {re.escape(value)}\)", text
            )
        else:
            assert flag not in text
    for flag in ("--backend", "--dtype", "--tf32", "--graph", "--threads", "--out", "--resume", "--overwrite"):
        assert re.search(rf" {flag}[ ,].{{,100}}\(default: ", text)


def test_help_works_as_a_command_and_for_a_file(cwd):
    (cwd / "my.toml").write_text("n_layer = 77\n")
    assert "transformer blocks (default: 77)" in run("train.py", "my.toml", "-h", cwd=cwd).stdout
    assert "Train a GPT" in run("train.py", "--help", cwd=cwd).stdout


def test_underscores_and_negated_flags():
    args = script.parse_arguments(
        ["bigram", "--max_iters=3", "--batch_size", "4", "--no_bias", "--data=a_b", "--qkv-bias"]
    )
    given = {name: value for name, value in vars(args).items() if name not in script.NOT_CONFIGURED}
    assert given == {"max_iters": 3, "batch_size": 4, "bias": False, "data": "a_b", "qkv_bias": True}
    assert args.preset == "bigram"


def test_an_option_given_again_counts():
    assert script.parse_arguments(["--max-iters=3", "--bias", "--no-bias", "--max_iters", "4"]).max_iters == 4


NANOGPT = "eval_interval eval_iters batch_size block_size gradient_accumulation_steps n_layer n_head n_embd dropout"
NANOGPT += " learning_rate max_iters weight_decay beta1 beta2 grad_clip warmup_iters lr_decay_iters min_lr bias dtype"
NANOGPT += " backend out_dir log_interval eval_only always_save_checkpoint init_from wandb_log wandb_project"
NANOGPT += " wandb_run_name dataset decay_lr device compile seed"


@pytest.mark.parametrize("name", NANOGPT.split())
def test_nanogpts_options_are_ours_or_answered(name):
    ours = name in vars(script.build_parser({}).parse_args([])) or name in option_fields()
    if not ours:
        with pytest.raises(UserError, match=rf"^unknown option --{name}(: |; did you mean )"):
            script.parse_arguments([f"--{name}=x"])


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_advised_exists(name):
    """Options in the sentences, and the names that stand for another."""
    known = {*build_parser()._option_string_actions, *script.build_parser({})._option_string_actions}
    assert set(re.findall(r"--[\w-]+", FOREIGN[name])) <= known
    assert " " in FOREIGN[name] or as_option(FOREIGN[name]) in known


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("--data empty.txt", "empty.txt is empty"),
        ("--data missing.txt", "cannot read missing.txt: No such file or directory"),
        ("--data folder", "the folder folder holds no files with text; --data needs some to train on"),
        ("--data latin1.txt", "latin1.txt is not UTF-8 text (see the byte at offset 3); convert it to UTF-8 first, "
         "or take its bytes as they are with --tokenizer byte"),
        ("--data short.txt", "use a smaller --block-size, a larger file or another --val-fraction"),
        (f"--block-size {HUGE}", "lower --batch-size or --micro-batch-size or --block-size"),
        (f"--data ab --block-size {10**10}", "lower --batch-size or --micro-batch-size or --block-size"),
        (f"--eval-iters {HUGE}", ": lower --eval-iters\n"),
        ("--data shakespeare", "cannot download tinyshakespeare"),
        ("--n-embd 17", "n_embd must be a multiple of n_head, got 17 and 2"),
        ("--seed -1", "seed must be at least 0, got -1"),
        (f"--seed {2**63}", f"seed must be at most {2**63 - 1}, got {2**63}"),
        ("--max-iters -1", "max_iters must be at least 0, got -1"),
        ("--max-iters 1e3", "argument --max-iters: expected a whole number such as 1000, got '1e3' (see --help)"),
        (f"--max-iters {'9' * 5000}", "argument --max-iters: expected a whole number such as 1000, got '999999"),
        ("--max-iters", "--max-iters needs a value after it (see --help)"),
        ("--data --my_book", "--data needs a value after it; if that is --my_book, write --data=--my_book"),
        ("--data=", "--data cannot be '': give another value, or leave --data out"),
        ("--learning-rate 1/3", "argument --learning-rate: expected a number such as 0.5 or 1e-3, got '1/3'"),
        ("--learning-rate nan", "learning_rate must be finite, got nan"),
        ("--learning-rate -0.5", "learning_rate must be at least 0, got -0.5"),
        ("--learning-rate 1e999", "learning_rate must be finite, got inf"),
        ("--dropout 1.5", "dropout must be at most 1, got 1.5"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--activation tanh", "activation must be one of relu, gelu, gelu_tanh, got 'tanh'"),
        ("--tokenizer word", "tokenizer must be one of char, byte, bpe, or the name of a tokenizer.json, got 'word'"),
        ("--val-fraction 0", "val_fraction must be at least 0.001, got 0.0"),
        ("--val-fraction 1", "val_fraction must be at most 0.9, got 1.0"),
        (f"--n-embd {HUGE}", ": lower --n-embd\n"),
        (f"--n-layer {HUGE}", "--n-embd or --n-layer\n"),
        (f"--batch-size {HUGE}", ": lower --batch-size or --block-size\n"),
        (f"--gradient-accumulation-steps {HUGE}", "lower --batch-size or --gradient-accumulation-steps or --block"),
        (f"--n-embd {10**200}", "n_embd must be less than 2**63, got a larger number"),
        ("--backend cupy", "python -m tensorlite.doctor says what to install"),
        ("--backend cuda", "argument --backend: invalid choice: 'cuda'"),
        ("--overwrite", "--overwrite has no effect without --out: add the run to replace, or leave it out"),
        ("--dropout 1e-6", "--dropout 1e-06 rounds to 0, for it comes in steps of 2**-16: give 0, or at least 2e-05"),
        ("--threads 0", "--threads must be at least 1, got 0"),
        ("--out folder", "folder exists and is not empty: give another --out, or --resume or --overwrite"),
        ("--out folder --overwrite", "folder is no run folder, so --overwrite leaves it alone"),
        ("--out empty.txt/run", "cannot make the run folder empty.txt/run: Not a directory"),
        ("--resume", "there is no run in"),
        ("--resume --out folder", "there is nothing to resume in folder: it has no last.safetensors"),
        ("--resume --overwrite --out folder", "argument --overwrite: not allowed with argument --resume"),
        ("--n-lay 2", "unknown option --n-lay; did you mean --n-layer? (see --help)"),
        ("--learning-rat 1", "unknown option --learning-rat; did you mean --learning-rate?"),
        ("--block-sise 8", "unknown option --block-sise; did you mean --block-size?"),
        ("--bacth_size=8", "unknown option --bacth_size; did you mean --batch-size?"),
        ("-batch-size 8", "unknown option -batch-size; did you mean --batch-size?"),
        ("--num_layers 8", "unknown option --num_layers; did you mean --n-layer?"),
        ("--lr 1e-3", "unknown option --lr; did you mean --learning-rate?"),
        ("--dataset=x", "unknown option --dataset; did you mean --data?"),
        ("--epochs 3", "unknown option --epochs; did you mean --max-iters?"),
        ("--out_dir=x", "unknown option --out_dir: a run's folder is --out for train.py"),
        ("--init_from=resume", "there is no resume: to go on with a run write --resume"),
        ("--init_from=scratch", "there is no scratch: leave --init-from out to start from random weights"),
        ("--init_from=gpt2-xl", "there is no gpt2-xl: get that folder with: hf download openai-community/gpt2-xl "),
        ("--init-from=missing", "there is no missing: give a run, a checkpoint, or a folder"),
        ("--init-from=x --resume", "--resume goes on with a run and --init-from begins a new one: leave one of them"),
        ("--device=cuda", "unknown option --device: --backend cupy computes on a GPU"),
        ("--compile", "unknown option --compile: leave it out: there is nothing to compile"),
        ("--wandb_log=True", "unknown option --wandb_log: leave it out: log.jsonl"),
        ("--vocab-size 300", "--vocab-size has no effect without --tokenizer bpe: add that, or leave it out"),
        ("--model bigram", "unknown option --model: a model comes with its preset"),
        ("--wholly-unknown 3", "unknown option --wholly-unknown (see --help)"),
        ("--bias=False", "--bias takes no value: write --bias or --no-bias (see --help)"),
        ("--bias True", "--bias takes no value: write --bias or --no-bias"),
        ("--no_tf32=1", "--no-tf32 takes no value: write --tf32 or --no-tf32"),
        ("--resume=yes", "--resume takes no value: write --resume"),
        ("bigram nanogpt-cpu", "expected one preset, got bigram and nanogpt-cpu: leave one out"),
        ("bigram book.txt", "unknown preset 'book.txt': to train on a text write --data book.txt"),
        ("short.txt", "unknown preset 'short.txt': to train on a text write --data short.txt"),
        ("gpt2", "unknown preset 'gpt2': expected one of little-shakespeare, bigram, "),
        ("shakespeare_char", "unknown preset 'shakespeare_char': did you mean shakespeare-char?"),
        ("config/train_shakespeare_char.py", "did you mean shakespeare-char?"),
        ("config/train_gpt2.py", "unknown preset 'config/train_gpt2.py': expected one of little-shakespeare, "),
        ("missing.toml", "cannot read the preset missing.toml: No such file or directory; check the name"),
        ("pipe.toml", "pipe.toml is not a regular file: give another"),
        ("folder.toml", "folder.toml is not a regular file: give another"),
        ("x" * 300 + ".toml", ": File name too long; give a shorter name"),
        ("x" * 300, "unknown preset 'xxx"),
        ("--out " + "x" * 300, ": File name too long; give a shorter name"),
        ("--resume --out " + "x" * 300, ": File name too long; give a shorter name"),
        ("digits.toml", "digits.toml: n_layer must be less than 2**63, got a larger number"),
        ("nul.toml", "nul.toml: data must be without NUL, which no file's name has, got 'a\\x00b'"),
        ("--resume --out linked", "linked/.lock is a symbolic link, which may lead out of its folder"),
        ("latin1.toml", "cannot read the preset latin1.toml: 'utf-8' codec can't decode"),
        ("broken.toml", "broken.toml is not a valid TOML file: "),
        ("nanogpt.toml", "nanogpt.toml: unknown key 'out_dir': a run's folder is --out for train.py"),
        ("typo.toml", "typo.toml: unknown key 'n_heads'; did you mean 'n_head'?"),
        ("wrong.toml", "wrong.toml: n_layer must be of type int, got '4'"),
        ("bigram", "--n-layer has no effect on a bigram table: leave it out"),
    ],
)  # fmt: skip
def test_mistake_is_one_sentence_and_leaves_nothing_behind(cwd, capsys, args, said):
    for name, content in {
        "text.txt": TEXT.encode(), "empty.txt": b"", "latin1.txt": b"caf\xe9" * 100, "short.txt": b"to be or not",
        "latin1.toml": b'data = "\xe9"', "broken.toml": b"n_layer = ", "typo.toml": b"n_heads = 2",
        "nanogpt.toml": b"n_layer = 2\nout_dir = 'out'\n",
        "wrong.toml": b'n_layer = "4"', "folder/holiday.jpg": b"",
        "digits.toml": b"n_layer = 0x" + b"f" * 5000, "nul.toml": b'data = "a\\u0000b"', "folder.toml/x": b"",
        "linked/last.safetensors": b"",
    }.items():  # fmt: skip
        (cwd / name).parent.mkdir(exist_ok=True)
        (cwd / name).write_bytes(content)
    os.mkfifo(cwd / "pipe.toml")
    (cwd / "linked/.lock").symlink_to("../text.txt")
    before = sorted(cwd.rglob("*"))
    if "cupy" in args and importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is installed")
    status, out, err = main(*tiny(*args.split()), capsys=capsys)
    assert status == 2
    assert_complaint(err, said, "train.py")
    assert out == ""
    assert sorted(cwd.rglob("*")) == before
    assert (cwd / "text.txt").read_text() == TEXT


def test_an_empty_argument_is_no_preset(capsys):
    status, out, err = main("", "--data=ab", capsys=capsys)
    assert (status, out) == (2, "")
    assert_complaint(err, "an argument is empty: leave it out, or give a name", "train.py")


def test_more_threads_than_there_is_work_for_are_said_and_limited(cwd):
    out = train(cwd, "--threads=5000", "--batch-size=64", "--micro-batch-size=1", "--max-iters=0").stdout
    cores = os.cpu_count()
    assert re.search(
        rf"; numpy on {cores} cores?, for which --threads 5000 is more than there is work or cores for$", out, re.M
    )
    assert "numpy on 1 core, for which --threads 2" in train(cwd, "--threads=2", "--micro-batch-size=0").stdout


# --- a run ---


def test_what_a_run_prints_and_leaves(finished):
    out, folder = (finished / "stdout").read_text(), finished / "run"
    last, rows = load_checkpoint(folder / "last.safetensors"), log(folder)
    parameters = last.build_model().num_parameters()
    shape = (
        r"text: text.txt; [\d,]+ tokens to train on, [\d,]+ to validate\n"
        rf"model: gpt, {parameters:,} parameters; numpy on \d+ cores?\n"
        r"losses reached by counting \(train / val\): uniform N, unigram N / N, bigram N / N, trigram N / N\n"
        r"in bits per character \(val\): uniform B, unigram B, bigram B, trigram B\n"
        r"run: run\ntime: about .+: 20 steps of .+, 5 evaluations of .+\n"
        r"(step \d+: train loss N, val loss N \(B bits per character\)\n)+"
        r"--- sample ---\n(?s:.+)\n--------------\n"
        r"best val loss N ± N at step \d+, .+ trigram: run/best.safetensors\n.+\n"
        r"more text: python sample.py --model run\n"
    )
    assert re.fullmatch(shape.replace("N", r"\d\.\d{4}").replace("B", r"\d\.\d{3}"), out), out
    printed = re.findall(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+) \(([\d.]+) bits", out, re.MULTILINE)
    bits = [f"{r['val_bits_per_character']:.3f}" for r in rows]
    losses = [(f"{r['step']}", f"{r['train_loss']:.4f}", f"{r['val_loss']:.4f}") for r in rows]
    assert printed == [(*row, b) for row, b in zip(losses, bits, strict=True)]
    assert all(r[f"{part}_bits_per_character"] == r[f"{part}_loss"] / math.log(2) for r in rows for part in SPLITS)
    assert {file.name for file in folder.iterdir()} == RUN
    assert [row["step"] for row in rows] == [0, 6, 12, 18, 20]  # the end too
    assert all(list(row) == LOG_KEYS for row in rows[1:])
    assert list(rows[0]) == [*LOG_KEYS, "uniform", "unigram", "bigram", "trigram"]
    assert rows[0]["grad_norm"] is rows[0]["tokens_per_second"] is None
    assert all(isinstance(value, (int, float)) for row in rows[1:] for value in row.values())
    best = load_checkpoint(folder / "best.safetensors")
    assert best.progress.best_val_loss == last.progress.best_val_loss == min(row["val_loss"] for row in rows)
    assert best.optimizer == {}
    assert (folder / "sample.txt").read_text().strip() in out
    assert load_preset(str(folder / "config.toml")) == last.config


def test_config_of_a_run_is_a_preset(copy):
    run("train.py", "run/config.toml", "--out", "again", cwd=copy.parent)
    assert_same_run(copy, Path("again"))


@pytest.mark.parametrize("option", ["--micro-batch-size=100", "--max-iters=0", "--eval-interval=100", "--threads=99"])
def test_odd_but_fine(cwd, option):
    train(cwd, option)
    steps = [row["step"] for row in log(cwd / "runs/little-shakespeare-text")]
    assert steps == {"--max-iters=0": [0], "--eval-interval=100": [0, 20]}.get(option, [0, 6, 12, 18, 20])


@pytest.mark.parametrize(
    ("data", "first"),
    [
        ("pydoc", "text: language reference of Python"),
        ("ab", "text: a/b strings; "),
        (None, "tinyshakespeare is not cached and could not be downloaded: using Python's language reference"),
    ],
)
def test_built_in_texts_without_a_network(cwd, data, first):
    given = [f"--data={data}"] if data else []
    out = run("train.py", "bigram", "--max-iters=5", "--eval-iters=2", *given, cwd=cwd).stdout
    assert out.startswith(first)
    (folder,) = (cwd / "runs").iterdir()
    assert folder.name == (f"bigram-{data}" if data else "bigram")
    symbols = load_checkpoint(folder / "last.safetensors").tokenizer.vocab_size
    assert f"model: bigram, {symbols**2:,} parameters" in out
    config = load_preset(str(folder / "config.toml"))
    assert (config.train.model, config.train.data) == ("bigram", data or "pydoc")


def test_any_file_trains_and_resumes_as_bytes(cwd):
    (cwd / "song.mid").write_bytes(bytes(range(256)) * 20)
    options = ["--tokenizer=byte", "--data=song.mid", "--out=run"]
    train(cwd, *options, "--max-iters=1")
    assert "--- sample ---" in run("train.py", "--resume", "--out=run", "--max-iters=2", cwd=cwd).stdout
    sample = (cwd / "run/sample.txt").read_bytes()
    assert len(sample) == 1 + 500 + 1  # every byte, though they are no text
    assert "\ufffd" in sample.decode(errors="replace")


# --- resuming ---


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([], []),
        (["--threads=1"], ["--threads=3"]),
        (["--eval-interval=4"], []),
        (["--eval-interval=7"], ["--threads=1"]),
    ],
)
def test_stopping_and_resuming_changes_nothing(finished, cwd, first, then):
    train(cwd, "--max-iters=10", *first, "--out=run")
    run("train.py", "--resume", "--out=run", "--max-iters=20", "--eval-interval=6", *then, cwd=cwd)
    assert_same_run(finished / "run", cwd / "run")
    assert load_preset("run/config.toml").train.max_iters == 20


def test_resuming_drops_the_rows_after_the_checkpoint(copy):
    with (copy / "log.jsonl").open("a") as file:
        file.write('{"step": 24}\n{"step": 30}\n{"ste')
    (copy / ".last.safetensors.99.tmp").write_text("half a file")
    run("train.py", "--resume", "--out=run", "--max-iters=26", cwd=copy.parent)
    assert [row["step"] for row in log(copy)] == [0, 6, 12, 18, 20, 24, 26]
    assert all(list(row) == LOG_KEYS for row in log(copy)[1:])
    assert {file.name for file in copy.iterdir()} == RUN


def test_newest_run_is_resumed_and_names_are_numbered(cwd):
    outs = [train(cwd, "--max-iters=1").stdout for _ in range(2)]
    outs.append(run("train.py", "little-shakespeare", "--resume", "--max-iters=2", cwd=cwd).stdout)
    names = ["little-shakespeare-text", "little-shakespeare-text-2", "little-shakespeare-text-2"]
    assert [re.search("^run: (.*)$", out, re.MULTILINE)[1] for out in outs] == [f"runs/{name}" for name in names]
    run("train.py", *TINY, "--max-iters=1", "--out=runs/little-shakespeare-text-2", "--overwrite", cwd=cwd)
    assert [row["step"] for row in log(Path("runs/little-shakespeare-text-2"))] == [0, 1]


def test_interrupted_before_the_last_evaluation(copy):
    checkpoint = load_checkpoint(copy / "last.safetensors")
    checkpoint.progress.evaluated_step = 18
    save_checkpoint(copy / "last.safetensors", checkpoint)
    (copy / "log.jsonl").write_text("".join((copy / "log.jsonl").read_text().splitlines(keepends=True)[:-1]))
    out = run("train.py", "--resume", "--out=run", cwd=copy.parent).stdout
    assert "step 20: train loss" in out
    assert [row["step"] for row in log(copy)] == [0, 6, 12, 18, 20]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("", "the run in run has its 20 steps: raise --max-iters to go on"),
        ("--max-iters=7", "the run in run has its 20 steps: raise --max-iters to go on"),
        ("--n-layer=2", "--n-layer cannot change on --resume: start a new run for it"),
        ("--no-bias", "--bias cannot change on --resume"),
        ("--block-size=4", "--block-size cannot change on --resume"),
        ("--tokenizer=byte", "--tokenizer cannot change on --resume"),
        ("--val-fraction=0.2", "--val-fraction cannot change on --resume"),
        ("--data=other.txt", "other.txt is not the text that the run in run was trained on"),
        ("--data=missing.txt", "cannot read missing.txt"),
        ("bigram", "the run in run was started from little-shakespeare, not bigram"),
        ("--seed=-1", "seed must be at least 0"),
    ],
)
def test_resuming_as_something_else_is_refused(copy, args, said):
    Path("other.txt").write_text(TEXT + ".")
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    assert_complaint(
        run("train.py", "--resume", "--out=run", *args.split(), cwd=copy.parent, status=2).stderr, said, "train.py"
    )
    assert {file.name: file.read_bytes() for file in copy.iterdir()} == before


def test_resuming_from_a_damaged_checkpoint_is_refused(copy):
    raw = (copy / "last.safetensors").read_bytes()
    (copy / "last.safetensors").write_bytes(raw[:-1] + b"?")
    err = run("train.py", "--resume", "--out=run", "--max-iters=30", cwd=copy.parent, status=2).stderr
    assert_complaint(err, "run/last.safetensors is damaged", "train.py")


# --- what is shown ---


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_terminal_without_the_texts_characters(cwd, locale):
    (cwd / "text.txt").write_text("naïve café — 日本語\n" * 60, encoding="utf-8")
    out = run("train.py", *TINY, "--out=run", cwd=cwd, env=locale).stdout
    assert out.isascii()
    sample = (cwd / "run/sample.txt").read_text(encoding="utf-8").strip()
    assert sample.encode("ascii", "backslashreplace").decode() in out
    assert not sample.isascii()


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_output(cwd, closed):
    train(cwd, shell=f'exec "$@" {closed}')
    assert (cwd / "runs/little-shakespeare-text/sample.txt").exists()


def test_bar_on_a_terminal(cwd):
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    bar = re.compile(rb"[1-9]\d*/1000000 \[\d\d:\d\d<[\d:]+, +[\d.]+step/s, loss \d\.\d{4}\]")
    with start_long(cwd, stderr=terminal) as process:
        os.close(terminal)
        shown, interrupted = b"", False
        with contextlib.suppress(OSError):  # how Linux tells of a terminal's end
            while piece := os.read(ours, 4096):
                shown += piece
                if bar.search(shown) and not interrupted:
                    process.send_signal(signal.SIGINT)
                    interrupted = True
        os.close(ours)
        out = process.stdout.read()
    assert interrupted, shown
    assert b"train loss" not in shown
    assert "step 0: train loss" in out
    assert AGAIN.search(out)


def test_line_is_out_at_once(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    Reporter(0, 1).line("step 0")
    assert raw.getvalue() == b"step 0\n"


def test_plain_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(gpt.training.report, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(gpt.training.report, "READ_SECONDS", 0.0)
    reporter = Reporter(first_step=10, last_step=10_000)
    assert reporter.due()
    reporter.step(20, 2.5)
    reporter.evaluating(3, 400)
    reporter.close(20)
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"at step 20 of 10000: loss 2\.5000, [\d.e+]+ steps/s, [\d:]+ left\nevaluating: 3 of 400 batches\n", out
    )
    assert err == ""

    monkeypatch.setattr(gpt.training.report, "READ_SECONDS", 1e9)
    assert not reporter.due()  # reading a loss back makes a GPU wait
