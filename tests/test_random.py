"""Random streams: against Philox by hand."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tensorlite as tl
from tensorlite import Tensor, random


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10 as in the paper (Salmon et al. 2011, section 3.3), in Python's integers."""
    low = 2**64 - 1
    for _ in range(10):
        p, q = counter[0] * 0xD2E7470EE14C6C93, counter[2] * 0xCA5A826395121157
        counter = [(q >> 64) ^ counter[1] ^ key[0], q & low, (p >> 64) ^ counter[3] ^ key[1], p & low]
        key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
    return counter


def test_the_words_are_philox():
    """The published answer for zeros, and the mapping of a place to counter and key."""
    answer = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0, 0, 0, 0], [0, 0]) == answer
    seed, stream, step, call, block = 2**62 + 11, 2, 5, 7, 3
    expected = philox4x64([block + 1, call, step, 0], [seed, stream])  # NumPy counts up before it draws
    assert random.philox(seed, stream, step, call, block).random_raw(4).tolist() == expected
    words = np.array(expected, "<u8").view("<u2")
    np.testing.assert_array_equal(random.bits16(random.Place(seed, stream, step, call, 16 * block), 16), words)


@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 16), (15, 2), (16, 16), (37, 60), (63, 1), (99, 1), (5, 0)])
def test_bits_at_an_offset_are_a_slice_of_the_whole(start, count):
    whole = random.bits16(random.Place(1, random.DROPOUT, 2, 3, 0), 100)
    part = random.bits16(random.Place(1, random.DROPOUT, 2, 3, start), count)
    assert part.dtype == np.uint16
    np.testing.assert_array_equal(part, whole[start : start + count])


def mask(x, **scope):
    with random.scope(**{"seed": 0} | scope):
        return tl.dropout(x, 0.5).numpy()


def test_micro_batches_see_the_mask_of_the_whole_batch(backend):
    x = Tensor(backend.asarray(np.ones((8, 3, 7), np.float32)))
    whole = mask(x)
    for start, stop in ((0, 8), (0, 3), (3, 4), (5, 8)):
        np.testing.assert_array_equal(mask(x[start:stop], first_row=start), whole[start:stop])


def test_masks_differ_between_seeds_steps_and_calls():
    x = Tensor(np.ones((8, 8), np.float32))
    with random.scope(0):
        calls = [x.dropout(0.5).numpy() for _ in range(2)]
    masks = [*calls, mask(x, seed=1), mask(x, step=1)]
    np.testing.assert_array_equal(calls[0], mask(x))
    assert len({m.tobytes() for m in masks}) == len(masks)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share(p):
    n = 100_000
    y = tl.dropout(np.ones(n), p).numpy()
    assert abs((y != 0).mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert y.max() == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))  # p is rounded to a multiple of 2**-16


def test_manual_seed_repeats():
    x = Tensor(np.ones(64, np.float32))
    tl.manual_seed(3)
    first, second = (x.dropout(0.5).numpy() for _ in range(2))
    tl.manual_seed(3)
    np.testing.assert_array_equal(x.dropout(0.5).numpy(), first)
    np.testing.assert_array_equal(x.dropout(0.5).numpy(), second)
    assert (first != second).any()


def test_scopes_nest_and_survive_an_exception():
    default = random.current()
    with random.scope(1) as outer:
        x = Tensor(np.ones(4))
        x.dropout()
        with pytest.raises(KeyError), random.scope(2):
            raise KeyError
        assert random.current() is outer
        assert outer.calls == 1
    assert random.current() is default


def test_a_scope_holds_for_its_thread_only():
    x = Tensor(np.ones(64))
    with random.scope(1) as scope, ThreadPoolExecutor(1) as pool:
        assert pool.submit(random.current).result() is not scope
        np.testing.assert_array_equal(pool.submit(mask, x, seed=5).result(), mask(x, seed=5))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_philox_cannot_take_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed must be from 0 to 2\\*\\*63 - 1, got {seed}"):
        tl.manual_seed(seed)


def test_a_scope_without_a_seed_draws_nothing():
    """Its layers wait for their values; the scope around it goes on as if it had not been there."""
    with random.scope(3):
        with random.scope(None):
            waiting = [tl.nn.Linear(3, 2), tl.nn.Linear(3, 2, std=1.0), tl.nn.Embedding(3, 2)]
        drawn = tl.randn(4)
    for parameter in (layer.weight for layer in waiting):
        assert parameter.dtype == np.float32
        assert not parameter.data.any()
        assert not parameter.data.flags.writeable
    with random.scope(3):
        np.testing.assert_array_equal(tl.randn(4).data, drawn.data)
