"""ATen's layer norm and RMS norm on CUDA in NumPy: `vectorized_layer_norm_kernel`, thread by thread, in fp32.

Written from the algorithm: 128 threads share a row, by vectors of four channels; Welford's update with a reciprocal;
the parallel form of it between lanes at a falling distance (`shfl.down`), then between warps. `fma` stands where nvcc
13.0 contracts for sm_80, sm_90 and sm_100. Only the root is not the GPU's, which is an approximation: it is that of
Triton's interpreter.
"""

from __future__ import annotations

import numpy as np

_LANES, _WARPS, _VECTOR = 32, 4, 4
_ONE = np.float32(1)


def fma(a, b, c):
    """Returns `a * b + c` in fp32, rounded once.

    The product is exact in fp64. Their sum is rounded to odd there, after which rounding to fp32 is as good as once.
    """
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    with np.errstate(invalid="ignore"):
        total = product + c
        part = total - product
        error = (product - (total - part)) + (c - part)  # of the sum: exact
    is_even = (np.asarray(total).view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (error != 0) & is_even
    with np.errstate(over="ignore"):
        return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def _update(state, value):
    mean, squares, count = state
    delta = value - mean
    count = count + _ONE
    mean = fma(delta, _ONE / count, mean)
    return mean, fma(delta, value - mean, squares), count


def _combine(mine, other):
    """Unites two threads; those that have seen nothing count for nothing."""
    (mean, squares, count), (other_mean, other_squares, other_count) = mine, other
    total = other_count + count
    with np.errstate(divide="ignore", invalid="ignore"):
        coefficient = _ONE / total
        other_share, share = other_count * coefficient, count * coefficient
        delta = mean - other_mean
        united = fma(other_share, other_mean, share * mean)
        spread = fma(delta * delta * other_count, share, other_squares + squares)
    empty = total == 0
    return np.where(empty, np.float32(0), united), np.where(empty, np.float32(0), spread), total


def _update_square(state, value):
    (squares,) = state
    return (fma(value, value, squares),)


def _add(mine, other):
    return (mine[0] + other[0],)


def _of_row(rows, state, update, combine):
    """Returns the statistics that all threads of a row have together, `(rows, 1)` each; `state`: those of none."""
    vectors = rows.reshape(len(rows), -1, _VECTOR)
    threads = _LANES * _WARPS
    state = tuple(np.full((len(rows), threads), part, np.float32) for part in state)
    for start in range(0, vectors.shape[1], threads):
        busy = vectors[:, start : start + threads]
        of_busy = tuple(part[:, : busy.shape[1]] for part in state)
        for i in range(_VECTOR):
            of_busy = update(of_busy, busy[..., i])
        state = tuple(
            np.concatenate((new, old[:, busy.shape[1] :]), axis=1) for new, old in zip(of_busy, state, strict=True)
        )
    state = tuple(part.reshape(-1, _WARPS, _LANES) for part in state)
    lane, distance = np.arange(_LANES), _LANES // 2
    while distance:
        source = np.where(lane + distance < _LANES, lane + distance, lane)
        state = combine(state, tuple(part[..., source] for part in state))
        distance //= 2
    state, distance = tuple(part[..., 0] for part in state), _WARPS // 2
    while distance:
        lower, upper = (tuple(part[:, half] for part in state) for half in (slice(distance), slice(distance, None)))
        state = combine(lower, upper)
        distance //= 2
    return state


def layer_norm(rows, weight, bias, eps):
    """Returns the norm of each row; weight, bias: `(channels,)` or None. All fp32."""
    mean, squares, _ = _of_row(rows, (0, 0, 0), _update, _combine)
    factor = _factor(squares, rows, eps)
    centred = rows - mean
    if weight is None:
        return factor * centred if bias is None else fma(factor, centred, bias)
    scaled = factor * centred
    return weight * scaled if bias is None else fma(weight, scaled, bias)


def rms_norm(rows, weight, eps):
    """Returns the RMS norm of each row, before it is rounded to another dtype; weight: `(channels,)`. All fp32."""
    (squares,) = _of_row(rows, (0,), _update_square, _add)
    return weight * (_factor(squares, rows, eps) * rows)


def _factor(squares, rows, eps):
    return _ONE / np.sqrt(squares / np.float32(rows.shape[1]) + np.float32(eps))
