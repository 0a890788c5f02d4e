"""The path of `--backend cupy` without a GPU: every op, training and sampling on a stand-in for CuPy."""

import json
import sys

import numpy as np
import pytest
import strict_cupy
from cases import CASES
from strict_cupy import HostReadError, cupy, launches, no_host_reads
from test_ops import FLOATS, assert_same, cast, cotangent
from test_trainer import DATA
from tolerances import assert_close

import gpt.session
import tensorlite.backends
from gpt.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint
from gpt.config import Config, GPTConfig, TrainConfig, load_preset
from gpt.model import build_model
from gpt.session import start_session
from gpt.trainer import Trainer
from tensorlite import Tensor, get_backend, grad

# Without biases of the keys, whose gradient is rounding alone, which Adam scales up to whole steps.
SHAPE = GPTConfig(
    vocab_size=DATA.tokenizer.vocab_size, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.2, bias=True,
    qkv_bias=False,
)  # fmt: skip
TRAIN = TrainConfig(batch_size=4, micro_batch_size=2, eval_iters=2, learning_rate=1e-2, grad_clip=0.5, seed=5)


@pytest.fixture
def device(monkeypatch):
    """The CupyBackend, loaded over the stand-in as it would be over CuPy."""
    for name, module in strict_cupy.MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    for registry in ("_by_name", "_by_type"):
        monkeypatch.setattr(tensorlite.backends, registry, dict(getattr(tensorlite.backends, registry)))
    tensorlite.backends._by_name.pop("cupy", None)
    return get_backend("cupy")


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


def trained(backend, steps: int = 4):
    """Losses and norms of the steps, then the evaluation, and the trainer."""
    model = build_model("gpt", SHAPE, seed=1).to(backend.name)
    with Trainer(model, DATA, TRAIN) as trainer:
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
    with Trainer(model, DATA, TRAIN) as trainer:
        steps = []
        for _ in range(4):
            launches.clear()
            trainer.train_step()
            steps.append(list(launches))
    assert len(steps[1]) > 100
    assert steps[1] == steps[2] == steps[3]


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
    for backend in ("numpy", "cupy"):
        session = start_session(config, cwd / backend, False, backend, None)
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
        with Trainer(loaded.build_model().to(backend.name), DATA, TRAIN) as again:
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
