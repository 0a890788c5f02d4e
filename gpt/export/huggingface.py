"""A GPT as a folder for Hugging Face's transformers: AutoModelForCausalLM and AutoTokenizer load it.

Written without that library: the weights are safetensors, everything else is JSON.
"""

import contextlib
import json
from pathlib import Path

import numpy as np

from gpt.checkpoint import Checkpoint
from gpt.errors import UserError
from gpt.files import atomic_write, check_replaceable, explained
from gpt.models.kinds import MODEL_KINDS
from gpt.models.pretrained import MATRICES, SETTINGS, TOKENIZER, WEIGHTS
from gpt.tensor_file import make_header, open_tensors
from gpt.text.bpe import SubwordTokenizer
from gpt.text.tokenizers import CharTokenizer, Tokenizer

FILES = (WEIGHTS, SETTINGS, TOKENIZER, "tokenizer_config.json")
OURS = {"format": "pt", "producer": "tensorlite"}  # "pt" is what transformers asks for; it writes no producer
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


def check_folder(folder: Path) -> None:
    """UserError unless an export can go to `folder`: a new one, an empty one, or one with an earlier export."""
    with explained("write", folder):
        if not folder.exists():
            return
        if not folder.is_dir() or (any(folder.iterdir()) and not _is_export(folder / WEIGHTS)):
            raise UserError(f"{folder} exists and is no earlier export: give another --huggingface")
        for name in FILES:
            check_replaceable(folder / name)


def _is_export(path: Path) -> bool:
    """Whether these weights were written here: what was fine-tuned since, or came from elsewhere, is not replaced."""
    with contextlib.suppress(UserError), open_tensors(path) as file:
        return file.metadata == OURS
    return False


def write_huggingface(folder: Path, checkpoint: Checkpoint) -> None:
    """The files of GPT2LMHeadModel and of its tokenizer. UserError for what GPT-2's architecture cannot say."""
    config, tensors = _config(checkpoint), _tensors(checkpoint)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.config.gpt.block_size,
        # Else transformers 4 gives token types too, for which GPT-2 adds the embedding of token 0 to everything.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    with explained("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    # The weights first: they are what may fail, and what tells the folder from others.
    atomic_write(folder / WEIGHTS, make_header(tensors, OURS), *tensors.values())
    tokenizer = tokenizer_json(checkpoint.tokenizer)
    for name, text in zip(FILES[1:], (_as_json(config), tokenizer, _as_json(tokenizer_config)), strict=True):
        atomic_write(folder / name, text)


def _config(checkpoint: Checkpoint) -> dict:
    """config.json."""
    gpt, kind = checkpoint.config.gpt, checkpoint.config.train.model
    if kind != "gpt":
        way = "export it with --onnx, or train a GPT" if kind == "bigram" else "train a GPT"
        raise UserError(f"a {MODEL_KINDS[kind].noun} has no place in GPT-2's architecture: {way}")
    if gpt.head_bias:
        raise UserError(
            "GPT-2's architecture has no bias on the logits: train a model with --no-head-bias, or export with --onnx"
        )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": gpt.vocab_size,
        "n_positions": gpt.block_size,
        "n_layer": gpt.n_layer,
        "n_head": gpt.n_head,
        "n_embd": gpt.n_embd,
        "activation_function": ACTIVATIONS[gpt.activation],
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), gpt.dropout),
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": gpt.tie_weights,
        "bos_token_id": None,  # else GPT-2's own, which are not of this vocabulary
        "eos_token_id": None,
    }


def _tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The weights by GPT-2's names, which are nanoGPT's, with zeros for biases that the model does without."""
    tensors = {}
    for name, array in sorted(checkpoint.weights.items()):
        if name == "lm_head.weight" and checkpoint.config.gpt.tie_weights:
            continue
        tensors[name] = np.ascontiguousarray(array.T if MATRICES.search(name) else array)  # GPT-2's are (in, out)
        bias = name.replace(".weight", ".bias")
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and bias not in checkpoint.weights:
            tensors[bias] = np.zeros(len(array), np.float32)
    return tensors


def _as_json(value: dict) -> str:
    return json.dumps(value, indent=2) + "\n"


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json: our tokens under our numbers, and every text comes back as it does here."""
    if isinstance(tokenizer, SubwordTokenizer):
        return tokenizer.to_dict()["json"]
    if isinstance(tokenizer, CharTokenizer):
        # A character without a token is an error, as it is here: there is no token "" for the unknown.
        vocab = {character: i for i, character in enumerate(tokenizer.symbols)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": ""}
        splitter = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        decoder = {"type": "Fuse"}
    else:
        model = {"type": "BPE", "vocab": {c: byte for byte, c in enumerate(_byte_characters())}, "merges": []}
        splitter = decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    parts = {"pre_tokenizer": splitter, "decoder": decoder, "model": model}
    return _as_json({"version": "1.0", "added_tokens": []} | parts)


def _byte_characters() -> str:
    """What stands for each byte in a byte-level vocabulary: the Latin-1 character if it is visible, else the next of
    those from U+0100 on (Radford et al. 2019, the code of GPT-2)."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = sorted(set(range(256)) - visible)
    return "".join(chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256))
