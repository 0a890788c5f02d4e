"""The path of `--backend cupy` without a GPU: every op, training and sampling on a stand-in for CuPy."""

import json
from dataclasses import replace

import numpy as np
import pytest
from cases import CASES
from strict_cuda import HostReadError, MisuseError, logged, no_host_reads
from strict_cupy import cupy
from test_ops import FLOATS, assert_same, cast, cotangent
from test_trainer import DATA
from tolerances import assert_close

import gpt.session
from gpt.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from gpt.config import Config, GPTConfig, TrainConfig, load_preset
from gpt.device import Device
from gpt.device_trainer import DeviceTrainer
from gpt.model import build_model
from gpt.session import start_session
from gpt.trainer import Trainer
from tensorlite import Tensor, backend_of, get_backend, grad, gradcheck
from tensorlite.backends.replay import WARM_UP

# Without biases of the keys, whose gradient is rounding alone, which Adam scales up to whole steps.
SHAPE = GPTConfig(
    vocab_size=DATA.tokenizer.vocab_size, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.2, bias=True,
    qkv_bias=False,
)  # fmt: skip
TRAIN = TrainConfig(batch_size=4, micro_batch_size=2, eval_iters=2, learning_rate=1e-2, grad_clip=0.5, seed=5)


# --- the backend ---


def compute(case, dtype, backend):
    """The op's result and gradients, computed without a look at them and then brought to the host."""
    given = [backend.asarray(a) for a in cast(case.arrays(), dtype)]
    with no_host_reads():
        tensors = [Tensor(a, requires_grad=a.dtype.kind == "f") for a in given]
        y = case.fn(*tensors)
        gy = backend.asarray(cotangent(y), y.dtype)
        gradients = grad(y, [t for t in tensors if t.requires_grad], gy)
    return [backend.to_numpy(a) for a in (y.data, *gradients)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}: {case.id}")
def test_every_op_is_that_of_numpy(case, dtype, device):
    expected = compute(case, dtype, get_backend("numpy"))
    if case.op == "getitem" and "mask" in case.id:
        with pytest.raises(HostReadError):  # how long the result is depends on the mask's values
            compute(case, dtype, device)
        return
    assert_same(compute(case, dtype, device), expected)


def make_trainer(model, *args):
    on_device = backend_of(model.token_table.data).name == "cupy"
    return (DeviceTrainer if on_device else Trainer)(model, *args)


def trained(backend, steps: int = 4, dtype: str | None = None, shape=SHAPE, train=TRAIN):
    """Losses and norms of the steps, then the evaluation, and the trainer."""
    model = build_model("gpt", shape, seed=1).to(backend.name)
    model.compute_dtype = dtype and backend.dtype(dtype)
    with make_trainer(model, DATA, train) as trainer:
        numbers = []
        for _ in range(steps):
            with no_host_reads():
                step = trainer.train_step()
            numbers += [float(x) for x in step]
        evaluation = trainer.evaluate()
    return [*numbers, *vars(evaluation).values()], trainer


def test_training_gives_the_losses_of_numpy_and_reads_nothing_back(device):
    expected, ours = trained(get_backend("numpy"))
    got, theirs = trained(device)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)  # the standard errors are differences of losses
    assert_close(device.to_numpy(theirs.flat.data), ours.flat.data)


def test_every_step_launches_the_same(device):
    model = build_model("gpt", SHAPE, seed=1).to("cupy")
    device.graph = False
    with make_trainer(model, DATA, TRAIN) as trainer:
        steps = []
        for _ in range(4):
            with logged() as launches:
                trainer.train_step()
            steps.append(launches)
    assert len(steps[1]) > 100
    assert {"gemm_ex", "attention_softmax", "layer_norm_vjp", "dropout_mask", "adamw_step"} <= {x[0] for x in steps[1]}
    assert steps[1] == steps[2] == steps[3]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_recorded_step_gives_the_bits_of_one_that_is_not(dtype, device):
    runs = []
    for graph in (False, True):
        device.graph = graph
        with logged() as launches:
            numbers, trainer = trained(device, steps=7, dtype=dtype)
        state = (trainer.flat.data, trainer.optimizer.m, trainer.optimizer.v)
        runs.append((numbers, [device.to_numpy(x).tobytes() for x in state]))
        # Four of the seven steps, and one of the four batches that are evaluated, come after the warm-up.
        assert sum(launch[0] == "graph" for launch in launches) == (5 if graph else 0)
    assert runs[0] == runs[1]


def test_bfloat16_trains_as_float32_does(device):
    (single, _), (half, trainer) = trained(device, steps=12), trained(device, steps=12, dtype="bfloat16")
    assert trainer.flat.data.dtype == np.float32
    assert single != half
    # The losses are means of 32 logarithms of probabilities, each off by a few roundings of 2**-9.
    np.testing.assert_allclose(half[:24:2], single[:24:2], atol=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_with_flash_attention(dropout, device):
    settings = {"steps": 6, "shape": replace(SHAPE, n_embd=64, dropout=dropout)}  # heads of 32
    settings["train"] = replace(TRAIN, learning_rate=1e-3)
    single, _ = trained(device, **settings)
    with logged() as launches:
        half, _ = trained(device, dtype="bfloat16", **settings)
    assert {"flash_attention", "flash_attention_gq", "flash_attention_gkv"} <= {launch[0] for launch in launches}
    np.testing.assert_allclose(half[:12:2], single[:12:2], atol=0.01)


def test_gradient_accumulation_is_that_of_numpy(device):
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


@pytest.mark.parametrize("case", [c for c in CASES if c.op in KERNELS], ids=lambda case: f"{case.op}: {case.id}")
def test_kernels_against_finite_differences(case, device):
    assert gradcheck(case.fn, *case.arrays(), backend="cupy")


@pytest.mark.parametrize("use_cache", [True, False])
def test_sampling_gives_the_tokens_of_numpy(use_cache, device):
    idx = np.array([[1, 2, 3], [4, 5, 6]])
    model = build_model("gpt", SHAPE, seed=1)
    expected = model.generate(idx, 20, use_cache=use_cache)
    np.testing.assert_array_equal(model.to("cupy").generate(idx, 20, use_cache=use_cache), expected)


def test_a_whole_run_is_that_of_numpy(device, cwd, monkeypatch):
    monkeypatch.setattr(gpt.session, "interrupt_on_terminate", lambda: None)  # this process is pytest's
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


def test_a_checkpoint_moves_between_the_backends(device, tmp_path):
    _, trainer = trained(device)
    config = Config(SHAPE, TRAIN)
    state = trainer.model.state_dict()
    moments = {name: device.to_numpy(getattr(trainer.optimizer, name)) for name in "mv"}
    saved = Checkpoint(config, DATA.tokenizer, state, Progress(step=4), DATA.fingerprint, moments)
    save_checkpoint(tmp_path / "last.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "last.safetensors")
    continued = []
    for backend in (get_backend("numpy"), device):
        with make_trainer(loaded.build_model().to(backend.name), DATA, TRAIN) as again:
            again.restore(loaded.optimizer, step=4)
            continued.append([float(x) for _ in range(2) for x in again.train_step()])
    np.testing.assert_allclose(continued[0], continued[1], rtol=1e-5)


# --- the stand-in ---


def device_array(*values):
    return cupy.asarray(np.array(values, np.float32))


@pytest.mark.parametrize(
    ("misuse", "error"),
    [
        (lambda x: x + np.ones(2, np.float32), TypeError),
        (lambda x: np.ones(2, np.float32) + x, TypeError),
        (lambda x: cupy.add(x, np.ones(2)), TypeError),
        (lambda x: x[np.array([0])], TypeError),
        (lambda x: np.exp(x), TypeError),
        (lambda x: np.asarray(x), TypeError),
        (lambda x: np.concatenate([x, x]), TypeError),
        (lambda x: cupy.vecdot(x, x), AttributeError),
        (lambda x: x.tobytes_in_c, AttributeError),
        (lambda x: x.__setitem__(cupy.asarray([0, 0]), 1.0), ValueError),
        *((read, HostReadError) for read in (
            float, bool, lambda x: x.item(), lambda x: x.get(), lambda x: x[x > 0], lambda x: cupy.asnumpy(x),
            lambda x: cupy.nonzero(x), lambda x: x.tolist(),
        )),
    ],
)  # fmt: skip
def test_the_stand_in_refuses(misuse, error):
    with no_host_reads(), pytest.raises(error):
        misuse(device_array(1.0, 2.0))


def test_the_stand_in_allows():
    x = device_array(1.0, 2.0)
    assert isinstance(x.sum(), type(x))  # a 0-d array, not a number
    assert x.sum().shape == ()
    assert np.isnan(cupy.empty(3, np.float32).get()).all()
    x += 1
    x[cupy.asarray([1, 0])] = x.copy()
    assert cupy.asnumpy(x).tolist() == [3.0, 2.0]
    assert float(x[0]) == 3.0


# What a recording cannot hold.
RECORDING = {
    "reading back": (lambda x: float(x.sum()), HostReadError),
    "bringing values": (lambda x: x + cupy.asarray(np.ones(2, np.float32)), MisuseError),
    "uploading": (lambda x: x.set(np.ones(2, np.float32)), MisuseError),
    "CuPy's own products": (lambda x: cupy.matmul(x, x), MisuseError),
    "the sum of products": (lambda x: x.dot(x), MisuseError),
    "an array that lives on": (lambda x: kept_arrays.append(x + 1), MisuseError),
    "another stream": (lambda x: on_another_stream(x), MisuseError),
    "synchronising": (lambda x: cupy.cuda.get_current_stream().synchronize(), HostReadError),
}
kept_arrays = []


def on_another_stream(x):
    with cupy.cuda.Stream(non_blocking=True):
        x += 1


@pytest.mark.parametrize("name", RECORDING)
def test_a_recording_refuses(name, device):
    misuse, error = RECORDING[name]
    x, calls = device_array(1.0, 2.0), []

    def function():
        calls.append(None)
        if len(calls) > WARM_UP:
            misuse(x)

    replay = device.replayable(function)
    for _ in range(WARM_UP):
        replay()
    with pytest.raises(error):
        replay()
    kept_arrays.clear()


def test_memory_of_the_common_pool_is_not_recorded(device):
    stream, x = cupy.cuda.Stream(non_blocking=True), device_array(1.0)
    with stream:
        stream.begin_capture()
        with pytest.raises(MisuseError, match="common pool"):
            x + 1
        stream.end_capture()


def test_a_replay_does_what_was_recorded_to_what_is_there_now(device):
    x, y = device_array(1.0, 2.0), device_array(0.0, 0.0)

    def function():
        y[...] = (x * 2)[::-1]
        y.__iadd__(x)

    replay = device.replayable(function)
    for i in range(6):
        x.set(np.array([i, 10], np.float32))
        replay()
        assert y.get().tolist() == [20 + i, 2 * i + 10]
