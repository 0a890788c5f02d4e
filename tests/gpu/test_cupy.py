"""`--backend cupy` does what NumPy does: ops, training, sampling, checkpoints; on the stand-in, and on a GPU."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
from cases import CASES
from test_ops import FLOATS, assert_right, assert_same, cast, run
from test_trainer import DATA
from tolerances import assert_close

from gpt.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from gpt.config import Config, GPTConfig, TrainConfig, load_preset
from gpt.device import Device
from gpt.models.kinds import build_model
from gpt.text.dataset import make_dataset
from gpt.text.sources import Text
from gpt.text.tokenizers import make_tokenizer
from gpt.training.cpu_trainer import CPUTrainer
from gpt.training.gpu_trainer import GPUTrainer
from gpt.training.start import start_session
from tensorlite import backend_of, get_backend

# Without biases of the keys, whose gradient is rounding alone, which Adam scales up to whole steps.
SHAPE = GPTConfig(
    vocab_size=DATA.tokenizer.vocab_size, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.2, bias=True,
    qkv_bias=False,
)  # fmt: skip
TRAIN = TrainConfig(batch_size=4, micro_batch_size=2, eval_iters=2, learning_rate=1e-2, grad_clip=0.5, seed=5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_is_that_of_numpy(case, dtype, cuda):
    arrays = cast(case.arrays(), dtype)
    assert_same(run(case.fn, arrays, cuda), run(case.fn, arrays, get_backend("numpy")))


def make_trainer(model, *args):
    on_device = backend_of(model.token_table.data).name == "cupy"
    return (GPUTrainer if on_device else CPUTrainer)(model, *args)


def trained(backend, steps: int = 4, dtype: str | None = None, shape=SHAPE, train=TRAIN):
    """Losses and norms of the steps, then the evaluation, and the trainer."""
    model = build_model("gpt", shape, seed=1).to(backend.name)
    model.compute_dtype = dtype and backend.dtype(dtype)
    with make_trainer(model, DATA, train) as trainer:
        numbers = []
        for _ in range(steps):
            numbers += [float(x) for x in trainer.train_step()]
        evaluation = trainer.evaluate()
    return [*numbers, *vars(evaluation).values()], trainer


def test_training_gives_the_losses_of_numpy(cuda):
    expected, ours = trained(get_backend("numpy"))
    got, theirs = trained(cuda)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # the standard errors are differences of losses
    assert_close(cuda.to_numpy(theirs.flat.data), ours.flat.data)


def text_data(text: str, block_size: int = 8, record: int = 0):
    return make_dataset(Text(text, "text", "text", record), make_tokenizer("char", text), block_size, 0.2)


LETTERS = "abcabdacbd" * 60
ODD = {
    "block of one": {"block_size": 1},
    "one symbol": {"text": "a" * 600},
    "everything dropped": {"dropout": 1.0},
    "accumulation": {"gradient_accumulation_steps": 3, "batch_size": 2},
    "one of each": {"block_size": 1, "batch_size": 1, "micro_batch_size": 0, "eval_iters": 1, "n_layer": 1},
    "no clipping": {"grad_clip": 0.0},
    "records": {"text": "".join("a" * (i % 7 + 1) + "b" * (8 - i % 7) for i in range(80)), "record": 9},
    "16-bit tokens": {"text": "".join(chr(0x4E00 + i % 700) for i in range(3600))},
    "one channel": {"n_embd": 1, "n_head": 1},
    "no biases, tanh": {"bias": False, "qkv_bias": None, "activation": "gelu_tanh"},
    "relu, untied": {"activation": "relu", "tie_weights": False},
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_settings_train_evaluate_and_sample_as_numpy(odd, cuda):
    keys = dict(ODD[odd])
    data = text_data(keys.pop("text", LETTERS), keys.get("block_size", 8), keys.pop("record", 0))
    config = Config(SHAPE, replace(TRAIN, learning_rate=1e-3)).updated(keys | {"vocab_size": data.tokenizer.vocab_size})
    results = []
    for backend in ("numpy", "cupy"):
        model = build_model("gpt", config.gpt, seed=1).to(backend)
        with make_trainer(model, data, config.train) as trainer:
            numbers = [float(x) for _ in range(5) for x in trainer.train_step()]
            evaluations = [vars(trainer.evaluate()) for _ in range(2)]
            assert str(evaluations[0]) == str(evaluations[1])  # nan where there is but one batch
            assert model.training
            numbers += [float(x) for x in trainer.train_step()]
        lengths = {1, config.gpt.block_size}
        samples = [model.generate(np.zeros((3, n), int), 12, seed=3).tolist() for n in lengths]
        results.append((numbers, evaluations[0]["val_loss"], samples))
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(results[1][1], results[0][1], rtol=1e-4)
    assert results[1][2] == results[0][2]


def test_evaluation_and_another_trainer_do_not_disturb_training(cuda):
    def run(between=lambda trainer: None):
        with make_trainer(build_model("gpt", SHAPE, seed=1).to("cupy"), DATA, TRAIN) as trainer:
            losses = []
            for _ in range(6):
                losses += [float(x) for x in trainer.train_step()]
                between(trainer)
            return losses, cuda.to_numpy(trainer.flat.data).tobytes()

    expected = run()
    assert run(lambda trainer: trainer.evaluate()) == expected
    with make_trainer(build_model("gpt", SHAPE, seed=2).to("cupy"), DATA, TRAIN) as other:
        assert run(lambda _: (other.train_step(), other.model.generate(np.array([[1]]), 3))) == expected


def test_an_interrupt_waits_for_the_end_of_the_step(cuda, monkeypatch):
    with make_trainer(build_model("gpt", SHAPE, seed=1).to("cupy"), DATA, TRAIN) as trainer:
        update = trainer.optimizer.update
        monkeypatch.setattr(trainer.optimizer, "update", lambda *a: signal.raise_signal(signal.SIGINT) or update(*a))
        with pytest.raises(KeyboardInterrupt):
            trainer.train_step()
        assert trainer.step == 1


def test_scores_stay_when_the_next_are_made(cuda):
    cached = build_model("gpt", SHAPE, seed=1).to("cupy").cached(1)
    first = cached(np.array([[1]]))
    before = first.copy()
    cached(np.array([[2]]))
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_captured_step_gives_the_bits_of_one_that_is_not(dtype, cuda):
    runs = []
    for graph in (False, True):
        cuda.graph = graph
        numbers, trainer = trained(cuda, steps=7, dtype=dtype)
        state = (trainer.flat.data, trainer.optimizer.m, trainer.optimizer.v)
        runs.append((numbers, [cuda.to_numpy(x).tobytes() for x in state]))
    assert runs[0] == runs[1]


def test_bfloat16_trains_as_float32_does(cuda):
    (single, _), (half, trainer) = trained(cuda, steps=12), trained(cuda, steps=12, dtype="bfloat16")
    assert trainer.flat.data.dtype == np.float32
    assert single != half
    # The losses are means of 32 logarithms of probabilities, each off by a few roundings of 2**-9.
    np.testing.assert_allclose(half[:24:2], single[:24:2], atol=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_with_flash_attention(dropout, cuda):
    settings = {"steps": 6, "shape": replace(SHAPE, n_embd=64, dropout=dropout)}  # heads of 32
    settings["train"] = replace(TRAIN, learning_rate=1e-3)
    single, _ = trained(cuda, **settings)
    half, _ = trained(cuda, dtype="bfloat16", **settings)
    np.testing.assert_allclose(half[:12:2], single[:12:2], atol=0.01)


def test_bfloat16s_losses_lie_among_those_of_float32s_seeds(cuda):
    """Over 200 steps, in means of 20: no farther from the seeds' mean than a seed's own are."""

    def curve(backend, seed, dtype=None):
        numbers, _ = trained(backend, 200, dtype, train=replace(TRAIN, seed=seed))
        return np.reshape(numbers[:400:2], (10, 20)).mean(axis=1)

    seeds = np.array([curve(get_backend("numpy"), seed) for seed in range(1, 6)])
    spread = np.abs(seeds - seeds.mean(axis=0)).max()
    assert np.abs(curve(cuda, 1, "bfloat16") - seeds.mean(axis=0)).max() < spread


def test_gradient_accumulation_is_that_of_numpy(cuda):
    config = replace(TRAIN, batch_size=2, gradient_accumulation_steps=3, micro_batch_size=0)
    losses = []
    for backend in ("numpy", "cupy"):
        with make_trainer(build_model("gpt", SHAPE, seed=1).to(backend), DATA, config) as trainer:
            losses.append([float(x) for _ in range(5) for x in trainer.train_step()])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


KERNELS = (
    "add_dropout", "cross_entropy", "dropout", "embedding", "gelu", "layer_norm", "linear", "matmul", "relu",
    "scaled_dot_product_attention", "self_attention",
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.op in KERNELS], ids=str)
def test_kernels_against_finite_differences(case, cuda):
    assert_right(case, cuda)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_gives_the_tokens_of_numpy(use_cache, graph, cuda):
    cuda.graph = graph
    idx = np.array([[1, 2, 3], [4, 5, 6]])
    model = build_model("gpt", SHAPE, seed=1)
    expected = model.generate(idx, 20, use_cache=use_cache)
    np.testing.assert_array_equal(model.to("cupy").generate(idx, 20, use_cache=use_cache), expected)


def test_a_whole_run_is_that_of_numpy(cuda, cwd, monkeypatch):
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 8, "max_iters": 6, "eval_interval": 3, "eval_iters": 2}
    config = load_preset("little-shakespeare").updated({"data": "ab"} | tiny)
    runs = {}
    for backend, options in (("numpy", {}), ("cupy", {"tf32": False})):
        session = start_session(config, cwd / backend, False, Device(backend, **options))
        assert session.run() == 0
        session.folder._lock_file.close()
        log = (cwd / backend / "log.jsonl").read_text().splitlines()
        losses = [json.loads(row)[key] for row in log for key in ("train_loss", "val_loss")]
        runs[backend] = losses, (cwd / backend / "sample.txt").read_text()
    np.testing.assert_allclose(runs["cupy"][0], runs["numpy"][0], rtol=1e-5)
    assert runs["cupy"][1] == runs["numpy"][1]
    state = load_checkpoint(cwd / "cupy" / "last.safetensors").weights
    for name, weight in load_checkpoint(cwd / "numpy" / "last.safetensors").weights.items():
        np.testing.assert_allclose(state[name], weight, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_moves_between_the_backends(cuda, tmp_path):
    _, trainer = trained(cuda)
    config = Config(SHAPE, TRAIN)
    state = trainer.model.state_dict()
    moments = {name: cuda.to_numpy(getattr(trainer.optimizer, name)) for name in "mv"}
    saved = Checkpoint(config, DATA.tokenizer, state, Progress(step=4), DATA.fingerprint, moments)
    save_checkpoint(tmp_path / "last.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "last.safetensors")
    continued = []
    for backend in (get_backend("numpy"), cuda):
        with make_trainer(loaded.build_model().to(backend.name), DATA, TRAIN) as again:
            again.restore(loaded.optimizer, step=4)
            continued.append([float(x) for _ in range(2) for x in again.train_step()])
    np.testing.assert_allclose(continued[0], continued[1], rtol=1e-5)
