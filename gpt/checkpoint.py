"""Checkpoints: one safetensors file that holds everything needed to sample or to go on training.

Tensors: the weights under nanoGPT's names and in (out, in) orientation, and for resuming the optimiser's moments
`optimizer.m` and `optimizer.v`. Metadata: JSON texts of the configuration, the tokenizer, the data's identity, the
progress and the time of saving, and a SHA-256 over all of it. Nothing in a file is ever executed, nor believed: who
can write a file can write its checksum.
"""

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from gpt.config import Config
from gpt.errors import MissingLibraryError, UserError, shown
from gpt.files import atomic_write, explained
from gpt.models.kinds import MODEL_KINDS, build_model
from gpt.models.language_model import LanguageModel
from gpt.settings import check_fields, option
from gpt.tensor_file import FLOAT32, MAX_HEADER, TensorFile, holds_little, make_header, open_tensors, parsed
from gpt.text.tokenizers import Tokenizer, kind_of, tokenizer_from_dict

FORMAT = "tensorlite-gpt/1"
MOMENTS = "optimizer."  # what their names begin with


@dataclass
class Progress:
    """How far a run has come."""

    step: int = option(0, "training steps done", least=0)
    best_val_loss: float | None = option(None, "None before the first evaluation", least=0.0)
    evaluated_step: int = option(-1, "the step of the last evaluation", least=-1)
    seconds: float = option(0.0, "spent in all", least=0.0)
    stale: int = option(0, "evaluations in a row that were not below loss_to_beat by their standard error", least=0)
    loss_to_beat: float | None = option(None, "the last validation loss that was", least=0.0)

    def __post_init__(self):
        check_fields(self)
        if self.evaluated_step > self.step:
            raise UserError(f"evaluated_step must not exceed step, got {self.evaluated_step} and {self.step}")


@dataclass
class Checkpoint:
    """What a file holds, as host arrays and plain values."""

    config: Config
    tokenizer: Tokenizer
    weights: dict[str, np.ndarray]
    progress: Progress
    fingerprint: str = ""  # of the data; see gpt.text.dataset.Dataset
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)  # "m" and "v", flat; empty: not to be resumed

    def build_model(self) -> LanguageModel:
        """The model on the CPU, with these very weights: a second copy could be too much."""
        model = build_model(self.config.train.model, self.config.gpt, seed=None)
        for name, parameter in model.named_parameters():
            parameter.data = self.weights[name]
        return model


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file in one piece: the old one stays until the new one is complete and on the disk."""
    tensors = checkpoint.weights | {MOMENTS + name: moment for name, moment in checkpoint.optimizer.items()}
    tensors = {name: np.ascontiguousarray(tensors[name], FLOAT32) for name in sorted(tensors)}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(checkpoint.config.to_dict()),
        "tokenizer": json.dumps(checkpoint.tokenizer.to_dict()),
        "progress": json.dumps(asdict(checkpoint.progress)),
        "saved": json.dumps(time.time()),
        "fingerprint": checkpoint.fingerprint,
    }
    header = make_header(tensors, metadata | {"sha256": _digest(tensors, metadata)})
    if len(header) > MAX_HEADER or not holds_little(header):
        raise UserError(f"cannot write {path}: a model of this many layers or symbols is too much for its header")
    atomic_write(path, header, *tensors.values())


def load_checkpoint(path: Path, for_resume: bool = True) -> Checkpoint:
    """Read and check a file. UserError if it is missing, damaged, or something else.

    for_resume: with the optimiser's moments, where there are any.
    """
    with _opened(path) as file:
        shapes, checksum = file.shapes(), file.metadata.pop("sha256", None)
        try:
            checkpoint = _from_metadata(file.metadata)
            twins = _check_shapes(checkpoint.config, shapes)
        except MissingLibraryError:
            raise
        except UserError as error:
            raise UserError(f"{path} is damaged or not of this version of the program ({error}); use another") from None
        digest = _begin_digest(file.metadata)
        tensors, problems = _read_tensors(file, shapes, twins, for_resume, digest)
    if checksum != digest.hexdigest():
        raise UserError(f"{path} is damaged: its contents do not match its checksum; use another checkpoint")
    if problems:
        raise UserError(f"{path} cannot be used, for {problems[0]}: take an earlier checkpoint, or train anew")
    for name, array in tensors.items():
        part = checkpoint.optimizer if name.startswith(MOMENTS) else checkpoint.weights
        part[name.removeprefix(MOMENTS)] = array
    return checkpoint


def is_checkpoint(path: Path) -> bool:
    """Whether the file says that it is a checkpoint of this program, of whatever version."""
    with contextlib.suppress(UserError), open_tensors(path) as file:
        return file.metadata.get("format", "").startswith(FORMAT.partition("/")[0])
    return False


def saved_at(path: Path) -> float:
    """When the checkpoint was saved, in seconds since 1970: by its own record, which copying does not change, or by its
    file's time if it has none."""
    saved = None
    with contextlib.suppress(UserError, KeyError), _opened(path) as file:
        saved = json.loads(file.metadata["saved"])
    return saved if type(saved) is float and math.isfinite(saved) else path.lstat().st_mtime


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TensorFile]:
    """The file at `path`. Within, what is wrong with it becomes a UserError."""
    with explained("read", path):
        if not path.exists():
            raise UserError(f"there is no checkpoint {path}")
    with open_tensors(path) as file:
        if file.metadata.get("format") != FORMAT:
            found = shown(file.metadata.get("format"))
            raise UserError(f"{path} is not a checkpoint of this program (format {found}); use another")
        yield file


def _from_metadata(metadata: dict[str, str]) -> Checkpoint:
    """The checkpoint without its arrays. UserError for what cannot be."""
    config = Config.from_dict(_parsed(metadata, "config"), source="its configuration")
    tokenizer = tokenizer_from_dict(_parsed(metadata, "tokenizer"))
    ours, expected = (tokenizer.kind, tokenizer.vocab_size), (kind_of(config.train.tokenizer), config.gpt.vocab_size)
    if ours != expected:
        raise UserError("its tokenizer is {} of {:,}, its configuration's {} of {:,}".format(*ours, *expected))
    progress = _parsed(metadata, "progress")
    unknown = progress.keys() - {f.name for f in fields(Progress)}
    if unknown:
        raise UserError(f"its progress has an unknown key {shown(min(unknown))}")
    if "fingerprint" not in metadata:
        raise UserError("it has no fingerprint")
    return Checkpoint(config, tokenizer, {}, Progress(**progress), metadata["fingerprint"])


def _parsed(metadata: dict[str, str], part: str) -> dict:
    with contextlib.suppress(ValueError, RecursionError):
        value = parsed(metadata.get(part, "").encode())
        if isinstance(value, dict):
            return value
    raise UserError(f"its {part} is no JSON object")


def _check_shapes(config: Config, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """UserError unless these are the shapes of the model that the configuration describes, and perhaps of its moments.

    That model is looked at without its values, and only if it has as many as there are: it cannot be too large then.

    Returns which weights are the same as which, by name, the first of each in order.
    """
    gpt, kind = config.gpt, MODEL_KINDS[config.train.model]
    weights = {name: shape for name, shape in shapes.items() if not name.startswith(MOMENTS)}
    values = sum(map(math.prod, weights.values()))
    if values != kind.num_parameters(replace(gpt, tie_weights=False)) or kind.num_layers(gpt) > len(weights):
        raise UserError(f"its weights do not fit its configuration: {values:,} values in {len(weights):,} arrays")
    named = dict(build_model(config.train.model, gpt, seed=None).named_parameters(remove_duplicate=False))
    expected = {name: parameter.shape for name, parameter in named.items()}
    if len(weights) < len(shapes):
        expected |= {MOMENTS + name: (kind.num_parameters(gpt),) for name in ("m", "v")}
    for name in sorted(expected.keys() | shapes.keys()):
        if shapes.get(name) != expected.get(name):
            found, wanted = shapes.get(name, "nothing"), expected.get(name, "nothing")
            raise UserError(f"its weights do not fit its configuration: {shown(name)} is {found} instead of {wanted}")
    first: dict[int, str] = {}
    return {name: first.setdefault(id(named[name]), name) for name in sorted(named)}


def _read_tensors(file: TensorFile, shapes, twins: dict[str, str], for_resume: bool, digest) -> tuple[dict, list[str]]:
    """The arrays, weights that are the same only once, and what is wrong with their values; `digest` reads along."""
    tensors, problems = {}, []
    for name in sorted(shapes):
        digest.update(_described(name, shapes[name]))
        is_moment, twin = name.startswith(MOMENTS), tensors.get(twins.get(name))
        if twin is not None:
            tensors[name] = twin
        elif for_resume or not is_moment:
            tensors[name] = np.empty(shapes[name], FLOAT32)
        flat = tensors[name].reshape(-1) if name in tensors else None
        for part, piece in file.read(name):
            digest.update(piece)
            if twin is not None and not np.array_equal(flat[part], piece):
                problems.append(f"{twins[name]} and {name} are one in its model and differ")
            if not np.isfinite(piece).all() or name == MOMENTS + "v" and piece.min() < 0:
                problems.append(f"{name} has values that are nan, infinite or else impossible")
            if flat is not None and twin is None:
                flat[part] = piece
    return tensors, problems


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over the metadata, and over the names, types, shapes and values."""
    digest = _begin_digest(metadata)
    for name in sorted(tensors):
        digest.update(_described(name, tensors[name].shape))
        digest.update(tensors[name].data)
    return digest.hexdigest()


def _begin_digest(metadata: dict[str, str]):
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())


def _described(name: str, shape: tuple[int, ...]) -> bytes:
    return f"{name} float32 {shape}".encode()
