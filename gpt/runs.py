"""List runs, or hold two of them against each other.

python -m gpt.runs                      those in runs/, the newest first
python -m gpt.runs elsewhere --sort loss
python -m gpt.runs runs/a runs/b        the settings in which they differ, and their losses
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from gpt.checkpoint import Checkpoint, load_checkpoint, saved_at
from gpt.cli import Parser, run_script
from gpt.config import Config, load_preset
from gpt.errors import MissingLibraryError, UserError
from gpt.files import explained, refuse_link
from gpt.log import read_log
from gpt.models.kinds import MODEL_KINDS
from gpt.terminal import printable, say
from gpt.text.sources import short_name
from gpt.text.tokenizers import readable
from gpt.training.run_folder import RUNS, is_training, no_run_in

WIDTH = 100  # characters of a line
LAST, CONFIG, BEST, LOG = FILES = ("last.safetensors", "config.toml", "best.safetensors", "log.jsonl")
COLUMNS: dict[str, tuple[str, Callable | None]] = {  # title, and how a number is written
    "name": ("name", None),
    "text": ("text", None),
    "model": ("model", None),
    "parameters": ("parameters", lambda n: f"{n:,}" if n < 1e6 else f"{n / 1e6:.1f}M"),
    "steps": ("steps", str),
    "time": ("time", tqdm.format_interval),
    "loss": ("val loss", "{:.4f}".format),
    "bits": ("bits/char", "{:.3f}".format),
    "state": ("state", None),
}


@dataclass
class Run:
    """What is known of a run without reading its weights."""

    folder: Path
    training: bool = False
    saved: float = 0.0  # seconds since 1970
    last: Checkpoint | None = None  # without its arrays
    config: Config | None = None
    rows: list[dict] = field(default_factory=list)
    problem: str = ""  # in few words

    @property
    def best(self) -> dict:
        """The row of the log with the lowest validation loss; {} if there is none."""
        evaluated = [row for row in self.rows if row.get("val_loss") is not None]
        return min(evaluated, key=lambda row: row["val_loss"], default={})

    def values(self) -> dict:
        """What is listed and sorted by; None for what is not known."""
        config, progress, row = self.config, self.last and self.last.progress, (self.rows or [{}])[-1]
        done = config and (progress.evaluated_step if progress else row.get("step", -1)) >= config.train.max_iters
        done = done or (progress and 0 < config.train.patience <= progress.stale)
        return {
            "newest": -self.saved,
            "of": config and config.train.max_iters,
            "name": self.folder.name or str(self.folder),
            "model": config and config.train.model,
            "parameters": config and MODEL_KINDS[config.train.model].num_parameters(config.gpt),
            "text": short_name(config.train.data) if config and config.train.data else None,
            "steps": progress.step if progress else row.get("step"),
            "time": progress.seconds if progress else row.get("elapsed"),
            "loss": self.best.get("val_loss"),
            "bits": self.best.get("val_bits_per_character"),
            "state": "running" if self.training else "damaged" if self.problem else "finished" if done else "stopped",
        }


def main() -> int:
    parser = Parser(prog="python -m gpt.runs", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, metavar="FOLDER", help="of runs, or two runs (default: runs)")
    keys = ("newest", *COLUMNS)
    parser.add_argument("--sort", choices=keys, metavar="KEY", help=f"{', '.join(keys)} (default: newest)")
    args = parser.parse_args()
    if len(args.paths) > 2 or (args.sort and len(args.paths) == 2):
        raise UserError("expected a folder of runs, perhaps with --sort, or two runs: leave out the rest")
    lines = compared(*map(read, args.paths)) if len(args.paths) == 2 else listed(*args.paths or [RUNS], args.sort)
    for line in lines:
        say(line.rstrip())
    return 0


def read(folder: Path) -> Run:
    """What the files of a run say. Whatever is wrong with them is its `problem`; one that trains need not have all."""
    run, problems = Run(folder, is_training(folder)), []

    def part(name: str, reader, needed: bool = True):
        path = folder / name
        try:
            refuse_link(path)
            if path.exists():
                run.saved = run.saved or saved_at(path)
                return reader(path)
            problems.extend([f"{name} is missing"] * needed)
        except MissingLibraryError:  # nothing is wrong with the file
            pass
        except (UserError, OSError) as error:
            problems.append(_in_few_words(str(error), path))
        return None

    run.last = part(LAST, lambda path: load_checkpoint(path, values=False))
    run.config = part(CONFIG, lambda path: load_preset(str(path)))
    run.config = run.last.config if run.last else run.config
    evaluated = run.last is None or run.last.progress.evaluated_step >= 0  # else it was stopped before that
    part(BEST, lambda path: load_checkpoint(path, values=False), evaluated)
    run.rows, problem = part(LOG, read_log, evaluated) or ([], "")
    run.problem = [*problems, problem][0]
    return run


def _in_few_words(error: str, path: Path) -> str:
    """A sentence from the name of `path` on, without advice; of one about a checkpoint the reason in brackets alone."""
    reason = re.search(r"\((.*)\)", error) if path.suffix == ".safetensors" else None
    sentence = error.replace(str(path), path.name).split("; ")[0]
    return f"{path.name}: {reason[1]}" if reason else sentence[max(sentence.find(path.name), 0) :]


def listed(folder: Path, sort: str | None) -> list[str]:
    """A table of the runs in `folder`, and below it what is wrong with which."""
    with explained("read", folder):
        folders = sorted(path for path in (folder, *folder.iterdir()) if _is_run(path))
    if not folders:
        raise no_run_in(folder)
    found, key = [(run, run.values()) for run in map(read, folders)], sort or "newest"
    found.sort(key=lambda pair: (True, 0) if pair[1][key] is None else (False, pair[1][key]))
    shown = [key for key in COLUMNS if key != "bits" or any(values["bits"] is not None for _, values in found)]
    table = [[COLUMNS[key][0] for key in shown], *([_cell(values, key) for key in shown] for _, values in found)]
    damaged = [f"damaged: {run.folder.name}: {run.problem}" for run, values in found if values["state"] == "damaged"]
    return [*_aligned(table, [bool(COLUMNS[key][1]) for key in shown]), *(_plain(line)[:WIDTH] for line in damaged)]


def _is_run(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return any((folder / name).exists() for name in FILES)
    return False


def _cell(values: dict, key: str) -> str:
    """What the table shows of a value."""
    cell = "-" if values[key] is None else _plain((COLUMNS[key][1] or str)(values[key]))
    return f"{cell}/{values['of']}" if key == "steps" and values["of"] is not None else cell


def compared(a: Run, b: Run) -> list[str]:
    """The settings in which two runs differ, and their losses side by side."""
    for run in (a, b):
        if run.config is None:
            raise UserError(f"{run.folder} cannot be compared: {run.problem}; name another run")
    known = [run.config.to_dict() | {"fingerprint": run.last and run.last.fingerprint[:12]} for run in (a, b)]
    table = [["", *(run.folder.resolve().name for run in (a, b))]]
    for key in dict.fromkeys([*known[0], *known[1]]):
        if known[0].get(key) != known[1].get(key):
            table.append([key, *(str(values.get(key, "-")) for values in known)])
    best = [f"{run.best['val_loss']:.4f} at step {run.best['step']:,}" if run.best else "-" for run in (a, b)]
    table += [["best val loss", *best], ["", "train / val", "train / val"]]
    losses = [{row["step"]: f"{_loss(row, 'train')} / {_loss(row, 'val')}" for row in run.rows} for run in (a, b)]
    table += [[f"step {n:,}", *(rows.get(n, "-") for rows in losses)] for n in sorted({*losses[0], *losses[1]})]
    return _aligned([[_cut(_plain(cell), 36) for cell in row] for row in table], [False] * 3)


def _loss(row: dict, part: str) -> str:
    return "-" if row.get(f"{part}_loss") is None else f"{row[f'{part}_loss']:.4f}"


def _aligned(table: list[list[str]], right: list[bool]) -> list[str]:
    """The rows in columns, some of them to the right. The first two give way where a line would be too long."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for i in (0, 1):
        widths[i] = min(widths[i], max(12, widths[i] + WIDTH - sum(widths) - 2 * len(widths[1:])))
    layout = "  ".join(f"{{:{'>' if to_right else '<'}{width}}}" for width, to_right in zip(widths, right, strict=True))
    return [layout.format(*map(_cut, row, widths)) for row in table]


def _cut(text: str, most: int) -> str:
    """`text`, or its end: where names tend to differ."""
    return text if len(text) <= most else f"…{text[len(text) - most + 1 :]}"


def _plain(text: str) -> str:
    return printable(readable(text))


if __name__ == "__main__":
    run_script(main, "give another folder")
