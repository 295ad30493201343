"""adaLN modulation, gated residuals and the casts around them: what stands between the matmuls of a block.

    modulated norm:   (norm(x.float()) * (1 + scale) + shift).type_as(x)
    gated residual:   (x.float() + y * gate).type_as(x)

Every operation is rounded in fp32, and the result once more to the dtype of `x`: that is stock's order of arithmetic.
`norm` is a layer norm and stays ATen's; it works on each token by itself and returns new memory.

Hidden states are `(batch, seq, dim)`. A scale, a shift or a gate is fp32 and `(1 or batch, rows, dim)`: one row for all
tokens, a row per token, `TwoRows`, or `RowPerToken`, which is one that has not been computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from wan_patches.fidelity import gate as first_sight
from wan_patches.fidelity import signature
from wan_patches.ops import triton as kernels
from wan_patches.ops.tracing import is_observed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SMALL = 1 << 16  # elements below which the plain formulation's few calls are the fastest
_CHUNK = 1 << 19  # elements worked on at a time on CPUs: they stay in the cache from the first operation to the last

Norm = Callable[[torch.Tensor], torch.Tensor]


class TwoRows(NamedTuple):
    """A modulation for two kinds of tokens, as a value of its own: a tensor for each token cannot prove that it is one.

    rows: `(1 or batch, 2, dim)`, or `(batch, 2, n, dim)` of `n` modulations in one; what the tokens before `border`
        get, and what the others do.
    border: a number of tokens.
    """

    rows: torch.Tensor
    border: int

    @property
    def ndim(self) -> int:
        """As of what models hand their blocks where all tokens are of one kind, `(batch, n, dim)`."""
        return 3

    def added_to(self, table: torch.Tensor) -> tuple[TwoRows, ...]:
        """The `n` modulations in this one, after `table`, `(1, n, dim)`, was added to each row in fp32."""
        each = (table.unsqueeze(0) + self.rows.float()).unbind(dim=2)
        return tuple(TwoRows(rows, self.border) for rows in each)

    def dense(self, seq: int) -> torch.Tensor:
        """A row for each token, `(batch, seq, dim)`."""
        first, rest = self.rows.split(1, dim=1)
        return torch.cat((first.expand(-1, self.border, -1), rest.expand(-1, seq - self.border, -1)), dim=1)


class RowPerToken(NamedTuple):
    """A row for each token that is made where it is used: the whole of it in fp32 can be larger than the model.

    table: `(1, 1, dim)`; temb: `(batch, seq, dim)`. Their sum in fp32 is the modulation.
    """

    table: torch.Tensor
    temb: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The modulation, `(batch, seq, dim)`."""
        return self.table + self.temb.float()


Modulation = torch.Tensor | TwoRows | RowPerToken


def modulated_norm(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """The norm of `x` in fp32, scaled and shifted; a new tensor like `x`. EXACT: the bits of the plain formulation."""
    if not _is_fast(x, scale, shift):
        return plain_modulated_norm(x, norm, scale, shift)
    if x.is_cpu:
        return _modulated_norm_in_chunks(x, norm, scale, shift)
    key = (*signature(x), *_kind(scale), *_kind(shift))
    fast = _modulated_norm_kernel if kernels.is_usable(x.device) else _modulated_norm_in_place
    return first_sight("modulated norm", key, fast, plain_modulated_norm, x, norm, scale, shift)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    """`x` plus `y` times `gate`; a new tensor like `x`. EXACT: the bits of the plain formulation.

    y: what attention or the feed-forward layer made of `x`, of its shape.
    cast: stock casts `y` to fp32 by itself, which makes a difference in fp64 only.
    """
    if not _is_fast(x, gate) or not _is_like(y, x):
        return plain_gated_residual(x, y, gate, cast)
    if x.is_cpu:
        return _gated_residual_in_chunks(x, y, gate)
    key = (*signature(x, y), *_kind(gate))
    fast = _gated_residual_kernel if kernels.is_usable(x.device) else _gated_residual_in_place
    return first_sight("gated residual", key, fast, plain_gated_residual, x, y, gate)


def cast_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`norm(x.float()).type_as(x)`, by ATen's own kernels. EXACT; on CPUs the fp32 tensors are never whole."""
    if not x.is_cpu or x.dtype == torch.float32 or not _is_fast(x):
        return plain_cast_norm(x, norm)
    out = torch.empty_like(x)
    for b, chunk in _chunks(x):
        out[b, chunk].copy_(norm(x[b, chunk].float()))
    return out


# The plain formulations, which compilers and autograd see


def plain_modulated_norm(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """`modulated_norm` in stock's operations."""
    return (norm(x.float()) * (1 + _tensor(scale, x)) + _tensor(shift, x)).type_as(x)


def plain_gated_residual(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    """`gated_residual` in stock's operations."""
    return (x.float() + (y.float() if cast else y) * _tensor(gate, x)).type_as(x)


def plain_cast_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`cast_norm` in stock's operations."""
    return norm(x.float()).type_as(x)


def _tensor(modulation: Modulation, x: torch.Tensor) -> torch.Tensor:
    if isinstance(modulation, TwoRows):
        return modulation.dense(x.shape[1])
    return modulation.dense() if isinstance(modulation, RowPerToken) else modulation


# CPUs: a few tokens at a time


def _modulated_norm_in_chunks(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    out = torch.empty_like(x)
    for b, chunk in _chunks(x, scale, shift):
        normed = norm(x[b, chunk].float())
        normed.mul_(1 + _rows(scale, b, chunk)).add_(_rows(shift, b, chunk))
        out[b, chunk].copy_(normed)
    return out


def _gated_residual_in_chunks(x: torch.Tensor, y: torch.Tensor, gate: Modulation) -> torch.Tensor:
    out = torch.empty_like(x)
    for b, chunk in _chunks(x, gate):
        product = y[b, chunk] * _rows(gate, b, chunk)
        out[b, chunk].copy_(product.add_(x[b, chunk]))
    return out


def _chunks(x: torch.Tensor, *modulations: Modulation) -> Iterator[tuple[int, slice]]:
    """Samples of the batch, and some tokens of each that are of one kind."""
    batch, seq, dim = x.shape
    borders = {modulation.border for modulation in modulations if isinstance(modulation, TwoRows)}
    edges = sorted({0, seq, *borders})
    step = max(1, _CHUNK // dim)
    for b in range(batch):
        for begin, end in itertools.pairwise(edges):
            for start in range(begin, end, step):
                yield b, slice(start, min(start + step, end))


def _rows(modulation: Modulation, b: int, chunk: slice) -> torch.Tensor:
    """What `_chunks` needs of a modulation: `(1 or tokens, dim)`."""
    if isinstance(modulation, TwoRows):
        of_sample = modulation.rows[b if modulation.rows.shape[0] > 1 else 0]
        return of_sample[:1] if chunk.start < modulation.border else of_sample[1:]
    if isinstance(modulation, RowPerToken):
        return modulation.table[0] + modulation.temb[b, chunk].float()
    of_sample = modulation[b if modulation.shape[0] > 1 else 0]
    return of_sample if of_sample.shape[0] == 1 else of_sample[chunk]


# Accelerators


def _modulated_norm_in_place(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    normed = norm(x.float())
    for tokens, rows in _kinds_of_tokens(scale):
        normed[:, tokens].mul_(1 + rows)
    for tokens, rows in _kinds_of_tokens(shift):
        normed[:, tokens].add_(rows)
    return normed.type_as(x)


def _gated_residual_in_place(x: torch.Tensor, y: torch.Tensor, gate: Modulation) -> torch.Tensor:
    product = torch.empty_like(y, dtype=torch.float32)
    for tokens, rows in _kinds_of_tokens(gate):
        torch.mul(y[:, tokens], rows, out=product[:, tokens])
    return product.add_(x).type_as(x)


def _kinds_of_tokens(modulation: Modulation) -> Iterator[tuple[slice, torch.Tensor]]:
    if isinstance(modulation, TwoRows):
        yield slice(modulation.border), modulation.rows[:, :1]
        yield slice(modulation.border, None), modulation.rows[:, 1:]
    else:
        yield slice(None), _of(modulation)


def _modulated_norm_kernel(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    from wan_patches.ops.triton.modulation import modulate

    return modulate(norm(x.float()), _of(scale), _of(shift), x.dtype, _border(scale))


def _gated_residual_kernel(x: torch.Tensor, y: torch.Tensor, gate: Modulation) -> torch.Tensor:
    from wan_patches.ops.triton.modulation import gated_residual

    return gated_residual(x, y, _of(gate), _border(gate))


def _of(modulation: Modulation) -> torch.Tensor:
    """A modulation as kernels take it."""
    if isinstance(modulation, TwoRows):
        return modulation.rows
    return modulation.dense() if isinstance(modulation, RowPerToken) else modulation


def _border(modulation: Modulation) -> int | None:
    return modulation.border if isinstance(modulation, TwoRows) else None


# When


def _is_fast(x: torch.Tensor, *modulations: Modulation) -> bool:
    """Whether `x` and what it is modulated with are such as the fast forms are for."""
    if is_observed(x, *itertools.chain(*map(_parts, modulations))) or x.dim() != 3 or x.is_meta:
        return False
    if x.dtype not in DTYPES or not x.is_contiguous() or x.numel() < (_SMALL if x.is_cpu else 1):
        return False
    return all(_fits(modulation, x) for modulation in modulations) and len(set(map(_border, modulations))) <= 1


def _fits(modulation: Modulation, x: torch.Tensor) -> bool:
    batch, seq, dim = x.shape
    if any(part.device != x.device or part.dim() != 3 or part.stride(-1) != 1 for part in _parts(modulation)):
        return False
    if isinstance(modulation, RowPerToken):
        table, temb = modulation
        return table.shape == (1, 1, dim) and temb.shape == x.shape and {table.dtype, temb.dtype} <= set(DTYPES)
    rows = modulation.rows if isinstance(modulation, TwoRows) else modulation
    known = (2,) if isinstance(modulation, TwoRows) else (1, seq)
    return (
        rows.dtype == torch.float32 and rows.shape[0] in (1, batch) and rows.shape[1] in known and rows.shape[2] == dim
    )


def _is_like(y: torch.Tensor, x: torch.Tensor) -> bool:
    return (
        y.shape == x.shape and y.dtype in DTYPES and y.device == x.device and y.is_contiguous() and not is_observed(y)
    )


def _parts(modulation: Modulation) -> tuple[torch.Tensor, ...]:
    """The tensors that a modulation is made of."""
    if isinstance(modulation, TwoRows):
        return (modulation.rows,)
    return tuple(modulation) if isinstance(modulation, RowPerToken) else (modulation,)


def _kind(modulation: Modulation) -> tuple[object, ...]:
    return (type(modulation), *signature(*_parts(modulation)), _border(modulation))
