"""Benchmarks each form against the reference of its op, at the form's minimum size and at published sizes.

On accelerators a copy is measured in turns with them, to compare it with the bytes that a form moves.

Forms declare their supported inputs (`smallest`, `refuses`). A form that takes more than `FAST` of the reference's time
should not support the input, since its calls are counted as fast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor
from rich import box
from rich.console import Group
from rich.table import Table

from wan_patches.bench.floor import Copy
from wan_patches.bench.measure import MeasurementError, identical, in_turns, name_of, using_threads, write_rows
from wan_patches.bench.traffic import counting
from wan_patches.ops import (
    conditioning,
    frames,
    fused_norm,
    modulation,
    norm_silu,
    rms_norm,
    rope,
    rope_addcmul,
    rope_complex,
    rope_per_channel,
)
from wan_patches.ops import images as pictures
from wan_patches.ops.dispatch import SMALL, Op
from wan_patches.ops.modulation import RowPerToken, SegmentedModulation
from wan_patches.patching.fidelity import Fidelity
from wan_patches.testing.families import images

FAST = 0.9
_HEAD = 128
_WIDTHS = (1536, 5120)
_TOKENS = 32760  # as published: 81 frames of 480x832
_TOKENS_ON_CPU = 4095
_LAYOUTS = ("rows", "as convolutions leave it")


@dataclass(frozen=True)
class Row:
    """The times of one op on one kind of input, in milliseconds per call.

    form: the form that the op selected. Empty for the reference; then nothing was measured.
    reason: why the op took the reference, or failed to take an earlier form.
    gb, kernels: what the form's own calls read and write, and the kernels that it launches; on accelerators only, like
        `copy_gb_s`, the bandwidth of a copy within the device.
    """

    op: str
    input: str
    shape: str
    dtype: str
    form: str
    reason: str = ""
    reference_ms: float | None = None
    form_ms: float | None = None
    exact: bool | None = None
    gb: float | None = None
    kernels: tuple[str, ...] = ()
    copy_gb_s: float | None = None

    @property
    def of_copy(self) -> float | None:
        """The form's share of the bandwidth of a copy."""
        return self.gb / self.form_ms * 1e3 / self.copy_gb_s if self.gb and self.form_ms and self.copy_gb_s else None

    @property
    def share(self) -> float | None:
        """The form's time divided by the reference's."""
        return self.form_ms / self.reference_ms if self.form_ms and self.reference_ms else None


@dataclass(frozen=True)
class Sample:
    """An input of `op`; `make` returns the arguments on a device, in a dtype."""

    op: Op[Any, Any]
    input: str
    shape: str
    make: Callable[[torch.device, torch.dtype], tuple[Any, ...]]


def measure(
    device: torch.device, dtype: torch.dtype, *, quick: bool = False, threads: int | None = None, only: str = ""
) -> list[Row]:
    """Measures every op on `device`; with `quick`, only at the smallest sizes and in less time.

    Args:
        only: a part of the op and shape of the rows to measure.

    Raises:
        MeasurementError: there is no such row.
    """
    known = samples(device, dtype, quick)
    if not (chosen := [sample for sample in known if only in f"{sample.op.name} {sample.shape}"]):
        names = dict.fromkeys(sample.op.name for sample in known)
        raise MeasurementError(f"No row is called {only!r}; there are: {'; '.join(names)}.")
    with using_threads(threads), torch.no_grad():
        copy = None if device.type == "cpu" else Copy(device, (16 if quick else 1024) << 20)
        seconds = 0.1 if quick else 1.0 if copy is None else 0.3
        return [_row(sample, device, dtype, seconds, copy) for sample in chosen]


def table(rows: Sequence[Row]) -> Group:
    """Returns the rows as a table, with notes on forms that are not fast."""
    found = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("op", "input", "shape", "dtype", "form"):
        found.add_column(column, overflow="fold")
    for column in ("reference ms", "form ms", "of reference", "of a copy"):
        found.add_column(column, justify="right")
    found.add_column("exact")
    for row in rows:
        first = (row.op, row.input, row.shape, row.dtype)
        if row.share is None or row.form_ms is None:
            found.add_row(*first, f"reference: {row.reason}", "", "", "", "", "")
        else:
            exact = "-" if row.exact is None else "yes" if row.exact else "NO"
            of_copy = "-" if row.of_copy is None else f"{row.of_copy:.0%}"
            times = (f"{row.reference_ms:.3f}", f"{row.form_ms:.3f}", f"{row.share:.2f}", of_copy)
            found.add_row(*first, row.form, *times, exact)
    slow = [row for row in rows if row.share is not None and row.share > FAST]
    notes = [f"Above {FAST} of the reference: {row.op}, {row.input}, {row.shape}: {row.share:.2f}" for row in slow]
    return Group(found, "Medians of calls in turns.", *notes)


def write_json(path: Path, rows: Sequence[Row], device: torch.device, threads: int | None = None) -> None:
    """Writes the rows and the facts about the machine; `threads` is the value passed to `measure`."""
    derived = [{**asdict(row), "share": row.share, "of_copy": row.of_copy} for row in rows]
    write_rows(path, derived, device, threads)


def _row(subject: Sample, device: torch.device, dtype: torch.dtype, seconds: float, copy: Copy | None = None) -> Row:
    op, args = subject.op, subject.make(device, dtype)
    name = name_of(dtype)
    about = (op.name, subject.input, subject.shape, name)
    if isinstance(args[0], torch.Tensor) and op.why_small(args[0]):
        return Row(*about, "", SMALL)
    op.forget()
    op(*args)
    decision = next(iter(op.decisions().values()), None)
    if decision is None or decision.form is None:
        return Row(*about, "", decision.reason if decision else "nothing was decided")
    form = decision.form
    reason = "; ".join(f"{name} {failure}" for name, failure in decision.tried if failure)
    exact = identical(form(*args), op.reference(*args)) if op.fidelity is Fidelity.EXACT else None
    sample = min(0.01, seconds / 100)  # a row has nine samples and more
    calls: dict[str, Callable[[], Any]] = {"reference": lambda: op.reference(*args), "form": lambda: op(*args)}
    if copy is None:
        times = in_turns(calls, device, seconds=seconds, sample=sample).seconds
        return Row(*about, form.name, reason, times["reference"] * 1e3, times["form"] * 1e3, exact)
    with counting() as counted:
        op(*args)
    copy()
    times = in_turns({**calls, "copy": copy}, device, seconds=seconds, sample=sample).seconds
    return Row(
        *(*about, form.name, reason, times["reference"] * 1e3, times["form"] * 1e3, exact),
        gb=sum(call.bytes for call in counted) / 1e9,
        kernels=tuple(dict.fromkeys(call.name for call in counted if call.is_kernel)),
        copy_gb_s=copy.bytes / times["copy"] / 1e9,
    )


def samples(device: torch.device, dtype: torch.dtype, quick: bool = False) -> list[Sample]:
    """Returns the samples for a device: inputs of all ops that have forms for it."""
    found = [*_of_tokens(device, dtype, quick), *_of_prompts(quick), *_of_videos(device, quick)]
    return [sample for sample in found if sample.op._forms_on(device.type)]


# Hidden states, queries and keys

_MODULATIONS: dict[str, Callable[..., Any]] = {
    "one row": lambda seq, dim, device, dtype: torch.randn(1, 1, dim, device=device),
    "two rows": lambda seq, dim, device, dtype: SegmentedModulation(
        torch.randn(1, 2, dim, device=device), seq // 2, seq
    ),
    "a row per token": lambda seq, dim, device, dtype: RowPerToken(
        torch.randn(1, 1, dim, device=device), torch.randn(1, seq, dim, device=device, dtype=dtype)
    ),
}


def _of_tokens(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[Sample]:
    on_cpu = device.type == "cpu"
    widths = _WIDTHS[:1] if quick else _WIDTHS
    exact: dict[str, Op[Any, Any]] = {
        "modulated norm": modulation.modulated_norm,
        "gated residual": modulation.gated_residual,
        "cast norm": modulation.cast_norm,
        "residual norm": modulation.residual_norm,
    }
    close: dict[str, Op[Any, Any]] = {
        "modulated norm": fused_norm.modulated_norm,
        "cast norm": fused_norm.cast_norm,
        "residual norm": fused_norm.residual_norm,
    }
    for kinds in (exact,) if on_cpu else (exact, close):  # on CPUs, close ops have no forms of their own
        for kind, op in kinds.items():
            for width in widths:
                for seq in _lengths(op, width, device, dtype, quick):
                    for layout in _LAYOUTS:
                        for modulated in _MODULATIONS if kind != "cast norm" else ("",):
                            yield _sample(op, kind, seq, width, layout, modulated)
    for width in widths:
        for seq in _lengths(rms_norm.rms_norm, width, device, dtype, quick):
            make = functools.partial(_for_rms_norm, seq, width)
            yield Sample(rms_norm.rms_norm, _LAYOUTS[0], f"1x{seq}x{width}", make)
        if not on_cpu:
            for seq in _lengths(fused_norm.rms_norm_rope, width, device, dtype, quick):
                shape = f"1x{seq}x{width // _HEAD}x{_HEAD}"
                make = functools.partial(_for_rms_norm_rope, seq, width)
                yield Sample(fused_norm.rms_norm_rope, _LAYOUTS[0], shape, make)
            for seq in _lengths(rms_norm.rms_norm_rope_qk, width, device, dtype, quick):
                shape = f"1x{seq}x{width // _HEAD}x{_HEAD}"
                make = functools.partial(_for_rms_norms_rope, seq, width)
                yield Sample(rms_norm.rms_norm_rope_qk, _LAYOUTS[0], shape, make)
        for seq in _lengths(rms_norm.twice_rounded, width, device, dtype, quick):
            make = functools.partial(_for_rms_norm, seq, width)
            yield Sample(rms_norm.twice_rounded, _LAYOUTS[0], f"1x{seq}x{width}", make)
        for op, both in ((rope.apply_rotary_emb, False), (rope.apply_rotary_emb_qk, True)):
            for seq in _lengths(rope.apply_rotary_emb, width, device, dtype, quick):
                shape = f"1x{seq}x{width // _HEAD}x{_HEAD}"
                yield Sample(op, _LAYOUTS[0], shape, functools.partial(_for_rope, seq, width, both))
        for seq in _lengths(rope_per_channel.apply_rotary_emb_per_channel, width, device, dtype, quick):
            shape = f"1x{seq}x{width // _HEAD}x{_HEAD}"
            make = functools.partial(_for_rope_in_halves, seq, width)
            yield Sample(rope_per_channel.apply_rotary_emb_per_channel, "pairs half a head apart", shape, make)
        for seq in _lengths(rope_addcmul.apply_rotary_emb_by_addcmul, width, device, dtype, quick):
            shape = f"1x{seq}x{width // _HEAD}x{_HEAD}"
            make = functools.partial(_for_rope_by_addcmul, seq, width)
            yield Sample(rope_addcmul.apply_rotary_emb_by_addcmul, _LAYOUTS[0], shape, make)
        for precision in (torch.float32, torch.float64):
            for seq in _lengths(rope_complex.apply_complex_rotary_emb, width, device, dtype, quick):
                if precision == torch.float32 and on_cpu:
                    seq *= 2  # less is cast: see the op
                shape = f"1x{seq}x{width // _HEAD}x{_HEAD}"
                make = functools.partial(_for_complex_rope, seq, width, precision)
                yield Sample(
                    rope_complex.apply_complex_rotary_emb, f"products in {precision}".replace("torch.", ""), shape, make
                )


def _of_prompts(quick: bool) -> Iterator[Sample]:
    for tokens in (64,) if quick else (64, 512, 1985):
        make = functools.partial(_for_prompts, tokens)
        yield Sample(conditioning.valid_first, "a third is valid", f"1x{tokens}x2048", make)


def _lengths(op: Op[Any, Any], width: int, device: torch.device, dtype: torch.dtype, quick: bool) -> Iterable[int]:
    """Returns the smallest number of tokens with a form and, unless `quick`, the usual one, on CPUs also the double."""
    like, on_cpu = torch.empty(0, dtype=dtype, device=device), device.type == "cpu"
    limits = [form.limits.least(like) for form in op._forms_on(device.type)[:1]]  # of the form that is tried first
    least = op.least_for(like) if on_cpu else max(limits, default=0)
    fewest = max(1, -(-least // width))
    if quick:
        return (fewest,)
    if not on_cpu:
        return (fewest, _TOKENS)
    return (fewest, 2 * fewest, max(_TOKENS_ON_CPU, 2 * fewest))


def _sample(op: Op[Any, Any], kind: str, seq: int, dim: int, layout: str, modulated: str) -> Sample:
    make = functools.partial(_for_block, kind, seq, dim, layout, modulated)
    return Sample(op, ", ".join(filter(None, (modulated, layout))), f"1x{seq}x{dim}", make)


def _for_block(
    kind: str, seq: int, dim: int, layout: str, modulated: str, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    def hidden() -> torch.Tensor:
        return torch.randn(1, seq, dim, device=device, dtype=dtype)

    x = hidden() if layout == _LAYOUTS[0] else torch.randn(1, dim, seq, device=device, dtype=dtype).transpose(1, 2)
    norm = torch.nn.LayerNorm(dim, 1e-6, elementwise_affine=kind == "cast norm").to(device)

    def modulations(count: int) -> tuple[Any, ...]:
        return tuple(_MODULATIONS[modulated](seq, dim, device, dtype) for _ in range(count))

    if kind == "cast norm":
        return x, norm
    if kind == "gated residual":
        return x, hidden(), *modulations(1)
    if kind == "modulated norm":
        return x, norm, *modulations(2)
    gate, scale, shift = modulations(3)
    return x, hidden(), gate, norm, scale, shift


def _for_rms_norm(seq: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return torch.randn(1, seq, dim, device=device, dtype=dtype), torch.randn(dim, device=device, dtype=dtype), 1e-6


def _for_rms_norm_rope(seq: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, cos, sin = _for_rope(seq, dim, False, device, dtype)
    return x, torch.randn(dim, device=device, dtype=dtype), 1e-6, cos, sin


def _for_rms_norms_rope(seq: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    query, key, cos, sin = _for_rope(seq, dim, True, device, dtype)
    weights = tuple(torch.randn(dim, device=device).to(dtype) for _ in range(2))
    return query, key, weights, (1e-6, 1e-6), cos, sin


def _for_rope(seq: int, dim: int, both: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    angles = torch.rand(1, seq, 1, _HEAD // 2, device=device) * 100
    x = [torch.randn(1, seq, dim // _HEAD, _HEAD, device=device, dtype=dtype) for _ in range(1 + both)]
    return *x, angles.cos(), angles.sin()


def _for_rope_by_addcmul(seq: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    angles = torch.rand(1, seq, dim // _HEAD, _HEAD // 2, device=device) * 100
    return torch.randn(1, seq, dim // _HEAD, _HEAD).to(device, dtype), angles.cos(), angles.sin()


def _for_rope_in_halves(seq: int, dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    x, cos, sin = _for_rope(seq, dim, False, device, dtype)
    return x, rope_per_channel.PairTables(cos, cos, sin, sin), True


def _for_complex_rope(
    seq: int, dim: int, precision: torch.dtype, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    x, cos, sin = _for_rope(seq, dim, False, device, dtype)
    return x, torch.complex(cos.to(precision), sin.to(precision)), precision


def _for_prompts(tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    valid = torch.arange(tokens, device=device)[None] % 3 == 0
    return torch.randn(1, tokens, 2048).to(device, dtype), valid


# Pictures and videos


def _of_videos(device: torch.device, quick: bool) -> Iterator[Sample]:
    for height, width, count in ((64, 96, 5),) if quick else ((64, 96, 5), (480, 832, 81)):
        shape = f"{count}x{height}x{width}"
        latent = (1, count, height // 8, width // 8, 4)
        yield Sample(conditioning.condition_mask, "", shape, functools.partial(_for_mask, latent))
        of_pictures = functools.partial(_for_preprocess, 1, height, width)
        yield Sample(pictures.preprocessed, "an image", f"{height}x{width}", of_pictures)
        of_pictures = functools.partial(_for_preprocess, count, height, width)
        yield Sample(pictures.preprocessed, "a video", shape, of_pictures)
        yield Sample(frames.to_uint8, "", shape, _to_bytes((count, height, width)))
        yield Sample(frames.to_float, "", shape, _to_floats((count, height, width)))
    of_last_layers = (1, 96, 4, 60, 104) if device.type == "cpu" else (1, 96, 4, 480, 832)
    features = (1, 96, 2, 16, 24) if quick else of_last_layers
    yield Sample(norm_silu.norm_silu, "", "x".join(map(str, features)), functools.partial(_for_norm_silu, features))


def _for_mask(latent: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    return *latent, device


def _for_preprocess(count: int, height: int, width: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    found = images(0, count, (width * 3 // 2, height * 3 // 2))
    processor = VideoProcessor(vae_scale_factor=8)
    return found, (height, width), device, lambda: processor.preprocess(found, height, width)


def _decoded(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return (torch.rand(1, 3, *size) * 2.2 - 1.1).to(device, dtype)


def _to_bytes(size: tuple[int, int, int]) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    def of_stock(video: torch.Tensor) -> torch.Tensor:
        found = VideoProcessor().postprocess_video(video, "pil")
        return torch.from_numpy(np.stack([np.stack([np.asarray(image) for image in batch]) for batch in found]))

    return lambda device, dtype: (_decoded(size, device, dtype), frames.video_to_uint8, of_stock, None)


def _to_floats(size: tuple[int, int, int]) -> Callable[[torch.device, torch.dtype], tuple[Any, ...]]:
    def of_stock(video: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(VideoProcessor().postprocess_video(video, "np"))

    return lambda device, dtype: (_decoded(size, device, dtype), frames.video_to_float, of_stock, None)


def _for_norm_silu(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

    from wan_patches.bindings.vae import channel_norm

    norm = WanRMS_norm(shape[1], images=False).to(device, dtype)
    x = torch.randn(shape, device=device, dtype=dtype)
    window = torch.zeros(*shape[:3], shape[3] + 2, shape[4] + 2, device=device, dtype=dtype)
    memory = norm_silu.Memory(window[..., 1:-1, 1:-1], torch.empty_like(x[:, :, -2:]))
    return x, channel_norm(norm.requires_grad_(False)), memory
