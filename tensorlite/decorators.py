"""Settings of a thread as decorators: of functions, and of those that stop midway and go on later.

A generator hands its thread back to its consumer at each `yield`, a coroutine to the event loop at each `await`. A
`with` inside it would go on holding there. A decorated one holds while its own code runs and at no other time.
"""

import functools
import inspect
import threading
import types


class Decorator:
    """Base of a context manager that changes `local`, values of the thread, and that is a decorator too."""

    local: threading.local  # holds nothing that is changed in place: what is in it is put away and put back

    def fresh(self) -> "Decorator":
        """The context manager for one call of a decorated function."""
        return self

    def __call__(self, function):
        if inspect.isgeneratorfunction(function):

            def within(*args, **kwargs):
                return (yield from _drive(function(*args, **kwargs), _Turns(self.fresh())))

        elif inspect.iscoroutinefunction(function):

            async def within(*args, **kwargs):
                return await _drive(function(*args, **kwargs), _Turns(self.fresh()))

        elif inspect.isasyncgenfunction(function):

            async def within(*args, **kwargs):
                inner, turns = function(*args, **kwargs), _Turns(self.fresh())
                resume, given = inner.asend, None
                while True:
                    try:
                        out = [await _drive(resume(given), turns)]
                    except StopAsyncIteration:
                        return
                    finally:
                        given = None
                    try:
                        resume, given = inner.asend, (yield out.pop())
                    except BaseException as error:
                        resume, given = inner.athrow, error

        else:

            def within(*args, **kwargs):
                with self.fresh():
                    return function(*args, **kwargs)

        return functools.wraps(function)(within)


class _Turns:
    """Around each turn of what runs by turns with its caller: within, the thread's values are those that it left
    behind when its last turn ended, after it those of the caller."""

    def __init__(self, context: Decorator):
        self.context, self.own = context, None

    def __enter__(self):
        values = vars(self.context.local)
        self.callers = dict(values)
        if self.own is None:
            self.context.__enter__()
        else:
            values.clear()
            values.update(self.own)

    def __exit__(self, *exc):
        values = vars(self.context.local)
        self.own = dict(values)
        values.clear()
        values.update(self.callers)


@types.coroutine
def _drive(inner, turns: _Turns):
    """`yield from inner` (or `await inner`) that takes each step of it within `turns`."""
    resume, given = inner.send, None
    while True:
        try:
            with turns:
                out = [resume(given)]
        except StopIteration as stop:
            return stop.value
        finally:
            given = None  # an exception's traceback refers to this frame: a cycle, if it referred to the exception
        try:
            resume, given = inner.send, (yield out.pop())  # popped, or this frame would keep the value alive
        except BaseException as error:  # GeneratorExit too: what the inner one makes of it is then what this one does
            resume, given = inner.throw, error
