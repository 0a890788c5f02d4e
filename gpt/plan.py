"""What a run will be, before it begins: its parameters, its memory, the work of a step."""

from gpt.config import Config
from gpt.models.kinds import MODEL_KINDS, build_model
from gpt.models.language_model import LanguageModel
from gpt.needs import Needs, run_needs
from tensorlite import Backend

# The part of a model that a parameter belongs to, by what its name has in it.
PARTS = {
    "wte.": "token table",
    "token_embedding_table.": "token table",
    "wpe.": "position table",
    "attn.": "attention",
    "heads.": "attention",
    "mlp.": "feed-forward",
    "ln_": "layer norms",
    "lm_head.": "head",
}
WIDTH = 52  # columns of a line, but for one that says more


def planned(config: Config, backend: Backend, workers: int = 1, text: int = 0, dtype: str = "float32") -> list[str]:
    """Lines for people: the parameters by part, the memory by part beside what there is, and the work of a step. The
    arguments are those of `gpt.memory.check_memory`."""
    gpu = backend.name != "numpy"
    needs = run_needs(config, gpu, workers, text, dtype)
    counts = parameters_by_part(build_model(config.train.model, config.gpt, seed=None))
    lines = ["parameters"]
    lines += [_line(part, f"{count:,}") for part, count in (counts | {"in all": sum(counts.values())}).items()]
    lines += ["memory of the GPU, about" if gpu else "memory, about", *_memory_lines(needs, gpu, backend.memory_size())]
    lines += ["a step", _line("tokens", f"{step_tokens(config):,}")]
    flops = step_flops(config)
    return lines + ([_line("matrix products", f"{_rounded(flops)}FLOP")] if flops else [])


def parameters_by_part(model: LanguageModel) -> dict[str, int]:
    """How many trained values each part has, biases with their layer; in all model.num_parameters(). A table that the
    head shares is counted once, and says so."""
    counts = dict.fromkeys(PARTS.values(), 0)
    own = dict(model.named_parameters())
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - own.keys()
    for name, parameter in own.items():
        part = next((part for word, part in PARTS.items() if word in name), name)
        counts[part] = counts.get(part, 0) + parameter.size
    spelled = {"token table": "token table (shared with the head)"} if "lm_head.weight" in shared else {}
    return {spelled.get(part, part): count for part, count in counts.items() if count}


def step_tokens(config: Config) -> int:
    """Tokens that a step is trained on."""
    return config.train.batch_size * config.train.gradient_accumulation_steps * config.gpt.block_size


def step_flops(config: Config) -> float:
    """Floating-point operations of the matrix products of one step: 6 per weight and token (forward, and two products
    backward), and 12 per layer, channel and pair of positions for attention (full, not only its causal half). A model
    without layers has none."""
    shape, kind = config.gpt, MODEL_KINDS[config.train.model]
    layers = kind.num_layers(shape)
    if not layers:
        return 0.0
    weights = layers * kind.weights * shape.n_embd**2 + shape.vocab_size * shape.n_embd
    attention = 12 * layers * shape.n_embd * shape.block_size
    return step_tokens(config) * (6.0 * weights + attention)


def _memory_lines(needs: Needs, gpu: bool, memory: int | None) -> list[str]:
    workers = f", {needs.workers} workers x {_rounded(needs.activations)}B" if needs.workers > 1 else ""
    parts = {
        "CUDA" if gpu else "interpreter and libraries": needs.libraries,
        "text": needs.text,
        "weights": needs.weights,
        "gradients": needs.gradients,
        "moments": needs.moments,
        f"activations{workers}": needs.workers * needs.activations,
        "indices of a batch": needs.workers * needs.indices,
        "Python's objects": needs.objects,
        "losses of an evaluation": needs.evaluation,
        "counting, saving, sampling": needs.between,
    }
    lines = [_line(part, f"{_rounded(size)}B") for part, size in parts.items() if size >= 0.5e6]
    there = "" if memory is None else f" of {_rounded(memory)}B"
    tight = ", which may be too little" if memory is not None and needs.total > memory else ""
    return [*lines, _line("in all", f"{_rounded(needs.total)}B{there}") + tight]


def _line(what: str, figure: str) -> str:
    return f"  {what:<{WIDTH - 2 - len(figure)}}{figure}"


def _rounded(number: float) -> str:
    """A number of bytes or operations in millions, thousands of millions and so on, with their letter: 3 M, 1.2 G."""
    for unit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if number >= unit:
            return f"{number / unit:,.1f} {letter}"
    return f"{number / 1e6:.0f} M"
