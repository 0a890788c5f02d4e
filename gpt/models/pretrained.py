"""Weights of other programs for a GPT of ours: GPT-2's as Hugging Face's transformers saves them, and nanoGPT's.

Both have our tensor names, the first with or without "transformer." before them, and with the matrices of its layers as
(in, out), where nanoGPT's and ours are (out, in). The tensors tell the shape, config.json what they cannot: the number
of heads, the activation, and options of transformers' GPT2Config that change the arithmetic. Whatever this program does
not compute, and every contradiction, is refused by name: a model is taken whole or not at all. Nothing is executed.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from gpt.advice import argument
from gpt.errors import UserError, shown
from gpt.files import check_size, explained, read_regular
from gpt.models.gpt import GPT
from gpt.models.shape import GPTConfig
from gpt.tensor_file import FLOAT32, INTEGERS, MAX_JSON, STORED, TensorFile, open_tensors
from gpt.terminal import printable, shortened

WEIGHTS, INDEX, SETTINGS, TOKENIZER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "tokenizer.json",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = (  # clone: what is one tensor under two names cannot be saved
    "import sys, torch; from safetensors.torch import save_file;"
    " w = torch.load(sys.argv[1], map_location='cpu', weights_only=True);"
    " save_file({k: v.clone().contiguous() for k, v in w.get('model', w).items()}, sys.argv[2])"
)
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
ONLY = {  # the one value that is computed here, which a file without the option means
    "model_type": "gpt2",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
TABLE, POSITIONS, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"
ATTENTION = "transformer.h.0.attn.c_attn.weight"
TELLING = (TABLE, POSITIONS, ATTENTION)  # the shape
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # what torch.compile and its data parallelism put before each name
MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")  # constants among the weights of older files
MATRICES = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
MOST_NAMES = 6  # of tensors in a message


@dataclass
class _Found:
    """A tensor in a file, under the name that it has there."""

    path: Path
    name: str
    shape: tuple[int, ...]


@dataclass
class Pretrained:
    """A model in `folder`: its shape, and its weights once they are asked for."""

    folder: Path
    shape: GPTConfig
    _tensors: dict[str, _Found]  # by our names
    _transposed: bool

    def weights(self, vocab_size: int) -> dict[str, np.ndarray]:
        """The float32 arrays of a model of our own, with the first vocab_size rows of the tables."""
        named = GPT(replace(self.shape, vocab_size=vocab_size), seed=None).named_parameters()
        wanted, weights = {name: parameter.shape for name, parameter in named}, {}
        for path in {found.path for found in self._tensors.values()}:
            with open_tensors(path) as file:
                for name in wanted:
                    if self._tensors[name].path == path:
                        weights[name] = self._read(file, name, wanted[name])
        return weights

    def _read(self, file: TensorFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The values of a tensor as an array of `shape`, which has fewer rows than there are if some are left out."""
        found, turned = self._tensors[name], self._transposed and MATRICES.search(name)
        array = np.empty(shape[::-1] if turned else shape, FLOAT32)
        flat = array.reshape(-1)
        for part, piece in file.read(found.name):
            if not np.isfinite(piece).all():
                raise UserError(f"{found.path} cannot be used: {_named(found)} has values that are nan or infinite")
            flat[part] = piece[: max(flat.size - part.start, 0)]
        return np.ascontiguousarray(array.T) if turned else array


def find_pretrained(path: Path, n_head: int | None = None) -> Pretrained:
    """The model in a folder, or in a file of safetensors beside its config.json. n_head: for weights without one.

    UserError if it is none that this program computes.
    """
    folder, files = _find(path)
    settings = _read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    _check_settings(settings, folder / SETTINGS)
    tensors = _list_tensors(files)
    if not all(name in tensors and len(tensors[name].shape) == 2 for name in TELLING):
        raise _strange(path, tensors, dict.fromkeys(TELLING, "a matrix"))
    rows, columns = tensors[ATTENTION].shape
    transposed = rows < columns  # of the one matrix that tells: three times as many outputs as inputs
    if transposed and not settings:
        raise UserError(f"{path} has the weights of a GPT-2 and no {SETTINGS} beside it: put that there too")
    shape = _deduce(path, tensors, settings, transposed, n_head)
    _check_tensors(path, tensors, shape, transposed)
    tied = settings.get("tie_word_embeddings", True if transposed else None)
    return Pretrained(folder, replace(shape, tie_weights=_is_tied(path, tensors, tied)), tensors, transposed)


def _find(path: Path) -> tuple[Path, list[Path]]:
    """The folder of a model, and the files of its weights."""
    with explained("read", path):
        if not path.exists():
            raise UserError(f"there is no {path}: {_meant(str(path))}")
        if path.suffix in PICKLES and not path.is_dir():
            raise _pickled(path)
        if not path.is_dir():
            return path.parent, _shards(path) if path.name.endswith(".index.json") else [path]
        if (path / WEIGHTS).exists():
            return path, [path / WEIGHTS]
        if (path / INDEX).exists():
            return path, _shards(path / INDEX)
        pickles = [file for file in path.iterdir() if file.suffix in PICKLES]
        if pickles:
            raise _pickled(min(pickles, key=lambda file: (PICKLES.index(file.suffix), file.name)))
    raise UserError(f"{path} holds no weights: expected a run's best.safetensors, or {WEIGHTS} with its {SETTINGS}")


def _meant(name: str) -> str:
    """What to do instead of giving one of nanoGPT's words for where to begin."""
    if name == "resume":
        return "to go on with a run write --resume"
    if name == "scratch":
        return "leave --init-from out to start from random weights"
    if name.startswith("gpt2"):
        files = f"{SETTINGS} {TOKENIZER} {WEIGHTS}"
        return f"get that folder with: hf download openai-community/{name} {files} --local-dir {name}"
    return "give a run, a checkpoint, or a folder with a model of Hugging Face's"


def _pickled(path: Path) -> UserError:
    target = argument("", path.absolute().with_name(WEIGHTS))
    return UserError(
        f"{path} is a pickle, which can run code when it is opened, and is not opened here; where torch and safetensors"
        f' are installed, convert it safely with: python -c "{CONVERT}"{argument("", path.absolute())}{target}'
    )


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all beside it."""
    names = _read_json(index).get("weight_map")
    names = sorted({str(name) for name in names.values()}) if isinstance(names, dict) else []
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise UserError(f"{index} names the file {shown(name)}: expected one of safetensors in the same folder")
    if not names:
        raise UserError(f"{index} names no files in its weight_map: use an intact one")
    return [index.with_name(name) for name in names]


def _read_json(path: Path) -> dict:
    with explained("read", path):
        text = read_regular(path, MAX_JSON, follow=True)  # Hugging Face's cache is full of links
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: it is damaged or no JSON ({error}); use another") from None
    raise UserError(f"cannot read {path}: expected a JSON object, got {shown(value)}; use another")


def _check_settings(settings: dict, path: Path) -> None:
    for key, only in ONLY.items():
        if settings.get(key, only) != only:
            raise UserError(f"{path} has {key} {shown(settings[key])}, and only {only} is computed here: use another")


def _list_tensors(files: Iterable[Path]) -> dict[str, _Found]:
    """Where each tensor is, by our names, without the masks that are among them."""
    tensors: dict[str, _Found] = {}
    for path in files:
        check_size(path, 1, "take a smaller model")
        with open_tensors(path) as file:
            for name, shape in file.shapes({**STORED, **INTEGERS}).items():
                ours = WRAPPERS.sub("", name)
                ours = ours if ours.startswith(("transformer.", "lm_head.")) else f"transformer.{ours}"
                if MASKS.fullmatch(ours):
                    continue
                if ours in tensors:
                    raise UserError(
                        f"{path} has {_named(tensors[ours])} twice, also as {_named(_Found(path, name, shape))}"
                    )
                tensors[ours] = _Found(path, name, shape)
    return tensors


def _deduce(path: Path, tensors: dict[str, _Found], settings: dict, transposed: bool, n_head: int | None) -> GPTConfig:
    """The shape, from the tensors and what config.json adds to them; UserError where the two differ."""
    (rows, width), (positions, _) = tensors[TABLE].shape, tensors[POSITIONS].shape
    layers = len({name.split(".")[2] for name in tensors if name.startswith("transformer.h.")})
    length = next((key for key in ("n_positions", "n_ctx", "block_size") if key in settings), "")
    inner = {"n_inner": 4 * width} if settings.get("n_inner") is not None else {}
    sizes = {"vocab_size": rows, "n_embd": width, "n_layer": layers, length: positions}
    for key, size in (sizes | inner).items():
        if settings.get(key, size) != size:
            raise UserError(f"{path}: its {SETTINGS} says {key} {shown(settings[key])} where the weights need {size}")
    activation = settings.get("activation_function", "gelu_new" if transposed else "gelu")
    if activation not in list(ACTIVATIONS):
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{path}: its activation_function is {shown(activation)}, and only {known} are computed here")
    n_head = settings.get("n_head", n_head)
    if n_head is None:
        raise UserError(f"{path} does not tell its number of attention heads: give it with --n-head, 12 for a GPT-2")
    try:
        return GPTConfig(
            rows, positions, layers, n_head, width, tie_weights=False,
            bias="transformer.ln_f.bias" in tensors, activation=ACTIVATIONS[activation],
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _check_tensors(path: Path, tensors: dict[str, _Found], shape: GPTConfig, transposed: bool) -> None:
    """UserError unless these are the tensors of a model of this shape, all but perhaps the head, and no more."""
    expected = {name: parameter.shape for name, parameter in GPT(shape, seed=None).named_parameters()}
    if transposed:
        expected |= {name: size[::-1] for name, size in expected.items() if MATRICES.search(name)}
    if HEAD not in tensors:
        del expected[HEAD]
    if expected != {name: found.shape for name, found in tensors.items()}:
        raise _strange(path, tensors, expected)


def _strange(path: Path, tensors: dict[str, _Found], expected: dict) -> UserError:
    """For tensors that are not as expected: the unknown, the missing and the misshapen in turns, each by its name."""
    kinds = (
        [f"unknown {_named(found)}" for name, found in tensors.items() if name not in expected],
        [f"no {name.removeprefix('transformer.')}" for name in expected if name not in tensors],
        [
            f"{_named(tensors[name])} of shape {tensors[name].shape}, expected {size}"
            for name, size in expected.items()
            if name in tensors and tensors[name].shape != size
        ],
    )
    problems = [problem for some in zip_longest(*kinds) for problem in some if problem]
    more = f"; and {len(problems) - MOST_NAMES} more" if len(problems) > MOST_NAMES else ""
    return UserError(f"{path} is no GPT-2, nor is it nanoGPT's: it has {'; '.join(problems[:MOST_NAMES])}{more}")


def _named(found: _Found) -> str:
    return shortened(printable(found.name))


def _is_tied(path: Path, tensors: dict[str, _Found], said: object) -> bool:
    """Whether the head is the table of tokens. said: whether config.json says so; None if it says nothing."""
    if HEAD not in tensors:
        if said is False:
            raise UserError(
                f"{path} has no {HEAD}, and tie_word_embeddings is false in its {SETTINGS}: use an intact one"
            )
        return True
    if said is False:
        return False
    one, two = tensors[TABLE], tensors[HEAD]
    with open_tensors(one.path) as table, open_tensors(two.path) as head:
        pieces = zip(table.read(one.name), head.read(two.name), strict=True)
        same = all(np.array_equal(ours, theirs) for (_, ours), (_, theirs) in pieces)
    if said and not same:
        raise UserError(
            f"{path}: {_named(two)} and {_named(one)} differ, and its {SETTINGS} says not that they may: "
            "set tie_word_embeddings to false in it if the model has a head of its own"
        )
    return same
