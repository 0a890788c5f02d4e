"""The stand-in for CuPy: what it refuses, and what its log of launches says of a step."""

import threading
import types
from dataclasses import replace

import numpy as np
import pytest
import strict_cuda
from cases import CASES
from strict_cuda import HostReadError, MisuseError, logged, no_host_reads
from strict_cupy import cupy
from test_cupy import SHAPE, TRAIN, make_trainer, trained
from test_ops import cotangent
from test_trainer import DATA

from gpt.models.kinds import build_model
from tensorlite import Tensor, get_backend, grad
from tensorlite.backends.cuda.replay import WARM_UP
from tensorlite.backends.cuda.uploads import BUFFERS

# --- what the steps launch ---


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_op_waits_for_the_device(case, device):
    tensors = [Tensor(device.asarray(a), requires_grad=a.dtype.kind == "f") for a in case.arrays()]
    if case.op == "getitem" and "mask" in case.id:
        with no_host_reads(), pytest.raises(HostReadError):  # how long the result is depends on the mask's values
            case.fn(*tensors)
        return
    with no_host_reads():
        y = case.fn(*tensors)
        grad(y, [t for t in tensors if t.requires_grad], device.asarray(cotangent(y), y.dtype))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("n_embd", [16, 64])  # with heads of 8, and of 32 as flash attention takes
def test_every_step_launches_the_same_and_reads_nothing_back(n_embd, dtype, device):
    model = build_model("gpt", replace(SHAPE, n_embd=n_embd), seed=1).to("cupy")
    model.compute_dtype = dtype and device.dtype(dtype)
    device.graph = False
    with make_trainer(model, DATA, TRAIN) as trainer:
        steps = []
        for _ in range(4):
            with logged() as launches, no_host_reads():
                trainer.train_step()
            steps.append(launches)
    assert len(steps[1]) > 100
    fused = {"flash_attention", "flash_attention_delta", "flash_attention_vjp"}
    unfused = {"attention_softmax", "attention_softmax_vjp"}
    attention = fused if dtype and n_embd == 64 else unfused
    common = {
        "gather_blocks",
        "gemm_ex",
        "layer_norm_vjp",
        "dropout_mask",
        "draw_dropout",
        "cross_entropy",
        "adamw_step",
        "sum_squares",
    }
    assert common | attention <= {launch[0] for launch in steps[1]}
    assert steps[1] == steps[2] == steps[3]


def graphs_launched(launches) -> int:
    return sum(launch[0] == "graph" for launch in launches)


def test_steps_evaluation_and_decoding_are_replayed(device):
    with logged() as launches:
        _, trainer = trained(device, steps=7)
    assert graphs_launched(launches) == 5  # four of the seven steps, and one of the four batches that are evaluated
    with logged() as launches:
        trainer.model.generate(np.array([[1, 2]]), 6)
    assert graphs_launched(launches) == 2  # the first of six reads two tokens, the next three warm up
    device.graph = False
    with logged() as launches:
        trained(device, steps=7)
        trainer.model.generate(np.array([[1, 2]]), 6)
    assert graphs_launched(launches) == 0


# --- the stand-in ---


def device_array(*values):
    return cupy.asarray(np.array(values, np.float32))


def pinned(*values, shape=()):
    array = np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * len(values)), np.float32).reshape(shape)
    array[...] = np.reshape(values, shape)
    return array


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


# What a capture cannot hold.
UNCAPTURED = {
    "reading back": (lambda x: float(x.sum()), HostReadError),
    "bringing values": (lambda x: x + cupy.asarray(np.ones(2, np.float32)), MisuseError),
    "uploading": (lambda x: get_backend("cupy").upload(x, 1), MisuseError),
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


@pytest.mark.parametrize("name", UNCAPTURED)
def test_a_capturing_refuses(name, device):
    misuse, error = UNCAPTURED[name]
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


def test_memory_of_the_common_pool_is_not_captured(device):
    stream, x = cupy.cuda.Stream(non_blocking=True), device_array(1.0)
    with stream:
        stream.begin_capture()
        with pytest.raises(MisuseError, match="common pool"):
            x + 1
        stream.end_capture()


def test_a_replay_does_what_was_captured_to_what_is_there_now(device):
    x, y = device_array(1.0, 2.0), device_array(0.0, 0.0)

    def function():
        y[...] = (x * 2)[::-1]
        y.__iadd__(x)

    replay = device.replayable(function)
    for i in range(6):
        device.upload(x, [i, 10])
        replay()
        assert y.get().tolist() == [20 + i, 2 * i + 10]


@pytest.mark.parametrize("call", [1, WARM_UP + 1])  # the latter is captured
def test_a_replay_takes_what_lies_idle_in_the_common_pool(call, device, monkeypatch):
    monkeypatch.setattr(strict_cuda, "device", types.SimpleNamespace(free=10_000))
    calls, sums = [], device_array(0.0)

    def function():
        calls.append(None)
        ones = cupy.ones(2000 if len(calls) >= call else 200, np.float32)  # 8000 bytes
        sums.__iadd__(ones.sum())

    replay = device.replayable(function)
    cupy.zeros(1900, np.float32)  # so many bytes that lie idle from here on
    for _ in range(WARM_UP + 2):
        replay()
    assert sums.get() == 200 * (call - 1) + 2000 * (WARM_UP + 3 - call)


def test_a_replay_that_needs_too_much_runs_out_of_memory(device, monkeypatch):
    monkeypatch.setattr(strict_cuda, "device", types.SimpleNamespace(free=10_000))
    with pytest.raises(strict_cuda.OutOfMemoryError):
        device.replayable(lambda: cupy.ones(3000, np.float32))()


def test_two_threads_do_not_get_into_each_others_graph(device):
    x, y, captured, launched = device_array(0.0), device_array(0.0), threading.Event(), threading.Event()

    def function():
        x.__iadd__(1)
        if strict_cuda.is_capturing():
            captured.set()
            launched.wait(0.2)

    def other():
        captured.wait()
        increase()
        launched.set()

    replay, increase = device.replayable(function), device.replayable(lambda: y.__iadd__(1))
    thread = threading.Thread(target=other)
    thread.start()
    for _ in range(WARM_UP + 2):
        replay()
    thread.join()
    assert (x.get(), y.get()) == (WARM_UP + 2, 1)


def test_a_stream_may_be_entered_within_itself():
    outer, stream = cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)
    with stream, stream:
        assert cupy.cuda.get_current_stream() is stream
    assert cupy.cuda.get_current_stream() is outer


@pytest.mark.parametrize("use", [lambda x: x + 1, lambda x: x.set(pinned(0)), float])
def test_a_stream_waits_for_the_work_of_another(use, device):
    x, stream = cupy.asarray(np.array(1, np.float32)), cupy.cuda.Stream(non_blocking=True)
    x += 1
    with stream, pytest.raises(MisuseError, match="another stream may still work on"):
        use(x)
    stream.wait_event(cupy.cuda.get_current_stream().record())
    with stream:
        x *= 2
    with pytest.raises(MisuseError, match="another stream may still work on"):
        use(x)
    cupy.cuda.get_current_stream().wait_event(stream.record())
    assert float(x) == 4.0


# --- uploads ---


def overwritten(x, values):
    x.set(values)
    values += 1
    x.get()


def used_again(x, values):
    x.set(values)
    x.set(values)


def given_back(x, values):
    x.set(values)
    del values
    x.get()


def waited_for_too_early(x, values):
    copied = cupy.cuda.get_current_stream().record()
    x.set(values)
    copied.synchronize()
    x.set(values)


@pytest.mark.parametrize(
    ("misuse", "said"),
    [
        (lambda x, values: x.set(np.ones(2, np.float32)), "pageable"),
        (overwritten, "written to while"),
        (used_again, "used again"),
        (lambda x, values: given_back(x, pinned(1, 2, shape=2)), "given back"),
        (waited_for_too_early, "used again"),
    ],
)
def test_a_copy_from_the_host_reads_what_is_still_there(misuse, said, device):
    x = device_array(1.0, 2.0)
    with pytest.raises(MisuseError, match=said):
        misuse(x, pinned(3, 4, shape=2))
    strict_cuda.forget_copies()
    values = pinned(3, 4, shape=2)
    for _ in range(2):
        x.set(values)
        x.get()
        values += 1


def test_uploads_wait_only_for_a_buffer_to_come_free(device):
    arrays = [cupy.zeros(shape, np.int64) for shape in ((), (2,), (3, 2))]
    for i in range(3 * BUFFERS):
        device.upload(arrays[i % 3], i)
        arrays[i % 3] += 1
    last = [3 * BUFFERS - 3, 3 * BUFFERS - 2, 3 * BUFFERS - 1]
    assert [set(np.ravel(x.get())) for x in arrays] == [{i + 1} for i in last]
