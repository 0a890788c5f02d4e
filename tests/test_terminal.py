"""Nothing raw on the terminal: whatever a name, a file or an argument holds, no message has a control character in it,
nor more than 200 characters of it, and what a model writes is exact where no terminal reads it."""

import os
import pty
import shutil
import subprocess
import sys
import unicodedata

import pytest
from scripts import TEXT, run, start, train

import sample
import train as script
from gpt.cli import run_script
from gpt.terminal import MOST, message, printable, shortened, warn

CONTROLS = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Cc"]
RAW = [*CONTROLS, *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"]
NASTY = {
    "colour": "a\x1b[31m\x1b]0;title\x07b",
    "line": "a\r\nerror: b\x85c",
    "C1": "a\x9b31mb\x7f",
    "order": "a\u202eb\u2066c",
    "long word": "x" * 5000,
    "long text": "the 'quick' brown \\fox " * 300,
    "long and raw": "\x1b[2J it's " * 500,
}
# How a text gets in: the arguments of train.py, then of sample.py, with {} for it.
WAYS = [
    "{}",
    "{}.toml",
    "nasty.toml",
    "key.toml",
    "--data={}",
    "--data=ab --out=best.safetensors/{}",
    "--{}=1",
    "--max-iters={}",
    "--backend={}",
]
WAYS += ["--tokenizer={}", "--tokenizer={}.json", "--activation={}", "bigram {}", "--resume --out={}"]
SAMPLE_WAYS = ["{}", "--prompt={}", "--prompt-file={}", "--model={}", "--seed={}", "--{}", "--out={}/x", "{} {} {}"]


def test_every_control_character_is_escaped_and_no_other():
    assert all(printable(c).isascii() and printable(c).isprintable() for c in RAW)
    assert printable("naïve 日本 😀 \\ \u200d") == "naïve 日本 😀 \\ \u200d"
    assert printable("a\tb\n\x1b[0m", keep="\n\t") == "a\tb\n\\x1b[0m"


def test_a_text_is_shortened_to_its_ends():
    assert shortened("x" * MOST) == "x" * MOST
    assert len(shortened("ab" * 5000)) < MOST
    assert message(f"cannot read {'x' * 300} here") == f"cannot read {shortened('x' * 300)} here"


@pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY)
@pytest.mark.parametrize(("module", "way"), [*((script, way) for way in WAYS), *((sample, way) for way in SAMPLE_WAYS)])
def test_no_message_holds_anything_raw_or_long(copy, monkeypatch, capsys, module, way, nasty):
    monkeypatch.chdir(copy)  # which is not where runs are looked for
    quoted = "".join(f"\\U{ord(c):08x}" for c in nasty)
    (copy / "nasty.toml").write_text(f'activation = "{quoted}"')
    (copy / "key.toml").write_text(f'"{quoted}" = 1')
    model = ["--model=best.safetensors"] if module is sample and "--model" not in way else []
    arguments = [word.replace("{}", nasty) for word in way.split(" ")]
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *model, *arguments])
    with pytest.raises(SystemExit) as stop:
        run_script(module.main, module.MEMORY_ADVICE)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith(f"{module.__name__}.py: error: ")
    assert err.endswith("\n")
    assert not set(err[:-1]) & set(RAW)
    assert len(err) < 900
    assert not any(nasty[i : i + MOST + 1] in err for i in range(len(nasty) - MOST))


def test_help_shows_a_files_values_escaped(cwd):
    (cwd / "my.toml").write_text('data = "\\u001b[31m"')
    out = run("train.py", "my.toml", "--help", cwd=cwd).stdout
    assert "\\x1b[31m" in out
    assert "\x1b" not in out


def test_a_run_with_nasty_names_prints_nothing_raw_and_what_can_be_pasted(cwd):
    name = "a\x1b[31m 'b\u202e"
    (cwd / name).write_text(TEXT)
    out = train(cwd, "--data", name, "--out", f"run {name}", "--max-iters=1").stdout
    assert not set(out.replace("\n", "")) & set(RAW)
    assert "text: a\\x1b[31m 'b\\u202e; " in out
    more = out.splitlines()[-1].rpartition("more text: python sample.py ")[2]
    bash = shutil.which("bash") or pytest.skip("there is no bash, whose quotes these are")
    pasted = subprocess.run([bash, "-c", f"printf %s {more}"], env={"LC_ALL": "C.UTF-8"}, capture_output=True)
    assert pasted.stdout.decode() == f"--modelrun {name}"


def test_what_a_model_writes_is_exact_but_on_a_terminal(cwd):
    (cwd / "bytes").write_bytes(bytes(range(256)) * 9)
    train(cwd, "--data=bytes", "--tokenizer=byte", "--max-iters=0", "--out=run")
    options = ["sample.py", "--model=run", "--temperature=9", "--max-new-tokens=400", "--prompt=a"]
    piped = run(*options, "--out=file", cwd=cwd, encoding=None).stdout.decode()
    assert set(piped) & set(CONTROLS) > {"\n", "\t", "\x1b"}
    assert (cwd / "file").read_bytes().decode(errors="replace") == piped
    ours, terminal = pty.openpty()
    with start(*options, cwd=cwd, stdout=terminal) as process:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # how Linux tells of a terminal's end
            pass
        process.stderr.read()
    os.close(ours)
    shown = shown.decode().replace("\r\n", "\n")  # which the terminal's driver makes of a new line
    assert shown == printable(piped, keep="\n\t")
    assert not set(shown) & (set(CONTROLS) - {"\n", "\t"})


def test_a_warning_holds_nothing_raw(capsys):
    warn("a\x1b[31m\nb cannot be locked here")
    assert capsys.readouterr() == ("", "warning: a\\x1b[31m\\nb cannot be locked here\n")
