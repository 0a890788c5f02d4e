"""A model as one ONNX file for ONNX Runtime and its like: weights, graph, tokenizer and configuration.

Input: ids (B, T), int64, of any B, and any T up to block_size. Outputs: logits (B, T, V), and next_logits (B, V), those
of the last position alone. The metadata hold the tokenizer and the configuration as the checkpoint's JSON.
"""

import json
import math
import os
from pathlib import Path

import numpy as np

from gpt.checkpoint import Checkpoint
from gpt.errors import MissingLibraryError, UserError
from gpt.files import atomic_write, explained, open_regular
from gpt.models.kinds import MODEL_KINDS
from gpt.models.shape import GPTConfig

OPSET, IR_VERSION = 20, 9  # of January 2024: the first with Gelu, which ONNX Runtime 1.17 reads
GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # what ONNX calls the two
PRODUCER = "tensorlite"
MAX_WEIGHTS = 2**31 - 2**24  # bytes: a protobuf message ends at 2 GiB, and there is a graph and a tokenizer to say too


def check_file(path: Path) -> None:
    """UserError unless an export can go to `path`: there is nothing yet, or an earlier one, and onnx is installed."""
    _onnx()
    with explained("write", path):
        if path.is_dir():
            raise UserError(f"{path} is a folder: give --onnx a file's name")
        if path.is_file() and not _is_export(path):
            raise UserError(f"{path} exists and is no earlier export: give another --onnx")


def _is_export(path: Path) -> bool:
    """Whether the message in the file begins with its version, a byte, and then with us as its producer."""
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(32)[2:].startswith(bytes([0x12, len(PRODUCER)]) + PRODUCER.encode())


def _onnx():
    """The package, which is an extra."""
    try:
        import onnx
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise MissingLibraryError("--onnx", "onnx", "onnx") from None
    return onnx


def write_onnx(path: Path, checkpoint: Checkpoint) -> None:
    """The file, in one piece. UserError for a model that is too large for one."""
    atomic_write(path, onnx_model(checkpoint).SerializeToString(deterministic=True))


def onnx_model(checkpoint: Checkpoint):
    """The ModelProto. UserError for what is too large."""
    config, onnx = checkpoint.config, _onnx()
    write = {"gpt": _gpt, "bigram": _bigram}.get(config.train.model)
    if write is None:
        raise UserError(f"a {MODEL_KINDS[config.train.model].noun} cannot be written as ONNX: train a GPT")
    unique = {id(array): array for array in checkpoint.weights.values()}
    size = sum(array.nbytes for array in unique.values())
    if size > MAX_WEIGHTS:
        raise UserError(f"an ONNX file holds 2 GiB, and the weights take {size:,} bytes: export with --huggingface")
    g, helper, types = _Graph(onnx, checkpoint.weights), onnx.helper, onnx.TensorProto
    logits, vocab_size = write(g, config.gpt), config.gpt.vocab_size
    g.add("Gather", logits, -1, axis=1, name="next_logits")
    # For one position wpe would be broadcast over any number of them: there the axis is not free.
    time = 1 if config.gpt.block_size == 1 else "time"
    values = [
        helper.make_tensor_value_info(name, kind, ["batch", *shape])
        for name, kind, shape in (
            ("ids", types.INT64, [time]),
            ("logits", types.FLOAT, [time, vocab_size]),
            ("next_logits", types.FLOAT, [vocab_size]),
        )
    ]
    graph = helper.make_graph(g.nodes, config.train.model, values[:1], values[1:], g.initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, producer_name=PRODUCER, ir_version=IR_VERSION, opset_imports=opsets)
    # Of the configuration what makes the model: the rest tells how it was trained, and where its text lies.
    known = {"model", *GPTConfig.__dataclass_fields__}
    shape = {key: value for key, value in config.to_dict().items() if key in known}
    metadata = {"config": shape, "tokenizer": checkpoint.tokenizer.to_dict()}
    helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    return model


class _Graph:
    """The nodes so far, and the constants that they take: weights under their names, each once, and numbers."""

    def __init__(self, onnx, weights: dict[str, np.ndarray]):
        self._onnx, self._weights, self._names = onnx, weights, {}
        self.nodes, self.initializers = [], []

    def add(self, op: str, *inputs, name: str | None = None, **attributes) -> str:
        """A node; the name of its output. Inputs are names, or integers and lists of them."""
        name = name or f"{op.lower()}_{len(self.nodes)}"
        inputs = [self.constant(value) if isinstance(value, int | list) else value for value in inputs if value != ""]
        self.nodes.append(self._onnx.helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def constant(self, value, dtype=np.int64) -> str:
        return self._initializer(f"constant_{len(self._names)}", np.array(value, dtype), (str(value), dtype))

    def weight(self, name: str) -> str:
        """What is called so in a checkpoint; "" for a bias that the model does without. Tied weights have one name."""
        if name not in self._weights:
            return ""
        return self._initializer(name, self._weights[name], id(self._weights[name]))

    def _initializer(self, name: str, array: np.ndarray, key) -> str:
        if key not in self._names:
            self._names[key] = name
            self.initializers.append(self._onnx.numpy_helper.from_array(array, name))
        return self._names[key]

    def linear(self, x: str, layer: str) -> str:
        """x (N, in) -> (N, out)."""
        return self.add("Gemm", x, self.weight(f"{layer}.weight"), self.weight(f"{layer}.bias"), transB=1)

    def layer_norm(self, x: str, layer: str) -> str:
        return self.add("LayerNormalization", x, self.weight(f"{layer}.weight"), self.weight(f"{layer}.bias"))


def _bigram(g: _Graph, shape: GPTConfig) -> str:
    """BigramLanguageModel: the name of the logits."""
    return g.add("Gather", g.weight("token_embedding_table.weight"), "ids", name="logits")


def _gpt(g: _Graph, shape: GPTConfig) -> str:
    """GPT: the name of the logits. Within, the residual stream is (N, C), with N = B T."""
    size, time = g.add("Shape", "ids"), g.add("Shape", "ids", start=1)
    wte = g.add("Gather", g.weight("transformer.wte.weight"), "ids")  # (B, T, C)
    wpe = g.add("Slice", g.weight("transformer.wpe.weight"), [0], time)  # (T, C)
    x = g.add("Add", wte, wpe, name=f"at_most_{shape.block_size}_tokens")  # which the error for more will show
    x = g.add("Reshape", x, [-1, shape.n_embd])
    heads = g.add("Concat", size, [3, shape.n_head, shape.n_embd // shape.n_head], axis=0)  # (B, T, 3, H, D)
    square = g.add("Expand", g.constant(-math.inf, np.float32), g.add("Concat", time, time, axis=0))
    mask = g.add("Trilu", square, 1, upper=1)  # (T, T): -inf for what comes later, else 0
    for i in range(shape.n_layer):
        x = _block(g, shape, f"transformer.h.{i}", x, heads, mask)
    x = g.linear(g.layer_norm(x, "transformer.ln_f"), "lm_head")  # (N, V)
    return g.add("Reshape", x, g.add("Concat", size, [shape.vocab_size], axis=0), name="logits")


def _block(g: _Graph, shape: GPTConfig, name: str, x: str, heads: str, mask: str) -> str:
    """Block: x (N, C) -> (N, C)."""
    qkv = g.linear(g.layer_norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn")  # (N, 3 C)
    qkv = g.add("Transpose", g.add("Reshape", qkv, heads), perm=[2, 0, 3, 1, 4])  # (3, B, H, T, D)
    q, k, v = (g.add("Gather", qkv, i) for i in range(3))
    scale = g.constant(1 / math.sqrt(shape.n_embd // shape.n_head), np.float32)
    scores = g.add("MatMul", g.add("Mul", q, scale), g.add("Transpose", k, perm=[0, 1, 3, 2]))  # (B, H, T, T)
    y = g.add("MatMul", g.add("Softmax", g.add("Add", scores, mask)), v)  # (B, H, T, D)
    y = g.add("Reshape", g.add("Transpose", y, perm=[0, 2, 1, 3]), [-1, shape.n_embd])  # (N, C)
    x = g.add("Add", x, g.linear(y, f"{name}.attn.c_proj"))
    y = g.linear(g.layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")  # (N, 4 C)
    y = g.add("Relu", y) if shape.activation == "relu" else g.add("Gelu", y, approximate=GELU[shape.activation])
    return g.add("Add", x, g.linear(y, f"{name}.mlp.c_proj"))
