"""`no_grad` and `random.scope` as decorators of every kind of function: while its code runs, and at no other time."""

import asyncio
import contextlib
import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tensorlite import Tensor, no_grad, random

X = Tensor(np.ones(64, np.float32), requires_grad=True)


def recording() -> bool:
    return (X * 1).requires_grad


def draw() -> bytes:
    """The next dropout mask of the current scope, which is another each time."""
    return X.dropout(0.5).data.tobytes()


def draws(count: int, seed: int | None = None) -> list[bytes]:
    if seed is None:
        return [draw() for _ in range(count)]
    with random.scope(seed):
        return draws(count)


def run(coroutine):
    return asyncio.run(coroutine)


async def collect(values) -> list:
    return [value async for value in values]


# --- no_grad: whether ops are recorded inside, and outside between two values ---


@no_grad()
def function():
    return recording()


@no_grad()
def generator():
    yield recording()
    yield recording()


@no_grad()
async def coroutine():
    before = recording()
    await asyncio.sleep(0)
    return before, recording()


@no_grad()
async def async_generator():
    for _ in range(2):
        await asyncio.sleep(0)
        yield recording()
        await asyncio.sleep(0)


KINDS = {
    generator: inspect.isgeneratorfunction,
    coroutine: inspect.iscoroutinefunction,
    async_generator: inspect.isasyncgenfunction,
}


@pytest.mark.parametrize("decorated", KINDS, ids=lambda f: f.__name__)
def test_a_decorated_function_is_of_the_kind_it_was(decorated):
    assert [kind for kind in KINDS.values() if kind(decorated)] == [KINDS[decorated]]
    assert decorated.__wrapped__.__name__ == decorated.__name__


def test_no_grad_holds_in_every_kind():
    assert function() is False
    assert list(generator()) == [False, False]
    assert run(coroutine()) == (False, False)
    assert run(collect(async_generator())) == [False, False]
    assert recording()


@pytest.mark.parametrize("end", ["exhausted", "close", "throw", "collected", "throw within no_grad"])
def test_no_grad_does_not_hold_in_the_consumer(end):
    g = generator()
    assert not next(g)
    assert recording()
    if end == "exhausted":
        assert not next(g)
        assert recording()
        assert next(g, None) is None
    elif end == "close":
        g.close()
    elif end == "throw":
        with pytest.raises(KeyError):
            g.throw(KeyError())
    elif end == "collected":
        del g
        gc.collect()
    else:
        with pytest.raises(KeyError), no_grad():
            g.throw(KeyError())
    assert recording()


def test_a_consumer_that_records_nothing_goes_on_so():
    g = generator()
    with no_grad():
        assert not next(g)
        assert not recording()
        assert not next(g)
        assert not recording()
    assert next(g, None) is None
    assert recording()


def test_a_with_of_the_generator_s_own_stays_with_it():
    """What holds at its `yield`, and the place it has come to in it, are the generator's again at the next turn."""

    @no_grad()
    @random.scope(1)
    def g():
        yield draw()
        with no_grad(), random.scope(2):
            yield draw()
            yield draw()
        yield draw()

    before, inside = draws(2, seed=0), g()
    with random.scope(0):
        got = []
        for value in inside:
            got.append(value)
            assert recording()
            if len(got) <= 2:
                assert draw() == before[len(got) - 1]
    (a, d), (b, c) = draws(2, seed=1), draws(2, seed=2)
    assert got == [a, b, c, d]


def test_an_exception_inside_comes_out_and_ends_it():
    @no_grad()
    def fails():
        yield 1
        raise KeyError("inside")

    g = fails()
    next(g)
    with pytest.raises(KeyError, match="inside"):
        next(g)
    assert recording()
    assert next(g, "ended") == "ended"


def test_an_exception_inside_leaves_no_cycle():
    """Or arrays that its traceback names would live until the garbage collector comes."""
    gc.collect()
    gc.disable()
    try:
        g = generator()
        next(g)
        with contextlib.suppress(KeyError):
            g.throw(KeyError())
        del g
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_value_that_was_handed_out_is_not_kept():
    @no_grad()
    def g():
        yield X * 2
        yield None

    values = g()
    value = weakref.ref(next(values))
    assert value() is None


# --- a decorated generator does what it does undecorated ---


def echo(log, first):
    """Answers what is sent to it and what is thrown into it, and returns what it was told last."""
    got = first
    try:
        while got != "stop":
            try:
                got = yield ("got", got)
            except ValueError as error:
                got = str(error)
        return "returned"
    finally:
        log.append("closed")


def ignores_closing(log, first):
    try:
        yield first
    except GeneratorExit:
        log.append("asked to close")
        yield "and yet"


def delegates(log, first):
    log.append((yield from echo(log, first)))
    return "outer"


def talk(make) -> list:
    """Everything that comes of one conversation of each sort."""
    said = []

    def attempt(function, *args):
        try:
            said.append(function(*args))
        except BaseException as error:  # a generator's own too
            said.append((type(error), str(error), getattr(error, "value", None)))

    for script in (
        [("send", None), ("send", "a"), ("throw", ValueError("b")), ("send", "stop"), ("send", "late")],
        [("send", None), ("throw", KeyError("k")), ("send", "late")],
        [("send", None), ("throw", StopIteration("odd"))],
        [("send", None), ("close",), ("send", "late")],
        [("send", "too early"), ("send", None), ("throw", KeyError("k"))],
        [("close",), ("send", None)],
        [("throw", KeyError("first"))],
    ):
        log = []
        g = make(log, "first")
        for method, *args in script:
            attempt(getattr(g, method), *args)
        said.append(log)
    return said


@pytest.mark.parametrize("function", [echo, ignores_closing, delegates])
@pytest.mark.parametrize("decorator", [no_grad(), random.scope(1)], ids=["no_grad", "scope"])
def test_a_generator_talks_as_undecorated(function, decorator):
    def outer(*args):
        return (yield from decorator(function)(*args))

    expected = talk(function)
    assert talk(decorator(function)) == expected
    assert talk(outer) == expected


def test_an_async_generator_talks_as_undecorated():
    log = []

    async def answers():
        got = None
        try:
            while got != "stop":
                await asyncio.sleep(0)
                try:
                    got = yield got, recording()
                except ValueError as error:
                    got = str(error)
                    await asyncio.sleep(0)
        finally:
            await asyncio.sleep(0)
            log.append(("closed", recording()))

    async def talk(make):
        said, g = [], make()
        said += [await g.asend(None), await g.asend("a"), await g.athrow(ValueError("b"))]
        with pytest.raises(StopAsyncIteration):
            await g.asend("stop")
        for leave in (lambda g: g.athrow(KeyError("k")), lambda g: g.aclose()):
            g = make()
            await g.asend(None)
            try:
                await leave(g)
            except KeyError as error:
                said.append(str(error))
            assert recording()
        return said

    def heard(make):
        log.clear()
        return [value if isinstance(value, str) else value[0] for value in run(talk(make))], [*log]

    plain, plain_log = heard(answers)
    decorated, decorated_log = heard(no_grad()(answers))
    assert decorated == plain
    assert plain_log == [("closed", True)] * 3
    assert decorated_log == [("closed", False)] * 3
    assert recording()


def test_an_async_generator_left_half_way_is_closed_by_the_loop():
    closed = []

    @no_grad()
    async def g():
        try:
            yield recording()
        finally:
            await asyncio.sleep(0)
            closed.append(recording())

    async def leave():
        async for _ in g():
            break
        gc.collect()
        await asyncio.sleep(0.01)
        return recording()

    assert run(leave())
    assert closed == [False]


def test_coroutines_side_by_side_keep_to_themselves():
    async def recorder():
        seen = []
        for _ in range(4):
            seen.append(recording())
            await asyncio.sleep(0)
        return seen

    @random.scope(7)
    async def drawer(count):
        got = []
        for _ in range(count):
            got.append(draw())
            await asyncio.sleep(0)
        return got

    async def cancelled():
        task = asyncio.ensure_future(no_grad()(recorder)())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return recording()

    async def all_of_them():
        return await asyncio.gather(recorder(), no_grad()(recorder)(), recorder(), drawer(3), drawer(4), cancelled())

    plain, off, again, three, four, after = run(all_of_them())
    assert plain == again == [True] * 4
    assert off == [False] * 4
    assert three == draws(3, seed=7)
    assert four == draws(4, seed=7)
    assert after
    assert recording()


# --- random.scope ---


@random.scope(3)
def three_draws():
    return draws(3)


@random.scope(3)
def drawing():
    for _ in range(3):
        yield draw()


def test_each_call_begins_the_scope_anew():
    expected = draws(3, seed=3)
    assert three_draws() == three_draws() == expected
    assert list(drawing()) == list(drawing()) == expected
    assert len(set(expected)) == 3


def test_each_call_begins_anew_also_within_another_and_in_threads():
    scope = random.scope(3)

    @scope
    def recursive(depth):
        before = draw()
        inner = recursive(depth - 1) if depth else []
        return [(before, draw()), *inner]

    expected = tuple(draws(2, seed=3))
    assert recursive(3) == [expected] * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(recursive, [2] * 16)) == [[expected] * 3] * 16
    with scope:  # the decorator's own is none of those
        assert draw() == expected[0]
        assert recursive(1) == [expected] * 2
        assert draw() == expected[1]


def test_two_generators_and_their_consumer_draw_each_their_own():
    theirs, own = draws(3, seed=3), draws(6, seed=0)
    with random.scope(0):
        first, second = drawing(), drawing()
        got = [(a, draw(), b, draw()) for a, b in zip(first, second, strict=True)]
    assert [a for a, _, _, _ in got] == [b for _, _, b, _ in got] == theirs
    assert [value for row in got for value in (row[1], row[3])] == own


def test_a_generator_may_be_resumed_by_another_thread():
    g, own = drawing(), draws(2, seed=0)
    with random.scope(0), ThreadPoolExecutor(1) as pool:
        got = [next(g), pool.submit(next, g).result()]
        assert [draw(), draw()] == own
        assert pool.submit(recording).result()
        got.append(next(g))
    assert got == draws(3, seed=3)


def test_a_scope_entered_twice_begins_twice_and_ends_once():
    outside, scope = random.current(), random.scope(4)
    first, second = draws(2, seed=4)
    for _ in range(2):
        with scope:
            assert (draw(), draw()) == (first, second)
    with scope:
        assert draw() == first
        with scope:
            assert draw() == first
        assert random.current() is scope
    assert random.current() is outside


def test_methods_and_arguments_pass_through():
    class Sampler:
        @no_grad()
        def sample(self, n, *, by=1):
            """Doc."""
            for i in range(n):
                yield i * by, recording()

        @staticmethod
        @random.scope(3)
        def still(n):
            return draws(n)

    assert list(Sampler().sample(3, by=2)) == [(0, False), (2, False), (4, False)]
    assert Sampler.sample.__doc__ == "Doc."
    assert Sampler.still(2) == draws(2, seed=3)
