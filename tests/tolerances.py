"""How close two computations of the same thing must come: the one table, keyed by dtype.

A value passes if |got - expected| <= atol * s + rtol * |expected|, s the larger of 1 and the largest |expected|.
"""

import numpy as np

# (rtol, atol): some hundred roundings each, for sums of some hundred terms of order 1.
TOLERANCES = {np.dtype(np.float64): (1e-12, 1e-13), np.dtype(np.float32): (1e-5, 2e-6)}


def assert_close(got, expected, what: str = "") -> None:
    """Same dtype, same shape, and values as close as the dtype allows; integers and booleans equal."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype, f"{what}: expected dtype {expected.dtype}, got {got.dtype}"
    assert got.shape == expected.shape, f"{what}: expected shape {expected.shape}, got {got.shape}"
    rtol, atol = TOLERANCES.get(got.dtype, (0.0, 0.0))
    atol *= max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(got, expected, rtol, atol, err_msg=what)
