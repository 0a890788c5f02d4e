"""sample.py: prompts in, exactly the text out as it is made, and every mistake in one sentence."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scripts import TEXT, assert_complaint, run, start, train

import sample as script
from gpt.checkpoint import Progress, load_checkpoint, save_checkpoint
from gpt.cli import run_script
from gpt.terminal import SHADES

SEPARATOR = script.SEPARATOR


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder in which runs/little-shakespeare-text was trained."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder)
    return folder


@pytest.fixture
def cwd(trained, tmp_path, monkeypatch) -> Path:
    """A copy of it to be in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sample(cwd, monkeypatch, capsys):
    """sample(*args, status=0): what sample.py writes, in this process; stderr for a failure."""

    def call(*args, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            run_script(script.main, script.MEMORY_ADVICE)
        out, err = capsys.readouterr()
        assert stop.value.code == status, err
        if status == 0:
            return out
        assert out == ""
        return err

    return call


# --- prompts ---


@pytest.mark.parametrize("text", [b"9 is the\r\n", b"\xef\xbb\xbf9 is the\n", b"\xef\xbb\xbf9 is the\r\n", b"9 is the"])
def test_a_prompt_from_windows_is_the_same_prompt(text, cwd, sample):
    (cwd / "prompt.txt").write_bytes(text)
    expected = sample("--prompt", "9 is the", "--max-new-tokens=5")
    assert sample("--prompt-file=prompt.txt", "--max-new-tokens=5") == expected
    by_stdin = run("sample.py", "-", "--max-new-tokens=5", cwd=cwd, input=text.decode())
    assert by_stdin.stdout == expected


def test_only_a_model_of_cr_lf_sees_cr(sample):
    class Knowing:
        def __init__(self, characters):
            self.knows = characters.__contains__

    class Arguments:
        stdin = None

        class prompt_file:  # noqa: N801
            open = staticmethod(lambda mode: io.BytesIO(b"a\r\nb\r\n"))

    assert script.read_prompt(Arguments, Knowing("ab\r\n")) == "a\r\nb"
    assert script.read_prompt(Arguments, Knowing("ab\n")) == "a\nb"


def test_prompt_from_an_option_a_file_or_standard_input_is_continued(cwd):
    (cwd / "prompt.txt").write_bytes(b"9 is the\n")  # the last newline is an editor's
    options = ["--max-new-tokens=30", "--seed=3"]
    by_option = run("sample.py", "--prompt", "9 is the", *options, cwd=cwd)
    by_file = run("sample.py", "--prompt-file=prompt.txt", *options, cwd=cwd)
    by_stdin = run("sample.py", "-", *options, cwd=cwd, input="9 is the\n")
    assert by_option.stdout == by_file.stdout == by_stdin.stdout
    assert by_option.stdout.startswith("9 is the")
    assert len(by_option.stdout) == len("9 is the") + 30 + 1
    progress = load_checkpoint(cwd / "runs/little-shakespeare-text/best.safetensors").progress
    told = f"step {progress.step}, best val loss {progress.best_val_loss:.4f}\n"
    assert by_option.stderr == f"runs/little-shakespeare-text/best.safetensors: {told}"


@pytest.mark.parametrize("prompt", ["-- drop_table a_b", "-", "-1_0", "---x_y", "-h is_it", "a\n--b_c"])
def test_a_prompt_is_never_rewritten_nor_taken_for_an_option(prompt):
    for args in (["--prompt", prompt], [f"--prompt={prompt}"], [f"--prompt=--seed={prompt}"]):
        parsed, words = script.build_parser().parse_known_args([*args, "--top_k=3", "--max_new_tokens", "5"])
        assert (parsed.prompt, parsed.top_k, parsed.max_new_tokens, words) == (
            args[-1].removeprefix("--prompt="),
            3,
            5,
            [],
        )


def test_without_a_prompt_it_starts_on_a_new_line(sample):
    assert len(sample()) == 1 + 500 + 1
    assert sample().startswith("\n")


def test_prompt_of_several_lines_longer_than_the_context(sample):
    assert sample("--prompt", TEXT[:500], "--max-new-tokens=3").startswith(TEXT[:500])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--prompt", "Zoë's ☃"], "characters that are not in the model's vocabulary of 24: \"'\", 'Z', 'ë', '☃'"),
        (["--prompt", ""], "--prompt cannot be '': give another value, or leave --prompt out (see --help)"),
        (["--out="], "--out cannot be '': give another value, or leave --out out"),
        (["--prompt", "--"], "--prompt cannot be '--': give another value"),
        (["--prompt", "-x"], "--prompt needs a value after it; if that is -x, write --prompt=-x (see --help)"),
        (["--prompt", "--top_k", "3"], "if that is --top_k, write --prompt=--top_k"),
        (["--out", "--x_y"], "--out needs a value after it; if that is --x_y, write --out=--x_y"),
        (["--prompt", "--a=b c"], "write --prompt='--a=b c'"),
        (["--prompt"], "--prompt needs a value after it (see --help)"),
        (["--prompt-file", "empty.txt"], "the prompt is empty"),
        (["--prompt-file", "missing.txt"], "cannot read the prompt missing.txt: No such file or directory"),
        (["--prompt-file", "runs"], "cannot read the prompt runs: Is a directory"),
        (["--prompt-file", "latin1.txt"], "the text is not UTF-8, for it has the byte 0xE9 at position 3: convert it"),
        (["--prompt", "9", "--prompt-file", "text.txt"], "argument --prompt-file: not allowed with argument --prompt"),
        (["--prompt", "9", "-"], "argument -: not allowed with argument --prompt"),
        (["9"], "expected options, or - for standard input: write --prompt 9"),
        (["9 is", "the"], "write --prompt '9 is the'"),
        (["--seed=1", "-- 9"], "write --prompt='-- 9'"),
        (["runs"], "write --model runs"),
        (["--temperature=-1"], "--temperature must be at least 0, got -1.0"),
        (["--temperature=nan"], "--temperature must be finite, got nan"),
        (["--temperature=inf"], "--temperature must be finite, got inf"),
        ([""], "an argument is empty: leave it out, or give a name"),
        (["--top-k=0"], "--top-k must be at least 1, got 0"),
        (["--top-p=0"], "--top-p must be above 0, got 0.0"),
        (["--top-p=1.5"], "--top-p must be at most 1, got 1.5"),
        (["--top-p=nan"], "--top-p must be finite, got nan"),
        (["--num-samples=0"], "--num-samples must be at least 1, got 0"),
        ([f"--num-samples={10**30}"], "--num-samples must be at most 2147483647, got 1000"),
        (
            ["--prompt", r"\n9 'is"],
            r"the model knows no backslash: for a new line write --prompt $'\n9 \'is'",
        ),
        (["--stop", r"\n'"], r"the model knows no backslash: for a new line write --stop $'\n\'' in bash"),
        (["--max-new-tokens=-1"], "--max-new-tokens must be at least 0, got -1"),
        (["--max-new-tokens=ten"], "argument --max-new-tokens: expected a whole number such as 1000, got 'ten'"),
        (["--seed=1e3"], "argument --seed: expected a whole number such as 1000, got '1e3' (see --help)"),
        (["--temperature=hot"], "argument --temperature: expected a number such as 0.5 or 1e-3, got 'hot'"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        ([f"--seed={2**63}"], "--seed must be at most 9223372036854775807, got "),
        (["--temp=1"], "unknown option --temp; did you mean --temperature? (see --help)"),
        (["--max_token=1"], "unknown option --max_token; did you mean --max-new-tokens?"),
        (["--start=9"], "unknown option --start; did you mean --prompt?"),
        (
            ["--out_dir=runs"],
            "unknown option --out_dir: a run's folder is --out for train.py and --model for sample.py",
        ),
        (["--init_from=resume"], "sample.py --model names a run"),
        (["--device=cuda"], "unknown option --device: --backend cupy computes on a GPU"),
        (["--compile=False"], "unknown option --compile: leave it out: there is nothing to compile"),
        (["--wholly-unknown"], "unknown option --wholly-unknown (see --help)"),
        (["--out=missing/out.txt"], "cannot write missing/out.txt: give a file name in a folder that exists"),
        (["--out=runs"], "cannot write runs: give a file name in a folder that exists"),
        (["--model=missing"], "there is no checkpoint missing"),
        (["--model=runs"], "runs holds no checkpoint"),
        (["--model=text.txt"], "cannot read text.txt: it is damaged or not a safetensors file"),
        (["--model=empty.txt"], "cannot read empty.txt: it is damaged or not a safetensors file"),
        (["--model=damaged"], "damaged is damaged: its contents do not match its checksum; use another checkpoint"),
    ],
)
def test_mistake_is_one_sentence(cwd, sample, args, said):
    (cwd / "empty.txt").write_bytes(b"")
    (cwd / "latin1.txt").write_bytes(b"caf\xe9")
    raw = (cwd / "runs/little-shakespeare-text/best.safetensors").read_bytes()
    (cwd / "damaged").write_bytes(raw[:-1] + b"?")
    assert_complaint(sample(*args, status=2), said, "sample.py")


def test_prompt_that_is_not_utf8(cwd):
    for args, options in ((["-"], {"input": b"caf\xe9"}), (["--prompt", b"caf\xe9"], {})):
        done = run("sample.py", *args, cwd=cwd, status=2, encoding=None, **options)
        assert b"UTF-8" in done.stderr.splitlines()[-1]
        assert b"Traceback" not in done.stderr
        assert done.stdout == b""


def test_a_model_that_knows_the_backslash_takes_it(cwd, sample):
    (cwd / "paths.txt").write_text("C:\\new\\text\n" * 60)
    train(cwd, "--data=paths.txt", "--max-iters=1", "--out=paths")
    assert sample("--model=paths", r"--prompt=\new", "--max-new-tokens=0") == "\\new\n"


# --- which model ---


def test_model_may_be_a_file_a_folder_or_the_newest_run(cwd, sample):
    train(cwd, "--max-iters=6", "--seed=8", "--out=runs/newer")
    by_folder, by_file = sample("--model=runs/newer"), sample("--model=runs/newer/best.safetensors")
    assert sample() == by_folder == by_file
    assert sample("--model=runs/little-shakespeare-text") != by_folder


def test_no_run_at_all(cwd, sample):
    shutil.rmtree(cwd / "runs")
    assert_complaint(sample(status=2), "there is no run in ", "sample.py")


def test_run_that_was_never_evaluated(cwd, sample):
    path = cwd / "runs/little-shakespeare-text/last.safetensors"
    checkpoint = load_checkpoint(path)
    checkpoint.progress = Progress()
    save_checkpoint(path, checkpoint)
    assert sample("--model", path, "--max-new-tokens=0") == "\n\n"


# --- the text ---


def test_seed_and_temperature(sample):
    assert sample("--seed=1") == sample("--seed=1") == sample("--seed=1", "--top-k=99", "--top-p=1")
    assert sample("--seed=1") != sample("--seed=2")
    greedy = sample("--temperature=0", "--seed=1")
    assert greedy == sample("--temperature=0", "--seed=2") == sample("--top-k=1", "--seed=3")
    assert sample("--temperature=1e-300") == greedy


@pytest.mark.parametrize("option", ["--top-k=1", "--top-p=0.5"])
def test_what_has_no_effect_is_said(option, cwd):
    done = run("sample.py", "--temperature=0", option, "--max-new-tokens=0", cwd=cwd)
    name = option.partition("=")[0]
    assert f"warning: {name} has no effect at --temperature 0, which takes the likeliest\n" in done.stderr


STOPS = (["1"], ["s the"], ["\n", "of"], ["nowhere in it"], [" is the square of 4"])


@pytest.mark.parametrize("stop", STOPS)
def test_a_sample_ends_before_the_first_stop(stop, cwd, sample):
    options = ["--prompt=9", "--max-new-tokens=60", "--temperature=0.5", "--num-samples=3", "--out=out"]
    whole = sample(*options).removesuffix("\n").split(SEPARATOR)
    expected = ["9" + text[1 : min([text.index(s, 1) for s in stop if s in text[1:]], default=None)] for text in whole]
    printed = sample(*options, *(f"--stop={text}" for text in stop))
    assert printed == SEPARATOR.join(expected) + "\n" == (cwd / "out").read_text()


def test_quiet_prints_the_new_text_alone(cwd):
    options = ["--prompt=9 is", "--max-new-tokens=20", "--out=out"]
    for count in (1, 2):
        loud, quiet = (run("sample.py", *options, f"--num-samples={count}", *q, cwd=cwd) for q in ([], ["--quiet"]))
        assert quiet.stdout == SEPARATOR.join(t.removeprefix("9 is") for t in loud.stdout.split(SEPARATOR))
        assert quiet.stderr == ""
        assert (cwd / "out").read_text() == loud.stdout


@pytest.mark.parametrize("terminal", ["", "a terminal", "a terminal without colours"])
def test_probabilities_colour_a_terminal(sample, terminal, monkeypatch):
    if terminal.endswith("colours"):
        monkeypatch.setenv("NO_COLOR", "1")
    options = ["--prompt=9\n", "--max-new-tokens=80"]
    expected = sample(*options)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: bool(terminal), raising=False)
    shown = sample(*options, "--show-probs")
    if terminal != "a terminal":
        assert shown == expected
        return
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == expected
    assert shown.startswith("9\n")  # a prompt has no probability
    colours = {int(colour) for colour in re.findall(r"\x1b\[38;5;16;48;5;(\d+)m[^\x1b\n]+\x1b\[0m", shown)}
    assert len(colours) > 1
    assert colours <= {colour for _, colour in SHADES}


def test_no_new_tokens(sample):
    assert sample("--prompt", "9 is", "--max-new-tokens=0") == "9 is\n"


def test_several_samples(sample):
    options = ["--prompt", "9 is", "--max-new-tokens=20"]
    texts = sample(*options, "--num-samples=3").removesuffix("\n").split(SEPARATOR)
    assert [len(text) for text in texts] == [24, 24, 24]
    assert all(text.startswith("9 is") for text in texts)
    assert len(set(texts)) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_out_holds_the_text_and_nothing_else(cwd, sample, count):
    before = set(cwd.iterdir())
    (cwd / "out.txt").write_text("an older text")
    printed = sample("--out=out.txt", f"--num-samples={count}", "--prompt=9 is\n")
    assert (cwd / "out.txt").read_text() == printed
    assert set(cwd.iterdir()) - before == {cwd / "out.txt"}


def test_a_byte_model_takes_and_writes_any_bytes(cwd):
    """A text loses the mark and the last line end, as everywhere; what is no text loses nothing."""
    train(cwd, "--tokenizer=byte", "--max-iters=1", "--out=bytes")
    text, binary = "日本\n".encode(), b"\xef\xbb\xbf\xff\0\r\n"
    for prompt, kept in ((text, text[:-1]), (b"\xef\xbb\xbf" + text, text[:-1]), (binary, binary)):
        (cwd / "prompt").write_bytes(prompt)
        options = ["--model=bytes", "--temperature=5", "--max-new-tokens=200", "--num-samples=2", "--out=out"]
        done = run("sample.py", *options, "--prompt-file=prompt", cwd=cwd, encoding=None)
        written = (cwd / "out").read_bytes()
        first, second = written.split(SEPARATOR.encode())
        assert first.startswith(kept)
        assert (len(first), len(second)) == (len(kept) + 200, len(kept) + 200 + 1)
        assert "\ufffd" in written.decode(errors="replace")
        assert done.stdout == written.decode(errors="replace").encode()
    assert run("sample.py", *options, "-", cwd=cwd, encoding=None, input=binary).stdout == done.stdout
    shown = run("sample.py", "--model=bytes", b"--prompt=a\xff", "--max-new-tokens=0", cwd=cwd).stdout
    assert shown == "a\ufffd\n"


# --- files that cannot be ---


def test_weights_that_are_nan_are_not_sampled_from(cwd, sample):
    path = cwd / "runs/little-shakespeare-text/best.safetensors"
    checkpoint = load_checkpoint(path)
    checkpoint.weights["transformer.wte.weight"][3] = np.nan
    save_checkpoint(path, checkpoint)
    said = "cannot be used, for transformer.wte.weight has values that are nan, infinite or else impossible: take an"
    assert_complaint(sample(status=2), said, "sample.py")


def test_where_the_text_goes_is_tried_before_it_is_made(cwd, sample, monkeypatch):
    monkeypatch.setattr("gpt.checkpoint.load_checkpoint", None)
    (cwd / "out.txt").write_text("precious")
    (cwd / "out.txt").chmod(0o444)
    said = "cannot write out.txt: it is read-only; make it writable, or give another name"
    assert_complaint(sample("--out=out.txt", status=2), said, "sample.py")
    assert (cwd / "out.txt").read_text() == "precious"
    assert_complaint(sample(f"--out={'x' * 300}", status=2), ": File name too long; give a shorter name", "sample.py")
    assert_complaint(sample("--out=/dev/null", status=2), "cannot write /dev/null: it is not a regular", "sample.py")


def test_out_may_be_a_link_and_keeps_its_permissions(cwd, sample):
    (cwd / "disk").mkdir()
    (cwd / "disk/file").write_text("an older text")
    (cwd / "disk/file").chmod(0o600)
    for target in ("disk/file", "disk/new"):
        (cwd / "out").unlink(missing_ok=True)
        (cwd / "out").symlink_to(target)
        printed = sample("--out=out", "--max-new-tokens=3")
        assert (cwd / "out").is_symlink()
        assert (cwd / target).read_text() == printed
    assert (cwd / "disk/file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "link in a run", "x" * 300, "x" * 300 + "/y"])
def test_a_model_that_is_no_file(cwd, sample, kind):
    said = "is not a regular file: give another"
    if kind == "pipe":
        os.mkfifo(cwd / kind)
    elif kind == "link in a run":
        (cwd / kind).mkdir()
        (cwd / kind / "best.safetensors").symlink_to("/dev/zero")
        said = "best.safetensors is a symbolic link, which may lead out of its folder"
    elif kind.startswith("x"):
        said = "File name too long; give a shorter name"
    assert_complaint(sample("--model", kind, status=2), said, "sample.py")


def test_a_word_too_long_for_a_name(sample):
    assert_complaint(sample("x" * 5000, status=2), "or - for standard input: write --prompt 'xxx", "sample.py")


def test_closed_standard_input(cwd):
    err = run("sample.py", "-", cwd=cwd, shell='exec "$@" <&-', status=2).stderr
    assert_complaint(err, "standard input is closed: give the text with --prompt or --prompt-file", "sample.py")


# --- the output ---


def test_text_streams_as_it_is_made(cwd):
    with start("sample.py", "--prompt=9", "--max-new-tokens=1000000", cwd=cwd, encoding=None, bufsize=0) as process:
        text = process.stdout.read(8192)  # what is there so far: a buffer would give all of the 8192 at once
        assert text.startswith(b"9")
        assert len(text) < 8192
        assert process.poll() is None
        process.kill()


def test_reader_of_the_output_goes_away(cwd):
    with start("sample.py", "--max-new-tokens=1000000", cwd=cwd) as process:
        head = subprocess.run(["head", "-c", "10"], stdin=process.stdout, capture_output=True, check=True, timeout=60)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert len(head.stdout) == 10
    assert err.count("\n") == 1  # which checkpoint it was
    assert err.startswith("runs/little-shakespeare-text/best.safetensors: step")


def test_output_that_cannot_be_written(cwd):
    err = run("sample.py", cwd=cwd, shell='exec "$@" > /dev/full', status=2).stderr
    assert_complaint(err.split("\n", 1)[1], "No space left on device", "sample.py")


def test_help(sample):
    text = sample("--help")
    for flag in (
        "--model",
        "--prompt-file",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--num-samples",
    ):
        assert f"  {flag} " in text
    assert "(default: 500)" in text
    assert "(default: 0.8)" in text
