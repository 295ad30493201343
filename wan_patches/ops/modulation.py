"""adaLN modulation, gated residuals and the casts around them: what stands between the matmuls of a block.

    modulated norm:   (norm(x.float()) * (1 + scale) + shift).type_as(x)
    gated residual:   (x.float() + y * gate).type_as(x)
    residual norm:    h = x + y or a gated residual, and the norm of h, modulated or not

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

_SMALL = 1 << 17  # elements below which the plain formulation's few calls are the fastest
_CHUNK = 1 << 19  # elements worked on at a time on CPUs: they stay in the cache from the first operation to the last

Norm = Callable[[torch.Tensor], torch.Tensor]


class TwoRows(NamedTuple):
    """A modulation for two kinds of tokens, as a value of its own: a tensor for each token cannot prove that it is one.

    Models hand it on as they do the tensor that it stands for, `(1 or batch, seq, ...)`. Stock code, where a patch goes
    away during a run, gets that tensor from `float`.

    rows: `(1 or batch, 2, ...)`, what the tokens before `border` get, and what the others do. The rest is `(dim,)`, or
        `(n, dim)` for `n` modulations in one.
    border, seq: numbers of tokens.
    """

    rows: torch.Tensor
    border: int
    seq: int

    @property
    def ndim(self) -> int:
        """Axes of the tensor."""
        return self.rows.dim()

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> TwoRows:
        """As of the tensor; `dim` is at least 2."""
        return self._replace(rows=self.rows.unflatten(dim, sizes))

    def to(self, device: torch.device, non_blocking: bool = False) -> TwoRows:
        """As of a tensor: hooks of offloading ask for it."""
        return self._replace(rows=self.rows.to(device, non_blocking=non_blocking))

    def added_to(self, table: torch.Tensor) -> tuple[TwoRows, ...]:
        """The `n` modulations in this one, after `table`, `(1, n, dim)`, was added to each row."""
        return tuple(self._replace(rows=rows) for rows in (table.unsqueeze(0) + self.rows).unbind(dim=2))

    def float(self) -> torch.Tensor:
        """The tensor in fp32."""
        return self.dense().float()

    def dense(self) -> torch.Tensor:
        """The tensor, `(1 or batch, seq, ...)`."""
        batch, _, *rest = self.rows.shape
        counts = (self.border, self.seq - self.border)
        return torch.cat([row.expand(batch, n, *rest) for row, n in zip(self.rows.split(1, dim=1), counts)], dim=1)


class TwoTimesteps(NamedTuple):
    """A timestep for each token, of which there are two.

    values: `(2,)`: of the tokens before `border`, and of the others.
    border: a number of tokens.
    shape: `(batch, seq)`, of the tensor that this stands for, which stock code gets from `flatten`.
    """

    values: torch.Tensor
    border: int
    shape: tuple[int, int]

    @property
    def ndim(self) -> int:
        """Axes of the tensor."""
        return 2

    def to(self, device: torch.device, non_blocking: bool = False) -> TwoTimesteps:
        """As of a tensor: hooks of offloading ask for it."""
        return self._replace(values=self.values.to(device, non_blocking=non_blocking))

    def flatten(self) -> torch.Tensor:
        """The tensor, `(batch * seq,)`."""
        batch, seq = self.shape
        first, rest = self.values.split(1)
        return torch.cat((first.expand(self.border), rest.expand(seq - self.border))).repeat(batch)


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
    if not is_fast(x, scale, shift):
        return plain_modulated_norm(x, norm, scale, shift)
    if x.is_cpu:
        return _modulated_norm_in_chunks(x, norm, scale, shift)
    key = (*signature(x), *kind_of(scale), *kind_of(shift))
    fast = _modulated_norm_kernel if kernels.is_usable(x.device) else _modulated_norm_in_place
    return first_sight("modulated norm", key, fast, plain_modulated_norm, x, norm, scale, shift)


def gated_residual(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    """`x` plus `y` times `gate`; a new tensor like `x`. EXACT: the bits of the plain formulation.

    y: what attention or the feed-forward layer made of `x`, of its shape.
    cast: stock casts `y` to fp32 by itself, which makes a difference in fp64 only.
    """
    if not is_fast(x, gate) or not is_like(y, x):
        return plain_gated_residual(x, y, gate, cast)
    if x.is_cpu:
        return _gated_residual_in_chunks(x, y, gate)
    key = (*signature(x, y), *kind_of(gate))
    fast = _gated_residual_kernel if kernels.is_usable(x.device) else _gated_residual_in_place
    return first_sight("gated residual", key, fast, plain_gated_residual, x, y, gate)


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: Norm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual sum of `x` and `y`, and its norm.

    Args:
        x, y: as in `gated_residual`.
        gate: None for `x + y`, in their dtypes.
        norm, scale, shift: as in `modulated_norm`; None for `norm` alone.

    Returns:
        The sum and the norm, new tensors like `x`. EXACT: the bits of the plain formulations, one after the other.
    """
    modulations = [modulation for modulation in (gate, scale, shift) if modulation is not None]
    if not is_fast(x, *modulations) or not is_like(y, x) or (gate is None and y.dtype != x.dtype):
        return plain_residual_norm(x, y, gate, norm, scale, shift)
    if x.is_cpu:
        return _residual_norm_in_chunks(x, y, gate, norm, scale, shift)
    if gate is None and x.dtype != torch.float32 and kernels.is_usable(x.device):
        key = (*signature(x, y), *map(kind_of, modulations))
        args = (x, y, gate, norm, scale, shift)
        return first_sight("residual norm", key, _residual_norm_kernel, plain_residual_norm, *args)
    h = x + y if gate is None else gated_residual(x, y, gate)
    return h, cast_norm(h, norm) if scale is None or shift is None else modulated_norm(h, norm, scale, shift)


def cast_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`norm(x.float()).type_as(x)`, by ATen's own kernels. EXACT; on CPUs the fp32 tensors are never whole."""
    if not x.is_cpu or x.dtype == torch.float32 or not is_fast(x):
        return plain_cast_norm(x, norm)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for b, chunk in _chunks(x):
        out[b, chunk].copy_(norm(x[b, chunk].float()))
    return out


# The plain formulations, which compilers and autograd see


def plain_modulated_norm(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    """`modulated_norm` in stock's operations."""
    return (norm(x.float()) * (1 + as_tensor(scale)) + as_tensor(shift)).type_as(x)


def plain_gated_residual(x: torch.Tensor, y: torch.Tensor, gate: Modulation, cast: bool = False) -> torch.Tensor:
    """`gated_residual` in stock's operations."""
    return (x.float() + (y.float() if cast else y) * as_tensor(gate)).type_as(x)


def plain_cast_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """`cast_norm` in stock's operations."""
    return norm(x.float()).type_as(x)


def plain_residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: Norm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual_norm` in stock's operations."""
    h = x + y if gate is None else plain_gated_residual(x, y, gate)
    if scale is None or shift is None:
        return h, plain_cast_norm(h, norm)
    return h, plain_modulated_norm(h, norm, scale, shift)


def as_tensor(modulation: Modulation) -> torch.Tensor:
    """A modulation as stock has it: `(1 or batch, 1 or seq, dim)`."""
    return modulation if isinstance(modulation, torch.Tensor) else modulation.dense()


# CPUs: a few tokens at a time


def _modulated_norm_in_chunks(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for b, chunk in _chunks(x, scale, shift):
        normed = norm(x[b, chunk].float())
        out[b, chunk].copy_(normed.mul_(1 + _rows(scale, b, chunk)).add_(_rows(shift, b, chunk)))
    return out


def _gated_residual_in_chunks(x: torch.Tensor, y: torch.Tensor, gate: Modulation) -> torch.Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for b, chunk in _chunks(x, gate):
        product = y[b, chunk] * _rows(gate, b, chunk)
        out[b, chunk].copy_(product.add_(x[b, chunk]))
    return out


def _residual_norm_in_chunks(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: Modulation | None,
    norm: Norm,
    scale: Modulation | None,
    shift: Modulation | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    h, out = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(x, memory_format=torch.contiguous_format),
    )
    for b, chunk in _chunks(x, *(modulation for modulation in (gate, scale, shift) if modulation is not None)):
        if gate is None:
            torch.add(x[b, chunk], y[b, chunk], out=h[b, chunk])
        else:
            product = y[b, chunk] * _rows(gate, b, chunk)
            h[b, chunk].copy_(product.add_(x[b, chunk]))
        normed = norm(h[b, chunk].float())
        if scale is not None and shift is not None:
            normed.mul_(1 + _rows(scale, b, chunk)).add_(_rows(shift, b, chunk))
        out[b, chunk].copy_(normed)
    return h, out


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
    product = torch.empty_like(y, dtype=torch.float32, memory_format=torch.contiguous_format)
    for tokens, rows in _kinds_of_tokens(gate):
        torch.mul(y[:, tokens], rows, out=product[:, tokens])
    return product.add_(x).type_as(x)


def _kinds_of_tokens(modulation: Modulation) -> Iterator[tuple[slice, torch.Tensor]]:
    if isinstance(modulation, TwoRows):
        yield slice(modulation.border), modulation.rows[:, :1]
        yield slice(modulation.border, None), modulation.rows[:, 1:]
    else:
        yield slice(None), as_rows(modulation)


def _modulated_norm_kernel(x: torch.Tensor, norm: Norm, scale: Modulation, shift: Modulation) -> torch.Tensor:
    from wan_patches.ops.triton.modulation import modulate

    return modulate(norm(x.float()), as_rows(scale), as_rows(shift), x.dtype, border_of(scale))


def _gated_residual_kernel(x: torch.Tensor, y: torch.Tensor, gate: Modulation) -> torch.Tensor:
    from wan_patches.ops.triton.modulation import gated_residual

    return gated_residual(x, y, as_rows(gate), border_of(gate))


def _residual_norm_kernel(
    x: torch.Tensor, y: torch.Tensor, gate: None, norm: Norm, scale: Modulation | None, shift: Modulation | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from wan_patches.ops.triton.modulation import add_and_cast, modulate

    h, wide = add_and_cast(x, y)
    normed = norm(wide)
    if scale is None or shift is None:
        return h, normed.type_as(x)
    return h, modulate(normed, as_rows(scale), as_rows(shift), x.dtype, border_of(scale))


def as_rows(modulation: Modulation) -> torch.Tensor:
    """A modulation as kernels take it."""
    if isinstance(modulation, TwoRows):
        return modulation.rows
    return modulation.dense() if isinstance(modulation, RowPerToken) else modulation


def border_of(modulation: Modulation) -> int | None:
    """How many tokens have the first of two rows; None where there are not two."""
    return modulation.border if isinstance(modulation, TwoRows) else None


# When


def is_fast(x: torch.Tensor, *modulations: Modulation) -> bool:
    """Whether `x` and what it is modulated with are such as the fast forms are for."""
    return _reason_against(x, *modulations) is None


def _reason_against(x: torch.Tensor, *modulations: Modulation) -> str | None:
    if is_observed(x, *itertools.chain(*map(_parts, modulations))):
        return "a compiler, autograd or a transform looks on"
    if x.dim() != 3 or x.dtype not in DTYPES or not x.is_contiguous() or x.is_meta or x.numel() == 0:
        return "the hidden states are not (batch, seq, dim), contiguous, in fp32, bf16 or fp16"
    if x.is_cpu and x.numel() < _SMALL:
        return "it is the fastest for so few elements"
    if not all(_fits(modulation, x) for modulation in modulations) or len(set(map(border_of, modulations))) > 1:
        return "the modulation is not in fp32, or does not fit"
    return None


def _fits(modulation: Modulation, x: torch.Tensor) -> bool:
    batch, seq, dim = x.shape
    if any(part.device != x.device or part.dim() != 3 or part.stride(-1) != 1 for part in _parts(modulation)):
        return False
    if isinstance(modulation, RowPerToken):
        table, temb = modulation
        return table.shape == (1, 1, dim) and temb.shape == x.shape and {table.dtype, temb.dtype} <= set(DTYPES)
    known: tuple[int, ...] = (1, seq)
    if isinstance(modulation, TwoRows):
        known = (2,) if modulation.seq == seq else ()
        modulation = modulation.rows
    return (
        modulation.dtype == torch.float32
        and modulation.shape[0] in (1, batch)
        and modulation.shape[1] in known
        and modulation.shape[2] == dim
    )


def is_like(y: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `y` is what the fast forms can add to `x`."""
    return (
        y.shape == x.shape and y.dtype in DTYPES and y.device == x.device and y.is_contiguous() and not is_observed(y)
    )


def _parts(modulation: Modulation) -> tuple[torch.Tensor, ...]:
    """The tensors that a modulation is made of."""
    if isinstance(modulation, TwoRows):
        return (modulation.rows,)
    return tuple(modulation) if isinstance(modulation, RowPerToken) else (modulation,)


def kind_of(modulation: Modulation) -> tuple[object, ...]:
    """The part of a gate key that a modulation contributes."""
    return (type(modulation), *signature(*_parts(modulation)), border_of(modulation))
