"""One of several processes under gloo that share a VAE: `python vae_ranks.py RANK RANKS FOLDER CASE...`.

Not a test itself: `test_vae_parallel.py` starts these and judges what they write to `FOLDER/RANK.pkl`. Each case
gives a value or an exception; all ranks run the same cases in the same order.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist

from wan_patches.executor.layouts import place
from wan_patches.patches.vae_tiling import PATCHES
from wan_patches.patching.registry import Registry
from wan_patches.testing.families import FAMILIES, available
from wan_patches.vae_parallel import parallelize_vae

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Share = Callable[[Any], AbstractContextManager[Any]]


def alone(vae: Any) -> AbstractContextManager[Any]:
    """As stock does it."""
    return nullcontext()


@functools.cache
def _vae(family: str, dtype: str) -> Any:
    return FAMILIES[family].build(vae_dtype=DTYPES[dtype]).vae


def vae(family: str = "wan_t2v", dtype: str = "fp32") -> Any:
    return copy.deepcopy(_vae(family, dtype))


def tiles(height: int, width: int, stride_height: int, stride_width: int) -> dict[str, int]:
    return {
        "tile_sample_min_height": height,
        "tile_sample_min_width": width,
        "tile_sample_stride_height": stride_height,
        "tile_sample_stride_width": stride_width,
    }


SMALL = tiles(64, 80, 48, 48)


@dataclass(frozen=True)
class Case:
    """A video or latents through a VAE; `sizes` are batch, frames, height and width."""

    kind: str
    sizes: tuple[int, int, int, int]
    family: str = "wan_t2v"
    dtype: str = "fp32"
    tiles: Any = None  # None: no tiling
    slicing: bool = False
    patched: bool = False
    seed: int = 0

    def input(self, model: Any) -> torch.Tensor:
        batch, *rest = self.sizes
        channels = model.config.z_dim if self.kind == "decode" else 3
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn((batch, channels, *rest), generator=generator).to(DTYPES[self.dtype])

    @torch.no_grad()
    def __call__(self, share: Share, model: Any = None) -> torch.Tensor:
        model = model or vae(self.family, self.dtype)
        if self.tiles:
            model.enable_tiling(**self.tiles)
        if self.slicing:
            model.enable_slicing()
        x = self.input(model).to(model.dtype)
        patches = Registry(PATCHES).enabled(strict=True) if self.patched else nullcontext()
        with patches, share(model):
            if self.kind == "decode":
                return model.decode(x, return_dict=False)[0]
            return model.encode(x).latent_dist.parameters

    def reference(self) -> torch.Tensor:
        """Of the same weights and input, in float64."""
        return self(alone, vae(self.family, self.dtype).double())


TILED = {
    **{
        f"decode {frames}x{height}x{width} {dtype}": Case("decode", (1, frames, height, width), "wan_t2v", dtype, SMALL)
        for frames, height, width in ((1, 15, 21), (2, 9, 11), (3, 7, 12), (1, 8, 40), (1, 5, 5))
        for dtype in (DTYPES if frames < 3 else ("fp32",))
    },
    **{
        f"encode {frames}x{height}x{width} {dtype}": Case("encode", (1, frames, height, width), "wan_t2v", dtype, SMALL)
        for frames, height, width in ((1, 120, 168), (5, 72, 88), (9, 61, 95), (1, 64, 200))
        for dtype in (DTYPES if frames < 5 else ("fp32",))
    },
    "decode batch": Case("decode", (2, 2, 9, 11), tiles=SMALL),
    "decode slices": Case("decode", (3, 1, 9, 11), tiles=SMALL, slicing=True),
    "encode slices": Case("encode", (2, 1, 72, 88), tiles=SMALL, slicing=True),
    "decode without overlap": Case("decode", (1, 1, 9, 11), tiles=tiles(32, 32, 32, 32)),
    "decode odd tiles": Case("decode", (1, 1, 9, 11), tiles=tiles(40, 56, 24, 40)),
    "decode patched": Case("decode", (1, 2, 9, 11), tiles=SMALL, patched=True),
    "encode patched bf16": Case("encode", (1, 5, 72, 88), dtype="bf16", tiles=SMALL, patched=True),
    "decode residual": Case("decode", (1, 2, 9, 11), "wan22_ti2v", tiles=tiles(128, 128, 96, 96)),
    "decode residual bf16": Case("decode", (1, 2, 9, 11), "wan22_ti2v", "bf16", tiles=tiles(128, 128, 96, 96)),
    "encode residual": Case("encode", (1, 5, 160, 192), "wan22_ti2v", tiles=tiles(128, 128, 96, 96)),
}  # fmt: skip

# On CPUs torch computes convolutions of fewer than 20480 numbers in another way than larger ones, which rounds more or
# less: where parts are on the side of the whole, errors can be compared closely
CLOSELY = (
    ("wan_t2v", "decode", 2, 10, 15),
    ("wan_t2v", "decode", 3, 4, 4),
    ("wan_t2v", "encode", 1, 160, 216),
    ("wan_t2v", "encode", 5, 48, 48),
    ("wan22_ti2v", "decode", 2, 9, 11),
    ("wan22_ti2v", "encode", 5, 96, 96),
)
ROUGHLY = (
    ("wan_t2v", "decode", 3, 4, 17),
    ("wan_t2v", "encode", 5, 72, 88),
    ("wan_t2v", "encode", 1, 75, 90),
    ("wan22_ti2v", "encode", 5, 144, 96),
)
SLABS = {
    **{
        f"{family} {kind} {frames}x{height}x{width} {seed}": Case(kind, (1, frames, height, width), family, seed=seed)
        for family, kind, frames, height, width in (*CLOSELY, *ROUGHLY)
        for seed in range(3)
    },
    "decode batch": Case("decode", (2, 1, 9, 11)),
    "decode patched": Case("decode", (1, 1, 9, 11), patched=True),
}  # fmt: skip
SLABS = {name: case for name, case in SLABS.items() if case.family in available()}
TILED = {name: case for name, case in TILED.items() if case.family in available()}

# Pipelines, and the layouts that they are tried with; frames of several tiles, and of conditions

LAYOUTS = {
    "wan22_i2v": ("context", "cfg", "sharded"),
    "wan_vace": ("sharded",),
    "wan_animate": ("cfg",),  # encodes again what it has decoded
    "helios": ("cfg", "sharded"),
    "wan22_ti2v": ("cfg",),
}


def tiled(name: str) -> Any:
    """A pipeline whose VAE has small tiles."""
    pipe = FAMILIES[name].build()
    pipe.vae.enable_tiling(**(SMALL if name != "wan22_ti2v" else tiles(128, 128, 96, 96)))
    return pipe


def untiled(name: str) -> Any:
    return FAMILIES[name].build()


def request(name: str) -> dict[str, Any]:
    size = {"wan22_ti2v": (224, 160), "helios": (128, 64)}.get(name, (112, 96))
    return FAMILIES[name].inputs(seed=1, size=size)


def video(pipe: Any, name: str) -> Any:
    return pipe(**request(name)).frames


def laid_out(name: str, layout: str) -> Any:
    pipe = tiled(name)
    place(pipe, layout, CPU, vae_parallel=True)
    return video(pipe, name)


def turned_on() -> Any:
    """Tiling is turned on with the tiles that the VAE has, and off again."""
    model = vae()
    model.enable_tiling(**SMALL)
    model.disable_tiling()
    before = type(model)
    with parallelize_vae(model):
        inside = model.use_tiling, isinstance(model, before), type(model).__name__
        copied = copy.deepcopy(model)
        result = Case("decode", (1, 2, 9, 11))(alone, model)
        again = Case("decode", (1, 2, 9, 11))(alone, copied)
    return {"inside": inside, "after": (model.use_tiling, type(model) is before), "same": torch.equal(result, again),
            "result": result}  # fmt: skip


def shares() -> Any:
    """What this rank computes of a decode: numbers, tile by tile."""
    model = vae()
    computed: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    Case("decode", (1, 1, 21, 15), tiles=SMALL)(parallelize_vae, model)
    return computed


def failing() -> Any:
    """The last rank cannot compute its tiles; the next call works."""
    model = vae()
    case = Case("decode", (1, 1, 9, 11), tiles=SMALL)
    with parallelize_vae(model):
        hook = None
        if dist.get_rank() == dist.get_world_size() - 1:
            hook = model.decoder.register_forward_pre_hook(lambda *_: {}["nothing"])
        try:
            case(alone, model)
            said = "nothing"
        except (KeyError, RuntimeError) as error:
            said = f"{type(error).__name__}: {error}"
        if hook is not None:
            hook.remove()
        return {"said": said, "result": case(alone, model)}


def recorded(mode: str) -> Any:
    """With gradients, every rank computes everything."""
    model = vae()
    model.requires_grad_(False)
    case = Case("decode", (1, 1, 9, 11))
    if mode == "tiles":
        model.enable_tiling(**SMALL)
    with parallelize_vae(model, mode=mode) if dist.is_initialized() else nullcontext():
        z = case.input(model).requires_grad_()
        model.decode(z).sample.square().sum().backward()
        return z.grad


def compiled(mode: str) -> Any:
    model = vae()
    if mode == "tiles":
        model.enable_tiling(**SMALL)
    with parallelize_vae(model, mode=mode) if dist.is_initialized() else nullcontext(), torch.no_grad():
        decode = torch.compile(model.decode, backend="eager")
        return decode(Case("decode", (1, 1, 9, 11)).input(model)).sample


def subgroup() -> Any:
    """A group of the last two of all ranks."""
    members = range(dist.get_world_size() - 2, dist.get_world_size())
    group = dist.new_group(list(members))
    if dist.get_rank() not in members:
        return None
    results = []
    for mode in ("tiles", "spatial"):
        case = Case("decode", (1, 1, 9, 11), tiles=SMALL if mode == "tiles" else None)
        results.append(case(lambda model, mode=mode: parallelize_vae(model, group, mode)))
    return results


def refused(**options: Any) -> Any:
    options = {"sizes": (1, 1, 9, 11), "tiles": None, **options}
    return Case("decode", **options)(functools.partial(parallelize_vae, mode="spatial"))


def tiling_later() -> Any:
    model = vae()
    with parallelize_vae(model, mode="spatial"):
        return Case("decode", (1, 1, 9, 11), tiles=SMALL)(alone, model)


def twice() -> Any:
    model = vae()
    with parallelize_vae(model):
        parallelize_vae(model)


def bypassed() -> Any:
    """Someone computes a convolution without calling the module."""
    model = vae()
    conv = model.decoder.conv_in
    model.decoder.conv_in = torch.nn.Identity()
    model.decoder.conv_in.forward = lambda x, cache: type(conv).forward(conv, x, cache)
    model.decoder.conv_in.hidden = conv
    return Case("decode", (1, 1, 9, 11))(functools.partial(parallelize_vae, mode="spatial"), model)


CASES: dict[str, Callable[[], Any]] = {
    **{f"tiles {name}": functools.partial(case, parallelize_vae) for name, case in TILED.items()},
    **{
        f"slabs {name}": functools.partial(case, functools.partial(parallelize_vae, mode="spatial"))
        for name, case in SLABS.items()
    },
    "turned on": turned_on,
    "shares": shares,
    "failing": failing,
    "recorded tiles": functools.partial(recorded, "tiles"),
    "recorded spatial": functools.partial(recorded, "spatial"),
    "compiled tiles": functools.partial(compiled, "tiles"),
    "compiled spatial": functools.partial(compiled, "spatial"),
    "subgroup": subgroup,
    "refused small": functools.partial(refused, sizes=(1, 1, 1, 1)),
    "refused tiling": functools.partial(refused, tiles=SMALL),
    "refused tiling later": tiling_later,
    "refused twice": twice,
    "refused bypassed": bypassed,
}
PIPELINES = {
    f"{layout} {name}": functools.partial(laid_out, name, layout)
    for name, layouts in LAYOUTS.items()
    for layout in layouts
    if name in available()
}


def main(rank: int, size: int, folder: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    results: dict[str, Any] = {}
    for case in cases:
        started = time.perf_counter()
        try:
            results[case] = {**CASES, **PIPELINES}[case]()
        except Exception as error:
            results[case] = type(error)(str(error)) if isinstance(error, (ValueError, RuntimeError)) else repr(error)
        print(f"{time.perf_counter() - started:.1f} s {case}", flush=True)
        with (folder / f"{rank}.pkl").open("wb") as file:
            pickle.dump(results, file)
    with contextlib.suppress(Exception):  # another rank may have left
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
