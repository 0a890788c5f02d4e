"""README.md and docs/ are true: Python does what is shown, commands can be given, lines are counted."""

import importlib.util
import inspect
import re
import shlex
import textwrap
import tomllib

import pytest
from lines import ROOT, count
from scripts import train as train_tiny
from torch_gpt import TorchGPT

import gpt
import sample
import train
from gpt.config import load_preset
from gpt.training.trainer import Trainer

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def steps() -> list[tuple[str, str | None]]:
    """README's Python in its order, each block with what it prints, if that is shown right after it."""
    blocks = [*FENCED.finditer(README)]
    found = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] == "python":
            shown = after and not after[1] and not README[block.end() : after.start()].strip()
            found.append((block[2], after[2] if shown else None))
    return found


def commands(text: str) -> list[str]:
    """The commands of a text, without comments, prompts and what is piped into them."""
    shell = [line.removeprefix("$ ") for kind, block in FENCED.findall(text) for line in block.splitlines()
             if kind == "sh" or line.startswith("$ ")]  # fmt: skip
    shell += [" ".join(code.split()) for code in re.findall(r"`(python [^`]+)`", FENCED.sub("", text))]
    parts = [shlex.join(shlex.split(part, comments=True)) for line in shell for part in re.split(r" (?:&&|\|) ", line)]
    return [part for part in dict.fromkeys(parts) if part]


def test_the_python_does_what_is_shown(cwd, capsys):
    """Block after block, as one who reads would."""
    (cwd / "play.txt").write_text("ROMEO: who, and where?\n" * 20)
    train_tiny(cwd, "--data=play.txt", "--max-iters=1", "--out=runs/little-shakespeare")
    names = {"torch_model": TorchGPT(gpt.load()[0].config)}
    capsys.readouterr()
    for code, shown in steps():
        if code.startswith("def train_step") or "def test_" in code:  # which are held by tests of their own
            continue
        try:
            exec(code, names)
            printed = capsys.readouterr().out
        except AssertionError as error:
            printed = f"{type(error).__name__}: {error}\n"
        assert shown is None or printed == shown, code


def test_the_training_step_is_quoted():
    quoted = [code for code, _ in steps() if code.startswith("def train_step")]
    assert quoted == [textwrap.dedent(inspect.getsource(Trainer.train_step))]


def test_the_engines_example_learns(capsys):
    exec(next(code for code, _ in steps() if "nn.Sequential" in code), {})
    assert float(capsys.readouterr().out) < 0.1


@pytest.mark.parametrize("command", [
    command for file in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "bench/README.md")
    for command in commands(file.read_text(encoding="utf-8"))
])  # fmt: skip
def test_a_command_can_be_given(command):
    match shlex.split(command.replace("PRESET", "bigram")):
        case ["python", "train.py", *arguments]:
            preset = train.parse_arguments([a for a in arguments if a != "--help"]).preset
            assert preset is None or preset.startswith("runs/") or load_preset(preset)
        case ["python", "sample.py", *arguments]:
            sample.parse_arguments(arguments)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module)
        case ["python", "-c", code]:
            compile(code, command, "exec")
        case ["python", script, *_]:
            assert (ROOT / script).is_file()
        case ["pip", "install", "-e", package]:
            assert set(re.findall(r"[\w]+", package)) <= {*EXTRAS}
        case [program, *_]:
            assert program in ("python3", ".", "echo", "git", "hf", "pip", "sphinx-build")


def test_the_lines_are_counted():
    rows = re.findall(r"^\| ([^|]*`[^|]+) \| (\d+) \|", README.split("## Read the code")[1], re.MULTILINE)
    assert len(rows) > 15
    seen = []
    for names, shown in rows:
        paths = [ROOT / name for name in re.findall(r"`([\w/.]+)`", names)]
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
        files = [file for file in files if file.suffix in (".py", ".cu", ".cuh")]
        seen += files
        lines = sum(count(file)[0] for file in files)
        assert abs(lines - int(shown)) <= max(10, 0.03 * lines), f"{names}: {lines}"
    product = [*(ROOT / "tensorlite").rglob("*.py"), *(ROOT / "gpt").rglob("*.py")]
    assert {file for file in product if file.name != "__init__.py"} <= set(seen)
    assert len(set(seen)) == len(seen)


def test_the_answers_shown_are_those_given():
    text = (ROOT / "docs" / "from-pytorch.md").read_text(encoding="utf-8")
    setup, *lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].strip().splitlines()
    for line in filter(None, lines):
        names = {}
        exec(setup, names)
        with pytest.raises((TypeError, AttributeError)) as info:
            exec(line, names)
        assert line.endswith(f"# {info.typename}: {info.value}")
