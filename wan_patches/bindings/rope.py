"""Rotary embedding functions of diffusers that receive their tables in forms other than Wan's.

Every function here takes the function of diffusers first, then its arguments. It calls that function itself where the
op has nothing faster, where something watches the operations, and for arguments that are not the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from wan_patches.ops import triton
from wan_patches.ops.dispatch import NO_FORM, OBSERVED, Op
from wan_patches.ops.rope import DTYPES, apply_rotary_emb
from wan_patches.ops.rope_addcmul import apply_rotary_emb_by_addcmul, in_chunks
from wan_patches.ops.rope_complex import apply_complex_rotary_emb
from wan_patches.ops.rope_per_channel import PairTables, apply_rotary_emb_per_channel, pairs
from wan_patches.ops.tracing import is_observed
from wan_patches.patching import tally

Stock = Callable[..., Any]

_UNUSUAL = "the queries or the tables do not have the usual shapes"
_PER_DEVICE = "products of complex numbers are rounded differently on each kind of device"
_UNLIKE = "the cosines or the sines of a pair differ"


def shared(
    stock: Stock,
    x: torch.Tensor,
    freqs_cis: Any,
    use_real: bool = True,
    use_real_unbind_dim: int = -1,
    sequence_dim: int = 2,
) -> torch.Tensor:
    """`diffusers.models.embeddings.apply_rotary_emb`.

    x: `(batch, heads, seq, head_dim)`, or with `sequence_dim=1` `(batch, seq, heads, head_dim)`.
    freqs_cis: cosines and sines, `(seq, head_dim)` each; without `use_real` complex numbers, `(batch, seq, head_dim /
        2)`, and `x` is `(batch, seq, heads, head_dim)`.
    use_real_unbind_dim: -1 if pairs are neighbouring channels, -2 if they lie half a head apart.
    """

    def original(x: torch.Tensor, freqs_cis: Any) -> torch.Tensor:
        return stock(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)  # type: ignore[no-any-return]

    if not use_real:
        return complex_numbers(original, x, freqs_cis)
    if use_real_unbind_dim not in (-1, -2) or sequence_dim not in (1, 2):
        return original(x, freqs_cis)  # raises
    heads_first = sequence_dim == 2
    return _rotated(original, (x,), freqs_cis, _of_tokens, use_real_unbind_dim == -2, heads_first)[0]


def without_heads(stock: Stock, x: torch.Tensor, freqs: Any) -> torch.Tensor:
    """The function of LTX-Video, which does not split channels into heads.

    x: `(batch, seq, dim)`; `freqs`: cosines and sines of that shape.
    """
    if torch.compiler.is_compiling() or x.dim() != 3:
        return stock(x, freqs)  # type: ignore[no-any-return]

    def original(x: torch.Tensor, freqs: Any) -> torch.Tensor:
        return stock(x.squeeze(2), freqs).unsqueeze(2)  # type: ignore[no-any-return]

    return _rotated(original, (x.unsqueeze(2),), freqs, _of_samples)[0].squeeze(2)


def queries_and_keys(
    stock: Stock, query: torch.Tensor, key: torch.Tensor, freqs_cis: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The function of JoyImage.

    query, key: `(batch, seq, heads, head_dim)`; `freqs_cis`: cosines and sines, `(seq, head_dim)` each.
    """
    return _rotated(stock, (query, key), freqs_cis, _of_tokens)  # type: ignore[return-value]


def queries_and_keys_of_samples(
    stock: Stock, query: torch.Tensor, key: torch.Tensor, freqs_cis: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The function of JoyImage Edit Plus, whose tables are `(batch, seq, head_dim)`."""
    return _rotated(stock, (query, key), freqs_cis, _of_samples)  # type: ignore[return-value]


def tables_of_heads(stock: Stock, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The function of Mochi, which has a table for each head.

    x: `(batch, seq, heads, head_dim)`; cos, sin: `(seq, heads, head_dim / 2)`, fp32.
    """
    if torch.compiler.is_compiling():
        return stock(x, cos, sin)  # type: ignore[no-any-return]
    op = apply_rotary_emb
    reason = op.why_small(x) or (OBSERVED if is_observed(x, cos, sin) else None)
    if reason is None and not x.is_cpu:
        reason = NO_FORM
    if reason is None and not (
        x.dtype in DTYPES
        and x.is_contiguous()
        and cos.dtype == sin.dtype == torch.float32
        and cos.shape == sin.shape == (*x.shape[1:3], x.shape[-1] // 2)
    ):
        reason = _UNUSUAL
    if reason is not None:
        return _stock(op, reason, stock, x, cos, sin)  # type: ignore[no-any-return]
    return op(x, cos[None], sin[None])


def by_addcmul(stock: Stock, x: torch.Tensor, freqs: Any) -> torch.Tensor:
    """The function of LTX 2 for tables split in halves.

    x: `(batch, seq, dim)`; `freqs`: cosines and sines, `(batch, heads, seq, head_dim / 2)` each, fp32.
    """
    if torch.compiler.is_compiling():
        return stock(x, freqs)  # type: ignore[no-any-return]
    op = apply_rotary_emb_by_addcmul
    reason = op.why_small(x)
    if reason is None and not (isinstance(freqs, (tuple, list)) and len(freqs) == 2):
        reason = _UNUSUAL
    reason = reason or (OBSERVED if is_observed(x, *freqs) else None)
    if reason is None and not x.is_cpu:
        reason = NO_FORM
    if reason is None:
        cos, sin = (table.transpose(1, 2) if table.dim() == 4 else table for table in freqs)
        of_heads = (*cos.shape[:3], 2 * cos.shape[-1])
        if x.dim() != 3 or cos.dim() != 4 or x.shape != (*of_heads[:2], of_heads[2] * of_heads[3]):
            reason = _UNUSUAL
        else:
            reason = in_chunks.refusal(x.unflatten(2, of_heads[2:]), cos, sin)
    if reason is not None:
        return _stock(op, reason, stock, x, freqs)  # type: ignore[no-any-return]
    return op(x.unflatten(2, of_heads[2:]), cos, sin).flatten(2)


def half_a_head_apart(stock: Stock, x: torch.Tensor, freqs: Any) -> torch.Tensor:
    """The function of LongCat-Audio.

    x: `(batch, seq, heads, head_dim)`; `freqs`: cosines and sines, `(seq, head_dim)` each.
    """
    return _rotated(stock, (x,), freqs, _of_tokens, halves=True)[0]


def matrices(stock: Stock, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """The functions of Kandinsky and PRX, whose tables hold a rotation matrix for each pair.

    x: `(batch, seq, heads, head_dim)` or `(batch, heads, seq, head_dim)`.
    freqs_cis: fp32, broadcastable to `(*x.shape[:-1], head_dim / 2, 2, 2)`.
    """
    return _by_matrices(stock, (x,), freqs_cis)[0]


def matrices_of_both(
    stock: Stock, query: torch.Tensor, key: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The function of HiDream, which is that of `matrices` for queries and keys."""
    return _by_matrices(stock, (query, key), freqs_cis)  # type: ignore[return-value]


def through_bfloat16(stock: Stock, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
    """The function of Kandinsky 5, which returns bf16 for queries and keys of any dtype."""
    if torch.compiler.is_compiling():
        return stock(x, freqs_cis)  # type: ignore[no-any-return]
    if x.dtype not in (torch.float32, torch.bfloat16):
        reason = "fp16 would be rounded twice, as stock rounds to bf16"
        return _stock(apply_rotary_emb, reason, stock, x, freqs_cis)  # type: ignore[no-any-return]
    return matrices(stock, x, freqs_cis).to(torch.bfloat16)


def complex_numbers(stock: Stock, x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """The functions of Lumina, Qwen-Image, Z-Image, FIBO 2 and Nucleus, in single precision.

    x: `(batch, seq, heads, head_dim)`; `freqs`: complex, `(seq, head_dim / 2)` or `(batch, seq, head_dim / 2)`.
    """
    return _by_complex_numbers(stock, x, freqs, torch.float32)


def complex_numbers_of_qwen(
    stock: Stock, x: torch.Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1
) -> torch.Tensor:
    """`complex_numbers` with the arguments of Qwen-Image's function; its models never set `use_real`."""

    def original(x: torch.Tensor, freqs_cis: Any) -> torch.Tensor:
        return stock(x, freqs_cis, use_real, use_real_unbind_dim)  # type: ignore[no-any-return]

    return original(x, freqs_cis) if use_real else complex_numbers(original, x, freqs_cis)


def complex_numbers_in_double(stock: Stock, x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """The function of AnyFlow, in double precision where the device has it.

    x: `(batch, heads, seq, head_dim)`; `freqs`: complex, `(1, 1, seq, head_dim / 2)`.
    """
    return _by_complex_numbers(stock, x, freqs, torch.float64, heads_first=True)


def complex_numbers_of_grids(
    stock: Stock, x: torch.Tensor, grid_sizes: torch.Tensor, freqs: torch.Tensor, time_stride: int = 1
) -> torch.Tensor:
    """The function of Wan-Animate 2, in double precision, which returns fp32 for queries and keys of any dtype.

    x: `(batch, seq, heads, head_dim)`; grid_sizes: `(batch, 3)`, the latent frames, rows and columns of each sample;
        freqs: complex, `(positions, head_dim / 2)`, of which time, rows and columns use some columns each.
    """
    if torch.compiler.is_compiling():
        return stock(x, grid_sizes, freqs, time_stride)  # type: ignore[no-any-return]
    op = apply_complex_rotary_emb
    reason = op.why_small(x) or (OBSERVED if is_observed(x, freqs) else None)
    if reason is None and not x.is_cpu:
        reason = _PER_DEVICE
    grids = [] if reason else grid_sizes.tolist()
    usual = x.dim() == 4 and x.dtype in DTYPES and x.is_contiguous() and len(grids) == len(x) and freqs.is_complex()
    if reason is None and not (usual and all(_fills(grid, x, freqs, time_stride) for grid in grids)):
        reason = _UNUSUAL
    if reason is not None:
        return _stock(op, reason, stock, x, grid_sizes, freqs, time_stride)  # type: ignore[no-any-return]
    tables = (_of_grid(grid, freqs, time_stride) for grid in grids)
    rotated = [op(sample.float(), table, torch.float64) for sample, table in zip(x.split(1), tables)]
    return rotated[0] if len(rotated) == 1 else torch.cat(rotated)


def _fills(grid: list[int], x: torch.Tensor, freqs: torch.Tensor, time_stride: int) -> bool:
    """Whether each token of `x` has a place in `grid`, and `freqs` a row for each place."""
    frames, rows, columns = grid
    longest = max(frames * time_stride, rows, columns)
    return frames * rows * columns == x.shape[1] and longest <= len(freqs) and freqs.shape[1:] == (x.shape[3] // 2,)


def _of_grid(grid: list[int], freqs: torch.Tensor, time_stride: int) -> torch.Tensor:
    """Returns the table for the tokens of `grid`, `(1, seq, 1, head_dim / 2)`."""
    frames, rows, columns = grid
    pairs = freqs.shape[1]
    time, vertical, horizontal = freqs.split((pairs - pairs // 3 * 2, pairs // 3, pairs // 3), dim=1)
    axes = (
        time[: frames * time_stride : time_stride, None, None],
        vertical[None, :rows, None],
        horizontal[None, None, :columns],
    )
    return torch.cat([axis.expand(frames, rows, columns, -1) for axis in axes], dim=-1).view(1, -1, 1, pairs)


def _by_complex_numbers(
    stock: Stock, x: torch.Tensor, freqs: torch.Tensor, dtype: torch.dtype, heads_first: bool = False
) -> torch.Tensor:
    """Casts `x` to `dtype` and multiplies its pairs.

    heads_first: whether `freqs` have an axis for the heads, and heads and tokens are exchanged in both.
    """
    if torch.compiler.is_compiling():
        return stock(x, freqs)  # type: ignore[no-any-return]
    op = apply_complex_rotary_emb
    reason = op.why_small(x)
    if reason is None and not (type(freqs) is torch.Tensor and freqs.is_complex()):
        reason = _UNUSUAL
    reason = reason or (OBSERVED if is_observed(x, freqs) else None)
    if reason is None and not x.is_cpu:
        reason = _PER_DEVICE
    if reason is None:
        table = freqs if heads_first else freqs.unsqueeze(-2)
        table = table[None] if table.dim() == 3 else table
        reason = None if x.dim() == table.dim() == 4 else _UNUSUAL
    if reason is not None:
        return _stock(op, reason, stock, x, freqs)  # type: ignore[no-any-return]
    if heads_first:
        return op(x.transpose(1, 2), table.transpose(1, 2), dtype).transpose(1, 2)
    return op(x, table, dtype)


def _rotated(
    stock: Stock,
    xs: tuple[torch.Tensor, ...],
    freqs: Any,
    shaped: Callable[[torch.Tensor], torch.Tensor],
    halves: bool = False,
    heads_first: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Rotates queries, keys, or both, of `(batch, seq, heads, head_dim)`.

    stock: a function of `xs` and `freqs`; for one tensor it returns one.
    freqs: cosines and sines, which `shaped` makes `(1 or batch, seq, 1, head_dim)`.
    heads_first: whether heads and tokens are exchanged in `xs`.
    """
    if torch.compiler.is_compiling():
        return _tuple(stock(*xs, freqs))
    op: Op[..., torch.Tensor] = apply_rotary_emb_per_channel if halves or not xs[0].is_cpu else apply_rotary_emb
    reason = op.why_small(xs[0]) or _reason_against_device(xs[0])
    if reason is None and not (isinstance(freqs, (tuple, list)) and len(freqs) == 2):
        reason = _UNUSUAL
    reason = reason or (OBSERVED if is_observed(*xs, *freqs) else None)
    if reason is None:
        cos, sin = (shaped(table.to(xs[0].device)) for table in freqs)  # half dtypes are promoted to fp32
        usual = cos.shape == sin.shape and cos.dim() == 4 and cos.dtype in DTYPES and sin.dtype in DTYPES
        if not usual or not all(_fits(cos, x, heads_first) for x in xs):
            reason = _UNUSUAL
    if reason is None:
        tables = PairTables(*pairs(cos.float(), halves), *pairs(sin.float(), halves))
        rotated = _by_pairs(xs, tables, halves, heads_first)
        if rotated is not None:
            return rotated
    return _tuple(_stock(op, reason or _UNLIKE, stock, *xs, freqs))


def _by_matrices(stock: Stock, xs: tuple[torch.Tensor, ...], freqs_cis: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As `_rotated`; axes of `xs` and of `freqs_cis`: see `matrices`."""
    if torch.compiler.is_compiling():
        return _tuple(stock(*xs, freqs_cis))
    op: Op[..., torch.Tensor] = apply_rotary_emb if xs[0].is_cpu else apply_rotary_emb_per_channel
    reason = op.why_small(xs[0]) or (OBSERVED if is_observed(*xs, freqs_cis) else None)
    if reason is None:
        table = freqs_cis[(None,) * (6 - freqs_cis.dim())]
        heads_first = table.shape[1] == 1  # a table is the same for all heads
        seq_axis = 2 if heads_first else 1
        usual = all(
            x.dim() == 4
            # of others stock changes the order in memory
            and (x.is_contiguous() or (heads_first and x.transpose(1, 2).is_contiguous()))
            and table.shape in [(b, *table.shape[1:3], x.shape[3] // 2, 2, 2) for b in (1, x.shape[0])]
            and table.shape[seq_axis] == x.shape[seq_axis]
            and table.shape[3 - seq_axis] == 1
            and table.device == x.device
            and x.dtype in DTYPES
            for x in xs
        )
        reason = _reason_against_device(xs[0]) if usual and table.dtype == torch.float32 else _UNUSUAL
    if reason is None:
        table = table.transpose(1, 2) if heads_first else table
        (cos_first, minus_sin), (sin, cos_second) = (row.unbind(-1) for row in table.unbind(-2))
        rotated = _by_pairs(xs, PairTables(cos_first, cos_second, -minus_sin, sin), False, heads_first)
        if rotated is not None:
            return rotated
    return _tuple(_stock(op, reason or _UNLIKE, stock, *xs, freqs_cis))


def _by_pairs(
    xs: tuple[torch.Tensor, ...], tables: PairTables, halves: bool, heads_first: bool
) -> tuple[torch.Tensor, ...] | None:
    """Rotates each of `xs`; None if stock is to do it."""
    tokens_first = [x.transpose(1, 2) for x in xs] if heads_first else xs
    cos, other_cos, sin, other_sin = tables
    if halves or not cos.is_cpu:
        rotated = [apply_rotary_emb_per_channel(x, tables, halves) for x in tokens_first]
    elif torch.equal(cos, other_cos) and torch.equal(sin, other_sin):
        rotated = [apply_rotary_emb(x, cos, sin) for x in tokens_first]
    else:
        return None
    return tuple(x.transpose(1, 2) if heads_first else x for x in rotated)


def _reason_against_device(x: torch.Tensor) -> str | None:
    return None if x.is_cpu or triton.is_usable(x.device) else NO_FORM


def _fits(table: torch.Tensor, x: torch.Tensor, heads_first: bool) -> bool:
    """Whether a table of `(1 or batch, seq, 1, head_dim)` has a row for each token of `x`."""
    if x.dim() != 4 or x.dtype not in DTYPES or x.shape[3] % 2:
        return False
    batch, seq, dim = x.shape[0], x.shape[2 if heads_first else 1], x.shape[3]
    return table.shape in ((1, seq, 1, dim), (batch, seq, 1, dim))


def _of_tokens(table: torch.Tensor) -> torch.Tensor:
    return table[None, :, None]


def _of_samples(table: torch.Tensor) -> torch.Tensor:
    return table.unsqueeze(2)


def _tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _stock(op: Op[..., Any], reason: str, stock: Stock, *args: Any) -> Any:
    tally.count(op.name, "", reason)
    return stock(*args)
