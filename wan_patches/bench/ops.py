"""Benchmarks single operations: code of the installed diffusers against the same code with patches.

Both versions of a function are captured from diffusers once, with patches off and on, and called in turns.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.video_processor import VideoProcessor
from rich import box
from rich.console import Group
from rich.table import Table

import wan_patches
from wan_patches.bench.measure import (
    MeasurementError,
    identical,
    in_turns,
    name_of,
    peak_extra_bytes,
    using_threads,
    write_rows,
)
from wan_patches.bench.parts import AttentionWithoutLayers, block_without_layers
from wan_patches.patching.codeswap import with_code
from wan_patches.testing.families import images

CALM = 0.25  # cores
SLOWER = 0.97  # a ratio below is a bug; between this and 1, it is the noise of a median
_MIB = 1 << 20

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One operation on one kind of input: milliseconds and MiB of a call; MiB are None if memory cannot be measured.

    other_cores: the number of cores that other processes used meanwhile. Above `CALM`, times and ratios mean little.
    low, high: quartiles of the speed relative to stock, over the turns.
    cpu_ratio: the speed relative to stock by CPU seconds of all threads; None on accelerators.
    """

    op: str
    shape: str
    dtype: str
    stock_ms: float
    patched_ms: float
    stock_extra_mib: float | None
    patched_extra_mib: float | None
    exact: bool
    other_cores: float | None = None
    low: float | None = None
    high: float | None = None
    cpu_ratio: float | None = None

    @property
    def ratio(self) -> float:
        """Speed relative to stock."""
        return self.stock_ms / self.patched_ms

    @property
    def is_slower(self) -> bool | None:
        """Whether it is slower than stock by more than noise; None if the turns do not agree."""
        if self.ratio >= SLOWER:
            return False
        return None if self.high is not None and self.high >= 1 else True


@dataclass(frozen=True)
class Case:
    """The subject of a row; `make` returns the stock and the patched call on the same input."""

    op: str
    shape: str
    make: Callable[[torch.device, torch.dtype], tuple[Call, Call]]
    dtype: str | None = None  # if different from the requested one

    @property
    def name(self) -> str:
        """Operation and shape."""
        return f"{self.op} {self.shape}"


def measure(
    device: torch.device,
    dtype: torch.dtype,
    *,
    quick: bool = False,
    threads: int | None = None,
    only: str = "",
    cases: Sequence[Case] | None = None,
) -> list[Row]:
    """Measures the cases (by default all, or the smaller ones with `quick`) with `threads` threads of torch.

    Args:
        only: a part of the operation and shape of the cases to measure, such as "decode 81x480x832".

    Raises:
        MeasurementError: there is no such case.
    """
    cases = cases or _cases(quick)
    if not (chosen := [case for case in cases if only in case.name]):
        raise MeasurementError(f"No row is called {only!r}; there are: {'; '.join(case.name for case in cases)}.")
    seconds = 0.5 if quick else 3.0 if device.type == "cpu" else 1.0
    with using_threads(threads):
        return [_row(case, device, dtype, seconds) for case in chosen]


def _row(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> Row:
    with torch.no_grad():
        stock, patched = case.make(device, dtype)
        patched()  # on accelerators, the first-sight gate returns stock's result for the first call
        exact = identical(stock(), patched())
        turns = in_turns({"stock": stock, "patched": patched}, device, seconds=seconds)
        peaks = [peak_extra_bytes(call, device) for call in (stock, patched)]
    del stock, patched
    gc.collect()
    extra = [None if peak is None else peak / _MIB for peak in peaks]
    shown = case.dtype or name_of(dtype)
    cpu = [turns.cpu_seconds(name) for name in ("stock", "patched")]
    low, high = turns.spread("stock", "patched")
    return Row(
        op=case.op,
        shape=case.shape,
        dtype=shown,
        stock_ms=turns.seconds["stock"] * 1e3,
        patched_ms=turns.seconds["patched"] * 1e3,
        stock_extra_mib=extra[0],
        patched_extra_mib=extra[1],
        exact=exact,
        other_cores=turns.other_cores,
        low=low,
        high=high,
        cpu_ratio=cpu[0] / cpu[1] if cpu[0] and cpu[1] else None,
    )


# Output


def table(rows: Sequence[Row]) -> Group:
    """Returns the rows as a table, with notes on rows that are slower than stock."""
    found = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("op", "shape", "dtype"):
        found.add_column(column, overflow="fold")
    for column in ("stock ms", "patched ms", "ratio", "middle half", "CPU time", "stock MiB", "patched MiB"):
        found.add_column(column, justify="right")
    found.add_column("exact")
    for row in rows:
        busy = "~" if _is_disturbed(row) else ""
        spread = "-" if row.low is None else f"{row.low:.2f}-{row.high:.2f}"
        cpu = "-" if row.cpu_ratio is None else f"{row.cpu_ratio:.2f}x"
        times = (_number(row.stock_ms), _number(row.patched_ms), f"{busy}{row.ratio:.2f}x", spread, cpu)
        memory = (_number(row.stock_extra_mib), _number(row.patched_extra_mib))
        found.add_row(row.op, row.shape, row.dtype, *times, *memory, "yes" if row.exact else "NO")
    notes = [
        "Medians of calls in turns, and the middle half of their ratios. CPU time: the ratio by CPU seconds of all "
        "threads. MiB: peak of a call beyond what was held before, its result included."
    ]
    if disturbed := sum(map(_is_disturbed, rows)):
        most = max(row.other_cores or 0.0 for row in rows)
        notes.append(
            f"~ in {disturbed} of {len(rows)} rows: other processes kept up to {most:.1f} cores busy. Run again."
        )
    notes += [f"Slower than stock: {row.op} {row.shape}, {row.ratio:.2f}x" for row in rows if row.is_slower]
    unsure = [f"{row.op} {row.shape}, {row.ratio:.2f}x" for row in rows if row.is_slower is None]
    notes += [f"Slower or not? The turns do not agree, run again: {what}" for what in unsure]
    return Group(found, *notes)


def _is_disturbed(row: Row) -> bool:
    return row.other_cores is not None and row.other_cores > CALM


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}" if value < 1 else f"{value:.2f}"


def write_json(path: Path, rows: Sequence[Row], device: torch.device, threads: int | None = None) -> None:
    """Writes the rows and the facts about the machine; `threads` is the value passed to `measure`."""
    write_rows(path, [{**asdict(row), "ratio": row.ratio} for row in rows], device, threads)


# The cases


def _cases(quick: bool) -> list[Case]:
    frames = 17 if quick else 81
    pictures = 9 if quick else 81
    cases = [_rope((1, 4095, 40, 128)), _rope((1, 4095, 12, 128))]
    if not quick:
        cases.append(_rope((1, 32760, 12, 128)))
    blocks = [_block((1, 4095, 1536)), _block((1, 4095, 1536), "a row per token")]
    if _has("transformer_helios"):
        cases.append(_helios_rope((1, 4095, 40, 128)))
        blocks.append(_block((1, 4095, 1536), "Helios, two rows", split_index=2559))
    return [
        *cases,
        *_relatives(1024 if quick else 4096),
        *(blocks if quick else [_block((1, 4095, 5120)), *blocks]),
        *_strided_blocks(),
        _qk_norms((1, 4095, 1536)),
        _rope((1, 4095, 12, 44), "rope, odd head size"),
        _rope((1, 64, 2, 32), "rope, tiny"),
        _rope((1, 4095, 12, 128), "rope, view of a fused projection", fused=True),
        *(_blend(model, shape, overlap, way) for model, shape, overlap in _TILES for way in ("blend_v", "blend_h")),
        Case("condition mask", "81x480x832", _condition_mask, "fp32"),
        Case("image preprocess", "1280x720 to 832x480", _preprocess, "uint8"),
        Case("video preprocess", f"{pictures} of 1280x720 to 832x480", _preprocess_video(pictures), "uint8"),
        Case("frames to pil", f"{frames}x480x832", _postprocess(frames, "pil")),
        Case("frames to np", f"{frames}x480x832", _postprocess(frames, "np")),
    ]


def _both(take: Callable[[], Any]) -> tuple[Any, Any]:
    """Returns the results of `take` with patches off and on."""
    with wan_patches.enabled(()):
        stock = take()
    with wan_patches.enabled():
        return stock, take()


def _method(cls: type, name: str) -> types.FunctionType:
    """Returns a copy of the method with its current code, independent of later changes."""
    function = inspect.unwrap(getattr(cls, name))
    return with_code(function, function.__code__)


def _wan_rope() -> types.FunctionType:
    module = importlib.import_module("diffusers.models.transformers.transformer_wan")
    code = inspect.unwrap(module.WanAttnProcessor.__call__).__code__
    nested = next(c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == "apply_rotary_emb")
    return types.FunctionType(nested, vars(module))


def _tables(seq: int, dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    angles = (torch.rand(1, seq, 1, dim // 2) * 100).repeat_interleave(2, dim=-1)
    return angles.cos().to(device), angles.sin().to(device)


def _rope(shape: tuple[int, int, int, int], op: str = "rope", *, fused: bool = False) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        _, seq, heads, dim = shape
        stock, patched = _both(_wan_rope)
        if fused:
            x = torch.randn(1, seq, 3 * heads * dim).to(device, dtype).chunk(3, dim=-1)[0].unflatten(2, (heads, -1))
        else:
            x = torch.randn(shape).to(device, dtype)
        tables = _tables(seq, dim, device)
        return lambda: stock(x, *tables), lambda: patched(x, *tables)

    return Case(op, _by(shape), make)


def _has(module: str) -> bool:
    return importlib.util.find_spec(f"diffusers.models.transformers.{module}") is not None


def _helios_rope(shape: tuple[int, int, int, int]) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        module: Any = importlib.import_module("diffusers.models.transformers.transformer_helios")
        stock, patched = _both(lambda: _method(module, "apply_rotary_emb_transposed"))
        x = torch.randn(shape).to(device, dtype)
        both = torch.cat(_tables(shape[1], shape[3], device), dim=-1).squeeze(2)
        return lambda: stock(x, both), lambda: patched(x, both)

    return Case("rope, Helios", _by(shape), make)


def _relatives(seq: int) -> list[Case]:
    """Returns the rotary embeddings of other models, at their published numbers of heads and channels."""

    def angles(dim: int, device: torch.device) -> torch.Tensor:
        return torch.rand(seq, dim // 2).to(device) * 100

    def neighbours(dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = _tables(seq, dim, device)
        return cos[0, :, 0], sin[0, :, 0]

    def halves(dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        full = torch.cat([angles(dim, device)] * 2, dim=-1)
        return full.cos(), full.sin()

    def numbers(dim: int, device: torch.device) -> torch.Tensor:
        found = angles(dim, device)
        return torch.polar(torch.ones_like(found), found)

    def matrices(dim: int, device: torch.device) -> torch.Tensor:
        found = angles(dim, device)
        return torch.stack((found.cos(), -found.sin(), found.sin(), found.cos()), dim=-1).unflatten(-1, (2, 2))

    shared = "embeddings", "apply_rotary_emb"
    of_tokens, of_heads = (1, seq, 24, 128), (1, 24, seq, 128)
    found = [
        _relative("Flux", *shared, of_tokens, neighbours, True, -1, 1),
        _relative("HunyuanDiT, CogVideoX", *shared, of_heads, neighbours),
        _relative("Cosmos, CogView 4", *shared, of_heads, halves, True, -2),
        _relative(
            "LTX-Video",
            "transformers.transformer_ltx",
            "apply_rotary_emb",
            (1, seq, 2048),
            lambda dim, device: tuple(table[None] for table in neighbours(dim, device)),
        ),
        _relative(
            "Qwen-Image", "transformers.transformer_qwenimage", "apply_rotary_emb_qwen", of_tokens, numbers, False
        ),
        _relative(
            "HiDream, queries and keys",
            "transformers.transformer_hidream_image",
            "apply_rope",
            (1, seq, 20, 128),
            lambda dim, device: matrices(dim, device)[None, :, None],
            both=True,
        ),
    ]
    if _has("transformer_anyflow"):
        found.append(
            _relative(
                "AnyFlow",
                "transformers.transformer_anyflow",
                "apply_rotary_emb",
                of_heads,
                lambda dim, device: numbers(dim, device)[None, None].to(torch.complex128),
            )
        )
    return found


def _relative(
    model: str,
    module: str,
    function: str,
    shape: tuple[int, ...],
    table: Callable[[int, torch.device], Any],
    *options: Any,
    both: bool = False,
) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        of_models: Any = importlib.import_module(f"diffusers.models.{module}")
        stock, patched = _both(lambda: _method(of_models, function))
        xs = [torch.randn(shape).to(device, dtype) for _ in range(1 + both)]
        tables = table(shape[-1], device)
        return lambda: stock(*xs, tables, *options), lambda: patched(*xs, tables, *options)

    return Case(f"rope, {model}", _by(shape), make)


def _strided_blocks() -> list[Case]:
    """Returns cases of blocks whose hidden states have the memory layout of the preceding convolution's output."""
    shape, families = (1, 4096, 1536), ("chronoedit", "skyreels_v2")
    return [_of_family(shape, family) for family in families if _has(f"transformer_{family}")] + [
        _of_family(shape, "wan", "VACE")
    ]


def _of_family(shape: tuple[int, int, int], family: str, name: str = "") -> Case:
    block = {"skyreels_v2": "SkyReelsV2TransformerBlock"}.get(family, "WanTransformerBlock")

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        batch, seq, dim = shape
        module = importlib.import_module(f"diffusers.models.transformers.transformer_{family}")
        stock, patched = _both(lambda: _method(getattr(module, block), "forward"))
        around = block_without_layers(dim, device)
        x = torch.randn(batch, dim, seq).to(device, dtype).transpose(1, 2)
        temb = torch.randn(1, 6, dim).to(device, dtype)
        rest = (None,) * (stock.__code__.co_argcount - 4)  # the text precedes `temb`; tables and a mask follow
        return lambda: stock(around, x, None, temb, *rest), lambda: patched(around, x, None, temb, *rest)

    return Case(f"block without its layers, {name or family}, as convolutions leave it", _by(shape), make)


def _block(shape: tuple[int, int, int], kind: str = "", *, split_index: int | None = None) -> Case:
    """Returns the case of a block with no-op attention and feed-forward: modulated norms, gated residuals and casts.

    kind: the kind of modulation; if empty, one row for all tokens. split_index: the index that separates two rows.
    """

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        from wan_patches.ops.modulation import SegmentedModulation

        _, seq, dim = shape
        family = "Wan" if split_index is None else "Helios"
        module = importlib.import_module(f"diffusers.models.transformers.transformer_{family.lower()}")
        stock, patched = _both(lambda: _method(getattr(module, f"{family}TransformerBlock"), "forward"))
        around = block_without_layers(dim, device)
        x = torch.randn(shape).to(device, dtype)
        of_stock: Any = torch.randn(1, 6, dim).to(device, dtype)
        of_patched: Any = of_stock
        if split_index is not None:
            of_patched = SegmentedModulation(torch.randn(1, 2, 6, dim).to(device, dtype), split_index, seq)
            of_stock = of_patched.dense()
        elif kind:
            of_patched = of_stock = torch.randn(1, seq, 6, dim).to(device, dtype)
        return lambda: stock(around, x, None, of_stock, None), lambda: patched(around, x, None, of_patched, None)

    return Case(", ".join(filter(None, ("block without its layers", kind))), _by(shape), make)


def _qk_norms(shape: tuple[int, int, int]) -> Case:
    """Returns the case of a processor with no-op projections and attention, without rotation: the norms of q and k."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        module: Any = importlib.import_module("diffusers.models.transformers.transformer_wan")
        _, _, dim = shape
        x, norm = torch.randn(shape).to(device, dtype), torch.nn.RMSNorm(dim, eps=1e-6).to(device, dtype)
        around = AttentionWithoutLayers(dim // 128, x, x, norm)
        processor = SimpleNamespace(_attention_backend=None, _parallel_config=None)

        def take() -> types.FunctionType:
            code = inspect.unwrap(module.WanAttnProcessor.__call__).__code__
            names = {**vars(module), "dispatch_attention_fn": around.attend}
            return types.FunctionType(code, names, argdefs=(None,) * 3)

        def call(attention: types.FunctionType) -> Call:
            def norms() -> list[torch.Tensor]:
                attention(processor, around, x)
                return list(around.attended)

            return norms

        stock, patched = _both(take)
        return call(stock), call(patched)

    return Case("RMS norms of q and k", _by(shape), make)


#: Autoencoders, tiles of theirs as their own settings cut them, and how many rows or columns overlap.
_TILES = (("AutoencoderKL", (1, 3, 512, 512), 128), ("AutoencoderKLHunyuanVideo", (1, 3, 17, 256, 256), 64))


def _blend(model: str, shape: tuple[int, ...], overlap: int, method: str) -> Case:
    """Returns the blending of two tiles, and a copy of the tile that it changes."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        stock, patched = _both(lambda: _method(getattr(diffusers, model), method))
        before, tile = torch.randn(2, *shape).to(device, dtype).unbind()
        return lambda: stock(None, before, tile.clone(), overlap), lambda: patched(None, before, tile.clone(), overlap)

    return Case(f"tiles, {model}, {'rows' if method == 'blend_v' else 'columns'}", _by(shape), make)


def _condition_mask(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
    """Returns calls of `prepare_latents` with a VAE without channels: only the mask and its concatenation remain."""
    from diffusers import WanImageToVideoPipeline

    stock, patched = _both(lambda: _method(WanImageToVideoPipeline, "prepare_latents"))
    none = torch.empty(1, 0, 21, 60, 104, device=device)
    pipe = SimpleNamespace(
        vae=_NoVae(none),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        config=SimpleNamespace(expand_timesteps=False),
    )
    image = torch.empty(1, 0, 480, 832, device=device)

    def call(prepare: Callable[..., Any]) -> Call:
        return lambda: prepare(pipe, image, 1, 0, 480, 832, 81, torch.float32, device, None, none)

    return call(stock), call(patched)


class _NoVae(torch.nn.Module):
    config = SimpleNamespace(latents_mean=[], latents_std=[], z_dim=0)
    dtype = torch.float32

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("latents", latents)  # determines the device, as in a real VAE
        self.device = latents.device

    def encode(self, video: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self.latents)


def _preprocess(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
    from wan_patches.bindings.preprocess import preprocess

    processor, (picture,) = VideoProcessor(vae_scale_factor=8), images(0, 1, (1280, 720))
    size = {"height": 480, "width": 832}
    return (
        lambda: processor.preprocess(picture, **size).to(device, dtype=torch.float32),
        lambda: preprocess(processor, device, picture, **size).to(device, dtype=torch.float32),
    )


def _preprocess_video(count: int) -> Callable[[torch.device, torch.dtype], tuple[Call, Call]]:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        from wan_patches.bindings.preprocess import preprocess_video

        processor, pictures = VideoProcessor(vae_scale_factor=8), images(0, count, (1280, 720))
        size = {"height": 480, "width": 832}
        return (
            lambda: processor.preprocess_video(pictures, **size).to(device, dtype=torch.float32),
            lambda: preprocess_video(processor, device, pictures, **size).to(device, dtype=torch.float32),
        )

    return make


def _postprocess(frames: int, output_type: str) -> Callable[[torch.device, torch.dtype], tuple[Call, Call]]:
    def make(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call]:
        stock, patched = _both(lambda: _method(VideoProcessor, "postprocess_video"))
        processor = VideoProcessor(vae_scale_factor=8)
        video = (torch.rand(1, 3, frames, 480, 832) * 2.2 - 1.1).to(device, dtype)
        return lambda: stock(processor, video, output_type), lambda: patched(processor, video, output_type)

    return make


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
