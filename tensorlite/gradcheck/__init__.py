"""Gradient checks by finite differences, for the ops here and for anyone's own.

    from tensorlite import gradcheck
    gradcheck(lambda x, w: (x @ w).tanh(), x, w)

The function is evaluated in float64. Its outputs are multiplied by fixed random numbers and summed, so that one scalar
stands for the whole Jacobian. For every element of a small input the gradient that the backward pass gives is held
against a difference quotient that knows its own error (quotient.py). Large inputs are checked along random directions,
and when one disagrees bisection leads to the element (directions.py). Every vjp on the way is watched (backward.py).
"""

from tensorlite.gradcheck.report import Element, GradcheckError, KinkError, Report, UndecidedWarning

__all__ = ["Element", "GradcheckError", "KinkError", "Report", "UndecidedWarning", "check", "gradcheck"]


def gradcheck(fn, *inputs, **options) -> bool:
    """Check the gradients of `fn` at `inputs`; True, or a GradcheckError that says what is wrong.

    fn: a function, or a Module, whose parameters are checked by their names and left as they were. It returns a Tensor
        of any shape, or a tuple, list or dict of some. It must compute the same thing each time (put random ops into a
        `random.scope`) and have a derivative at the inputs.
    inputs: arrays, Tensors and floats, alone or in tuples, lists and dicts: they are checked. Modules: their parameters
        are. Integers and all else are passed on as they are, but arrays of integers and booleans as Tensors.
    kwargs: a dict of keyword arguments for `fn`, treated as the inputs are.
    rtol, atol: a gradient g is right if |g - expected| <= atol + rtol * |expected| and what the estimated error of
        `expected`, a difference quotient, and rounding allow. Defaults: 1e-7 and 0.
    dtype: of the gradients. With "float32", or "bfloat16" where the backend has it, the gradients in that dtype are
        held against the float64 function; tolerances are four times its eps and the root of the number of terms.
    step: the largest step, for a function that may not be evaluated far from the inputs; without it a quarter of an
        element, or of 1 if that is larger.
    backend: where to run it. seed: of the random numbers.

    An input of more than 2000 elements is checked along directions. A gradient that changes the result by less than a
    hundred of its roundings cannot be told from 0. Where the quotient is not good enough to tell right from wrong, an
    UndecidedWarning says so. KinkError: there is no derivative here.
    """
    report = check(fn, *inputs, **options)
    if report.error:
        raise report.error
    if report.undecided:
        import warnings  # here, as all that only a check needs: whoever trains does not wait for it

        warnings.warn(report.doubt(), UndecidedWarning, stacklevel=2)
    return True


def check(fn, *inputs, **options) -> Report:
    """As `gradcheck`, but the result is a Report, with the error that `gradcheck` would raise in it."""
    from tensorlite.gradcheck.compare import check

    return check(fn, *inputs, **options)
