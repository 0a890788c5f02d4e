"""Throw malformed checkpoints, configurations and options at the program, and kill it while it trains.

    python bench/faults.py --seconds 300
    python bench/faults.py --draws 25000 --json bench/results/faults.json
    python bench/faults.py --draw 1234          one of them again, with what becomes of it

A draw is a function of its number. It is refused when it ends in one sentence, which is as good as when it does what it
says: a checkpoint then has every value that was written into it, makes a model that computes, and is saved and loaded
to the bit. Anything else is wrong: another exception, a value that is not what was written, more than a second of
computing, more memory than a small model needs (the limit is set for the whole process), a file that a killed run left
broken, or a resumed run that is not the one that was never killed, to the bit.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import write_results

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sample  # noqa: E402
import train  # noqa: E402
from gpt.checkpoint import Checkpoint, Progress, _digest, load_checkpoint, save_checkpoint  # noqa: E402
from gpt.config import PRESETS, Config, GPTConfig, TrainConfig, load_preset, option_fields  # noqa: E402
from gpt.device import Device  # noqa: E402
from gpt.errors import UserError  # noqa: E402
from gpt.models.kinds import build_model  # noqa: E402
from gpt.text.tokenizers import ByteTokenizer, CharTokenizer  # noqa: E402
from tensorlite import BackendError, no_grad  # noqa: E402

CPU_SECONDS = 1.0  # for one draw; processor time, so that other work on the machine cannot spend it
EXTRA_MEMORY = 2**29  # bytes that this process may map beyond what it has when it begins
NUMBERS = (0, -1, 1, 2, 3, 7, 255, 256, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400)
NUMBERS += (0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e308, math.inf, -math.inf, math.nan)
TEXTS = ("", "0", "gpt", "char", "byte", "bigram", "relu", "true", "ab", "a\0b", "\ud800", "\x1b[2J", "x" * 10_000)
TEXTS += ("../..", "/dev/zero", "\n", "é日😀", "ba", "aab")
NESTED = ([], [1], [[]], {}, {"a": 1}, {"kind": "byte"}, [[[[[[[[1]]]]]]]])
VALUES = (None, True, False, *NUMBERS, *TEXTS, *NESTED)
RAW = ("", "null", "[]", "{", "[" * 100_000, '{"a":' * 50_000, "9" * 5000, "NaN", "\0", '"', '{"step": 1e999}', "{}x")
TOML = (
    "",
    "nan",
    "inf",
    "-inf",
    "0x" + "f" * 5000,
    "1" + "0" * 400,
    "1e400",
    "1979-05-27",
    "07:32:00",
    "[1, 2]",
    "'''",
)
TOML += ("{a = 1}", "[" * 3000, "true", "1_000", "0b11", '"\\u0000"', '"\\ud800"', "'x\x01'", "1.", ".5", "+3", "--3")


# -- what is damaged --


def originals() -> list[Checkpoint]:
    """Small checkpoints of every kind, to resume and not."""
    shape = {"block_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 4}
    kinds = [
        (CharTokenizer("\n abé日"), "gpt", shape, True),
        (ByteTokenizer(), "gpt", shape | {"n_layer": 2, "bias": False}, False),
        (CharTokenizer("ab"), "gpt", shape | {"tie_weights": False, "head_bias": True, "qkv_bias": False}, True),
        (CharTokenizer("abc"), "bigram", {"block_size": 8}, True),
    ]
    return [_checkpoint(*kind) for kind in kinds]


def _checkpoint(tokenizer, model: str, shape: dict, for_resume: bool) -> Checkpoint:
    settings = TrainConfig(preset="my.toml", model=model, data="/a/text", tokenizer=tokenizer.kind, learning_rate=1e-5)
    config = Config(GPTConfig(vocab_size=tokenizer.vocab_size, **shape), settings)
    built = build_model(model, config.gpt, seed=3)
    size = built.num_parameters()
    moments = {"m": np.linspace(-1, 1, size, dtype=np.float32), "v": np.linspace(0, 1, size, dtype=np.float32)}
    progress = Progress(step=7, best_val_loss=1 / 3, evaluated_step=6, seconds=0.1)
    return Checkpoint(config, tokenizer, built.state_dict(), progress, "0f" * 32, moments if for_resume else {})


def encode(tensors: dict, metadata: dict, entries: Callable[[dict], None] = lambda header: None) -> bytes:
    """A safetensors file, for once without any check; `entries` may change its header."""
    header, values = {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        start, values = len(values), values + array.tobytes()
        kind = {"f": "F", "i": "I", "u": "U"}[array.dtype.kind] + str(8 * array.dtype.itemsize)
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, len(values)]}
    entries(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def decode(raw: bytes) -> tuple[dict, dict]:
    """(arrays, metadata without the checksum) of an intact file."""
    length = int.from_bytes(raw[:8], "little")
    header, values = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    del metadata["sha256"]
    arrays = {
        name: np.frombuffer(values[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"]).copy()
        for name, entry in header.items()
    }
    return arrays, metadata


# -- the draws: each returns True if refused, False if taken, and raises what is wrong --


class WrongError(Exception):
    """What should not be."""


class Faults:
    """The draws, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "c.safetensors"
        self.files = []
        for checkpoint in originals():
            save_checkpoint(self.path, checkpoint)
            self.files.append(self.path.read_bytes())
        (folder / "text.txt").write_text("to be or not to be\n" * 20)

    def damaged_bytes(self, rng: random.Random) -> bool:
        """A wrong checksum: bytes changed, cut, moved, repeated or added anywhere."""
        raw = bytearray(rng.choice(self.files))
        before = bytes(raw)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            header = 8 + int.from_bytes(before[:8], "little")
            i = rng.randrange(rng.choice((8, header, len(raw) + 1))) % (len(raw) + 1)
            j = min(len(raw), i + rng.choice((1, 4, 8, 100, 5000)))
            match rng.randrange(7):
                case 0 | 1:
                    raw[i : i + 1] = bytes([(*raw[i : i + 1], 0)[0] ^ 1 << rng.randrange(8)])
                case 2:
                    raw[i:j] = rng.randbytes(j - i)
                case 3:
                    raw[i:j] = bytes([rng.choice((0, 255))]) * (j - i)
                case 4:
                    del raw[i : rng.choice((j, len(raw)))]
                case 5:
                    raw[i:i] = raw[i:j]
                case 6:
                    raw += rng.randbytes(rng.choice((1, 8, 100)))
        self.path.write_bytes(raw)
        refused = self._load(None, None)
        if not refused and before != bytes(raw):
            raise WrongError("a damaged file was taken")
        return refused

    def damaged_metadata(self, rng: random.Random) -> bool:
        """A right checksum over metadata in which one part was changed, or two."""
        arrays, metadata = decode(rng.choice(self.files))
        for _ in range(rng.choice((1, 1, 2))):
            part = rng.choice(("config", "config", "config", "progress", "progress", "tokenizer", *metadata))
            match rng.randrange(12):
                case 0:
                    metadata[part] = rng.choice(RAW)
                case 1:
                    metadata.pop(part, None)
                case 2:
                    metadata[rng.choice(TEXTS)] = rng.choice(TEXTS)
                case _:
                    metadata[part] = self._changed(rng, metadata.get(part, ""))
        self.path.write_bytes(encode(arrays, metadata | {"sha256": _digest(arrays, metadata)}))
        return self._load(arrays, metadata)

    def _changed(self, rng: random.Random, text: str) -> str:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return rng.choice(RAW)
        if not isinstance(values, dict):
            return json.dumps(rng.choice(VALUES))
        key = rng.choice([*values, *option_fields(), "kind", "symbols", "step", "epoch"])
        if rng.random() < 0.1:
            values.pop(key, None)
        else:
            old = values.get(key)
            near = (
                [old - 1, old + 1, old * 2, -old, float(old), str(old)] if type(old) in (int, float) else [[old], old]
            )
            values[key] = rng.choice([*VALUES, *near * 3])
        return json.dumps(values)

    def damaged_arrays(self, rng: random.Random) -> bool:
        """A right checksum over arrays of other names, shapes, types or values."""
        arrays, metadata = decode(rng.choice(self.files))
        name, other = rng.choice(sorted(arrays)), rng.choice(sorted(arrays))
        array, flat = arrays[name], arrays[name].reshape(-1)
        match rng.randrange(10):
            case 0:
                del arrays[name]
            case 1:
                arrays[rng.choice(("", "\0", "x" * 10_000, "é😀", "optimizer.x", "optimizer.", "module." + name))] = (
                    array
                )
            case 2:
                arrays[rng.choice((other, name + "x"))] = arrays.pop(name)
            case 3:
                arrays[name] = array.T if array.ndim == 2 else array[None]
            case 4:
                arrays[name] = array[: len(array) // 2]
            case 5:
                arrays[name] = array.astype(rng.choice(("float16", "float64", "int32", "uint8")))
            case 6 | 7:
                flat[rng.randrange(flat.size)] = rng.choice((math.nan, math.inf, -math.inf, -1, 0, 1e38, 1e-45))
            case 8:
                arrays[name] = np.zeros(rng.choice(((0,), (), (0, 3), (2, 2, 2), array.shape[::-1])), np.float32)
            case 9:
                arrays = {n: a for n, a in arrays.items() if not n.startswith(rng.choice(("optimizer", "transformer")))}
        arrays = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
        self.path.write_bytes(encode(arrays, metadata | {"sha256": _digest(arrays, metadata)}))
        return self._load(arrays, metadata)

    def damaged_header(self, rng: random.Random) -> bool:
        """A right checksum, and a header that says other things of the arrays or the file than there are."""
        arrays, metadata = decode(rng.choice(self.files))
        name = rng.choice(sorted(arrays))

        def change(header: dict) -> None:
            entry = rng.choice((header, header, header[name], header["__metadata__"]))
            key = rng.choice(sorted(entry))
            value = entry[key]
            if isinstance(value, list) and value and rng.random() < 0.7:
                value[rng.randrange(len(value))] = rng.choice((*VALUES, value[0] + 1, value[0] * 2, value[0] - 4))
            elif rng.random() < 0.2:
                del entry[key]
            else:
                entry[key] = rng.choice(
                    (*VALUES, ["F32"] * 3, {"dtype": "F32", "shape": [2**61], "data_offsets": [0, 0]})
                )

        raw = encode(arrays, metadata | {"sha256": _digest(arrays, metadata)}, change)
        if rng.random() < 0.2:
            raw = struct.pack("<Q", rng.choice((0, 1, 7, len(raw), 2**24, 2**32, 2**63, 2**64 - 1))) + raw[8:]
        self.path.write_bytes(raw)
        return self._load(arrays, metadata)

    def configuration(self, rng: random.Random) -> bool:
        """A TOML file of some keys with values that they may have, or may not."""
        path, keys = self.folder / "c.toml", [*option_fields(), "lr", "x" * 500, '""', "a.b", "model.x"]
        plain = [value for value in VALUES if type(value) in (bool, int, float)]
        choices = [rng.choice(TOML), json.dumps(rng.choice(TEXTS)), *(str(rng.choice(plain)).lower() for _ in range(4))]
        values = [rng.choice((*choices, "1", "2", "0.5")) for _ in range(3)]
        lines = [f"{rng.choice(keys)} = {value}" for value in values[: rng.choice((1, 1, 1, 2, 3))]]
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            content = rng.randbytes(rng.choice((0, 1, 50))) + content
        path.write_bytes(content)
        with _sentence() as refused:
            config = load_preset(str(path))
            again = self.folder / "again.toml"
            again.write_text(config.to_toml(), encoding="utf-8")
            if load_preset(str(again)) != config.updated({"preset": config.train.preset}):
                raise WrongError("the configuration is not what it writes")
        return bool(refused)

    def options(self, rng: random.Random) -> bool:
        """A command line of train.py or sample.py, as far as it can be checked without a text or a model."""
        script = rng.choice((train, sample))
        parser = train.build_parser({}) if script is train else sample.build_parser()
        known = [name for action in parser._actions for name in action.option_strings]
        words = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            name = rng.choice((*known, "--start", "--lr", "-x", "--" + "y" * 300, *PRESETS))
            value = str(rng.choice((*VALUES, *NUMBERS[:8] * 5))).replace("\0", "")
            words += rng.choice(([name], [f"{name}={value}"], [name, value], [value]))
        with _sentence() as refused, contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            if script is sample:
                args, _ = sample.parse_arguments(words)
                Device(args.backend, args.dtype, args.tf32, args.graph)
            else:
                args = train.parse_arguments(words)
                Device(**{name: getattr(args, name) for name in train.DEVICE_OPTIONS})
                given = {name: value for name, value in vars(args).items() if name not in train.NOT_CONFIGURED}
                config = load_preset(args.preset or train.DEFAULT_PRESET).updated(given)
                if any(config.to_dict().get(key, value) != value for key, value in given.items()):
                    raise WrongError(f"the configuration is not {given}")
        return bool(refused)

    def _load(self, arrays: dict | None, metadata: dict | None) -> bool:
        """Load what lies at `path`, which holds these if it can be taken at all."""
        with _sentence() as refused:
            loaded = load_checkpoint(self.path)
        with _sentence() as again:
            lean = load_checkpoint(self.path, for_resume=False)
        if bool(refused) != bool(again) or not refused and lean.optimizer:
            raise WrongError(f"not the same without the moments: {refused} {again}")
        if not refused and arrays is not None:
            _check_taken(loaded, arrays, metadata)
            save_checkpoint(self.path, loaded)
            saved = decode(self.path.read_bytes())
            if {n: a.tobytes() for n, a in saved[0].items()} != {n: a.tobytes() for n, a in arrays.items()}:
                raise WrongError("saved again, it is another")
        return bool(refused)


def _check_taken(loaded: Checkpoint, arrays: dict, metadata: dict) -> None:
    """WrongError unless everything that was written is there, and works."""
    ours = loaded.weights | {f"optimizer.{name}": moment for name, moment in loaded.optimizer.items()}
    if ours.keys() != arrays.keys() or any(ours[n].tobytes() != a.tobytes() for n, a in arrays.items()):
        raise WrongError("the arrays are not those of the file")
    values = {"config": vars(loaded.config.gpt) | vars(loaded.config.train), "progress": vars(loaded.progress)}
    for part, has in (values | {"tokenizer": loaded.tokenizer.to_dict()}).items():
        written = json.loads(metadata[part])
        if part != "tokenizer" and any(has[key] not in (value, _rounded(value)) for key, value in written.items()):
            raise WrongError(f"{part} is not {written}")
        if part == "tokenizer" and has["kind"] != written["kind"]:
            raise WrongError(f"another tokenizer than {written}")
    model, tokens = loaded.build_model(), loaded.tokenizer.encode(loaded.tokenizer.decode([0]))
    with no_grad(), np.errstate(all="ignore"):
        logits = model.eval()(tokens[None, :1])[0]
    if logits.shape[2] != loaded.tokenizer.vocab_size or loaded.progress.evaluated_step > loaded.progress.step:
        raise WrongError("the parts do not fit each other")


def _rounded(value):
    """An int may stand for a float."""
    return float(value) if type(value) is int and abs(value) < 2**63 else value


@contextlib.contextmanager
def _sentence():
    """What a user would be told, in a list; WrongError if that is more than a sentence."""
    told = []
    try:
        yield told
    except (UserError, BackendError) as error:
        told.append(str(error))
        if not told[0].strip() or told[0].count("\n") > told[0].count("\\n") + 20:
            raise WrongError(f"no sentence: {told[0]!r}") from error


# -- killed runs --


class KilledRun:
    """A run that is killed again and again, at any moment from the first import to the last save."""

    OPTIONS = shlex.split(
        "little-shakespeare --n-layer=1 --n-head=2 --n-embd=16 --block-size=8 --batch-size=4 --micro-batch-size=2"
        " --eval-iters=2 --dropout=0.1 --eval-interval=2 --max-iters=1000000 --data=text.txt"
    )

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "killed"

    def kill(self, rng: random.Random) -> bool:
        """Start or resume it, and kill it. Nothing may be broken then."""
        step = self.step()
        how = [*self.OPTIONS, "--out=killed", "--overwrite"] if step is None else ["--resume", "--out=killed"]
        with self._start(how, stdout=subprocess.PIPE) as process:
            if rng.random() < 0.8:  # else at any moment of the start
                while (line := process.stdout.readline()) and not line.startswith(b"run: "):
                    pass
            time.sleep(rng.uniform(0, 0.3))
            if process.poll() is not None:
                raise WrongError(f"it ended by itself: {process.stderr.read().decode()}")
            process.kill()
        if step is not None and self.step() < step:
            raise WrongError("it fell back")
        for file in self.run.glob("*.safetensors"):
            load_checkpoint(file)
        return False

    def step(self) -> int | None:
        last = self.run / "last.safetensors"
        return load_checkpoint(last).progress.step if last.exists() else None

    def check(self) -> None:
        """WrongError unless the run, resumed to its end, is the one that was never killed."""
        from scripts import assert_same_run

        step = self.step()
        if step is None:
            return
        for how in (["--resume", "--out=killed"], [*self.OPTIONS, "--out=whole", "--overwrite"]):
            with self._start([*how, f"--max-iters={step + 5}"], stdout=subprocess.DEVNULL) as process:
                if process.wait():
                    raise WrongError(f"it cannot go on: {process.stderr.read().decode()}")
        try:
            assert_same_run(self.run, self.folder / "whole")
        except AssertionError as error:
            raise WrongError(f"after {step} steps it is another run: {error}") from error
        left = {file.name for file in self.run.iterdir()}
        if any(name.endswith(".tmp") for name in left):
            raise WrongError(f"it has left {left}")

    def _start(self, options: list[str], **pipes) -> subprocess.Popen:
        command = [sys.executable, ROOT / "train.py", *options]
        return subprocess.Popen(command, cwd=self.folder, stderr=subprocess.PIPE, **pipes)


# -- the soak --

KINDS = ("damaged_bytes", "damaged_metadata", "damaged_arrays", "damaged_header", "configuration", "options")


def soak(draws: int | None, seconds: float | None, kill_every: int = 0, seed: int = 0, first: int = 0) -> dict:
    """{kind: Counter of tried, refused, wrong}, and under "wrong" what was, with the numbers of the draws."""
    counts, wrong = {kind: Counter() for kind in (*KINDS, "killed")}, []
    end = time.monotonic() + seconds if seconds else math.inf
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        faults, killed = Faults(folder), KilledRun(folder)
        number = first
        while time.monotonic() < end and (draws is None or number < first + draws):
            rng = random.Random(f"{seed} {number}")
            kind = "killed" if kill_every and number % kill_every == 0 else rng.choice(KINDS)
            attempt = killed.kill if kind == "killed" else getattr(faults, kind)
            _attempt(attempt, rng, counts[kind], wrong, f"{kind} {number}")
            number += 1
        _attempt(lambda _: killed.check(), None, Counter(), wrong, "the killed run")
        shutil.rmtree(folder / "killed", ignore_errors=True)
    return counts | {"wrong": wrong}


def _attempt(attempt: Callable, rng: random.Random | None, count: Counter, wrong: list[str], name: str) -> None:
    count["tried"] += 1
    start = time.process_time()
    try:
        count["refused"] += bool(attempt(rng))
        spent = time.process_time() - start
        if spent > CPU_SECONDS:
            raise WrongError(f"it took {spent:.1f} seconds")
    except Exception as error:  # of any kind: that is the question
        count["wrong"] += 1
        wrong.append(f"{name}: {type(error).__name__}: {str(error)[:2000]}")


def limit_memory() -> None:
    """What asks for too much gets a MemoryError, and not the machine."""
    try:
        import resource
    except ImportError:  # Windows
        return
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + EXTRA_MEMORY, resource.RLIM_INFINITY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help="how many (default: until --seconds)")
    parser.add_argument("--seconds", type=float, help="how long (default: 300, or until --draws)")
    parser.add_argument("--kill-every", type=int, default=250, help="one draw in N is a kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    parser.add_argument("--draw", type=int, help="one draw alone")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if args.draw is not None:
        args.draws, args.kill_every = 1, 0
    if Path("/proc/self/statm").exists():
        limit_memory()
    seconds = args.seconds or (None if args.draws else 300.0)
    results = soak(args.draws, seconds, args.kill_every, args.seed, args.draw or 0)
    wrong = results.pop("wrong")
    total = sum(results.values(), Counter())
    rows = [{"what": what, **{key: count[key] for key in ("tried", "refused", "wrong")}}
            for what, count in (results | {"in all": total}).items()]  # fmt: skip
    for row in rows:
        print("{what:20} tried {tried:7,}, refused {refused:7,}, wrong {wrong:4,}".format(**row))
    print(*wrong[:20], sep="\n")
    write_results(args.json, results=rows)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
