"""The CPU backend: NumPy, with the kernels where the portable version would be slow or cannot be written."""

import math

import numpy as np

from tensorlite.backends.base import Backend

# The upper tail of the normal distribution, 1 - Phi(z) = exp(-z^2 / 2) * Q(1 / (1 + R z)) for z >= 0 with a
# polynomial Q (the form of Abramowitz & Stegun 7.1.26). R and Q, highest power first, were fitted to minimise the
# largest error; it is below float32's own rounding.
_TAIL_R = 0.325
_TAIL_Q = (-0.1241046225, 0.4513605812, -0.2015366106, 0.2763783176, 0.09443150051, 0.003470725299)


class NumpyBackend(Backend):
    name = "numpy"
    xp = np

    def to_numpy(self, x):
        return x

    def check_ids(self, ids, size, op, ignore=None):
        if ignore is not None:
            ids = ids[ids != ignore]
        if ids.size and (ids.min() < 0 or ids.max() >= size):
            wrong = int(ids.min() if ids.min() < 0 else ids.max())
            raise IndexError(f"{op}: id {wrong} is out of range; the {size} ids go from 0 to {size - 1}")

    def erf(self, x):
        # float64 is for checking, not for speed: the C library's own function, one element at a time.
        return np.asarray(np.frompyfunc(math.erf, 1, 1)(x)).astype(x.dtype)

    def gelu(self, x, need_slope):
        if x.dtype != np.float32 or x.ndim == 0:  # NumPy makes a 0-d product a scalar, which `out` does not take
            return super().gelu(x, need_slope)
        density = x * x
        density *= -0.5
        np.exp(density, out=density)
        t = np.abs(x)
        t *= _TAIL_R
        t += 1.0
        np.reciprocal(t, out=t)
        cdf = t * _TAIL_Q[0]
        cdf += _TAIL_Q[1]
        for coefficient in _TAIL_Q[2:]:
            cdf *= t
            cdf += coefficient
        cdf *= density  # the tail beyond |x|
        np.subtract(0.5, cdf, out=cdf)
        np.copysign(cdf, x, out=cdf)
        cdf += 0.5
        slope = None
        if need_slope:
            density *= x
            density *= 1 / math.sqrt(2 * math.pi)
            slope = np.add(density, cdf, out=density)
        return np.multiply(x, cdf, out=cdf), slope

    def embedding_vjp(self, gy, ids, rows):
        if rows <= 512:  # a one-hot product is the fastest for a small table
            return super().embedding_vjp(gy, ids, rows)
        order = np.argsort(ids, axis=None, kind="stable")
        used, starts = np.unique(ids.reshape(-1)[order], return_index=True)
        gweight = np.zeros((rows, gy.shape[-1]), gy.dtype)
        if used.size:
            gweight[used] = np.add.reduceat(gy.reshape(-1, gy.shape[-1])[order], starts, axis=0)
        return gweight
