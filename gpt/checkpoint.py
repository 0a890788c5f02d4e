"""Checkpoints: one safetensors file that holds everything needed to sample or to go on training.

Tensors: the weights under nanoGPT's names and in (out, in) orientation, and for resuming the optimiser's moments
`optimizer.m` and `optimizer.v`. Metadata: JSON texts of the configuration, the tokenizer, the data's identity and
the progress, and a SHA-256 over all of it. Nothing in a file is ever executed.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gpt.config import Config
from gpt.errors import UserError
from gpt.files import atomic_write
from gpt.language_model import LanguageModel
from gpt.model import build_model
from gpt.tokenizer import Tokenizer, tokenizer_from_dict

FORMAT = "tensorlite-gpt/1"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # training steps done
    best_val_loss: float | None = None  # None before the first evaluation
    evaluated_step: int = -1  # the step of the last evaluation
    seconds: float = 0.0  # spent in all


@dataclass
class Checkpoint:
    """What a file holds, as host arrays and plain values."""

    config: Config
    tokenizer: Tokenizer
    weights: dict[str, np.ndarray]
    progress: Progress
    fingerprint: str = ""  # of the data; see gpt.data.Dataset
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)  # "m" and "v", flat; empty: not to be resumed

    def build_model(self) -> LanguageModel:
        """The model with its weights, on the CPU."""
        model = build_model(self.config.train.model, self.config.gpt, seed=0)
        try:
            model.load_state_dict(self.weights)
        except ValueError as error:
            raise UserError(f"the checkpoint's weights do not fit its configuration: {error}") from None
        return model


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file in one piece: the old one stays until the new one is complete and on the disk."""
    tensors = checkpoint.weights | {f"optimizer.{k}": v for k, v in checkpoint.optimizer.items()}
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(checkpoint.config.to_dict()),
        "tokenizer": json.dumps(checkpoint.tokenizer.to_dict()),
        "progress": json.dumps(asdict(checkpoint.progress)),
        "fingerprint": checkpoint.fingerprint,
    }
    metadata["sha256"] = _digest(tensors, metadata)
    np.empty(3 * sum(array.nbytes for array in tensors.values()), np.uint8)  # MemoryError where `save` would abort
    atomic_write(path, save(tensors, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a file. UserError if it is missing, damaged, or something else."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a checkpoint of this program (format {metadata.get('format')!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: it is damaged or not a safetensors file ({error})") from None
    if metadata.pop("sha256", None) != _digest(tensors, metadata):
        raise UserError(f"{path} is damaged: its contents do not match its checksum; use another checkpoint")
    try:
        return Checkpoint(
            config=Config.from_dict(json.loads(metadata["config"]), source="its configuration"),
            tokenizer=tokenizer_from_dict(json.loads(metadata["tokenizer"])),
            progress=Progress(**json.loads(metadata["progress"])),
            fingerprint=metadata["fingerprint"],
            weights={n: a for n, a in tensors.items() if not n.startswith("optimizer.")},
            optimizer={n.removeprefix("optimizer."): a for n, a in tensors.items() if n.startswith("optimizer.")},
        )
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} was not written by this version of the program ({error}): use another") from None


def _digest(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """SHA-256 over names, types, shapes and values; safetensors itself checks only its header."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(tensors[name].data)
    return digest.hexdigest()
