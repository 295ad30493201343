"""Compares the bits of two results, and measures how far apart they are."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["Difference", "difference", "digest", "leaves", "psnr", "ssim"]

_CHUNK = 1 << 22  # elements compared at a time, because a result can be a whole video
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size in bytes


@dataclass(frozen=True)
class Difference:
    """How far apart two results are.

    exact: types, dtypes, shapes and bits are equal (0 and -0 differ).
    max_abs: the largest absolute difference; None if the values cannot be subtracted.
    max_ulp: the largest difference in units in the last place, for floating dtypes.
    reason: further explanation, such as different shapes.
    """

    exact: bool
    max_abs: float | None = None
    max_ulp: int | None = None
    reason: str = ""

    @classmethod
    def of(cls, parts: Iterable[Difference]) -> Difference:
        """Returns the maximum of several differences."""
        parts = list(parts)
        reasons = dict.fromkeys(part.reason for part in parts if part.reason)
        return cls(
            all(part.exact for part in parts),
            max((part.max_abs for part in parts if part.max_abs is not None), default=None),
            max((part.max_ulp for part in parts if part.max_ulp is not None), default=None),
            "; ".join(reasons),
        )


def leaves(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors of a result in order, with any nesting; arrays and PIL images are converted to tensors."""
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, np.ndarray):
        if value.dtype != object:
            yield _from_array(value)
    elif isinstance(value, Image.Image):
        yield _from_array(np.asarray(value))
    elif isinstance(value, Mapping):
        yield from leaves(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)


def digest(value: Any) -> str | None:
    """Returns a fingerprint of a result's bits, dtypes and shapes; None if it contains no tensors, arrays or images."""
    found = hashlib.blake2b(digest_size=16)
    empty = True
    for leaf in leaves(value):
        empty = False
        found.update(f"{leaf.dtype} {tuple(leaf.shape)};".encode())
        words = _words(leaf)
        found.update((_condensed(words) if words.is_cuda else words.cpu()).numpy().data)
    return None if empty else found.hexdigest()


def difference(stock: Any, patched: Any) -> Difference:
    """Compares the tensors, arrays and images of two results pairwise, on the CPU."""
    ours, theirs = list(leaves(patched)), list(leaves(stock))
    if len(ours) != len(theirs):
        return Difference(False, reason=f"{len(theirs)} tensors in stock, {len(ours)} patched")
    return Difference.of(_pair(*pair) for pair in zip(theirs, ours)) if ours else Difference(True)


def psnr(stock: np.ndarray, patched: np.ndarray, peak: float) -> float:
    """Returns the peak signal-to-noise ratio in dB; infinite for identical frames."""
    error = np.mean(np.square(stock.astype(np.float64) - patched))
    return 10 * math.log10(peak**2 / error) if error else math.inf


def ssim(stock: np.ndarray, patched: np.ndarray, peak: float) -> float | None:
    """Returns the structural similarity of two frames `(height, width, channels)`; None without scikit-image."""
    if np.array_equal(stock, patched):
        return 1.0
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    window = min(7, *stock.shape[:2])
    window -= 1 - window % 2  # must be odd
    if window < 3:
        return None
    return float(structural_similarity(stock, patched, data_range=peak, channel_axis=-1, win_size=window))


def _from_array(array: np.ndarray) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array))  # copied: torch lacks some strides and read-only memory
    except TypeError:  # a dtype that torch lacks, such as strings
        return torch.from_numpy(np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy())


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bits as a flat tensor of integers, one per element."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])


def _condensed(words: torch.Tensor) -> torch.Tensor:
    """Reduces integers on their device, so that few have to be copied: sums with fixed random weights, mod 2**64.

    Integer sums do not depend on the order of summation. Two different rows have the same sum with a probability of
    about 2**-32 (2**-48 in half precision).
    """
    weights = _weights(words.device)
    sums = [(part.long() * weights[: len(part)]).sum() for part in words.split(_CHUNK)]
    return torch.stack(sums).cpu() if sums else torch.empty(0, dtype=torch.int64)


@functools.lru_cache(maxsize=8)
def _weights(device: torch.device) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (_CHUNK,), generator=generator, dtype=torch.int64).to(device)


def _pair(stock: torch.Tensor, patched: torch.Tensor) -> Difference:
    if stock.dtype != patched.dtype:
        return Difference(False, reason=f"{_name(stock.dtype)} in stock, {_name(patched.dtype)} patched")
    if stock.shape != patched.shape:
        return Difference(False, reason=f"shape {tuple(stock.shape)} in stock, {tuple(patched.shape)} patched")
    pairs = zip(*(tensor.cpu().contiguous().reshape(-1).split(_CHUNK) for tensor in (stock, patched)))
    return Difference.of(_chunk(*pair) for pair in pairs)


def _chunk(stock: torch.Tensor, patched: torch.Tensor) -> Difference:
    same = _words(stock) == _words(patched)
    if bool(same.all()):
        return Difference(True, 0.0, 0 if stock.is_floating_point() else None)
    if stock.is_complex():
        return _chunk(torch.view_as_real(stock).reshape(-1), torch.view_as_real(patched).reshape(-1))
    lost = stock.isnan() != patched.isnan()
    apart = (stock.double() - patched.double()).abs()
    apart = torch.where((stock == patched) | apart.isnan(), 0.0, apart)  # equal infinities, or nan on both sides
    ulp = None
    if stock.is_floating_point() and stock.element_size() < 8:
        numbers = ~(stock.isnan() | patched.isnan())
        steps = (_ordered(stock) - _ordered(patched)).abs()[numbers]
        ulp = int(steps.max()) if len(steps) else None
    return Difference(False, float(apart.max()), ulp, "nan on one side only" if bool(lost.any()) else "")


def _ordered(floats: torch.Tensor) -> torch.Tensor:
    """Maps floats to integers in the same order, such that neighbours differ by one; 0 and -0 are equal."""
    bits = floats.view(torch.int8 if floats.element_size() == 1 else _INTEGERS[floats.element_size()]).long()
    return torch.where(bits < 0, -(1 << (8 * floats.element_size() - 1)) - bits, bits)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
