"""One of two processes under gloo: `python ranks.py RANK FOLDER CASE...` runs the cases, and pickles what they gave.

Not a test itself: `test_layouts.py` starts two of these and judges what they write to `FOLDER/RANK.pkl`. Each
case gives a value or an exception; both ranks run the same cases in the same order.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.distributed as dist

from wan_patches.executor.layouts import place
from wan_patches.testing.families import FAMILIES

CPU = torch.device("cpu")

# Families, and how a model of them differs from the usual small one: diffusers' plan for Helios names 40 blocks
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "wan_t2v": ("wan_t2v", {}, {}),
    "wan_t2v_bf16": ("wan_t2v", {"dtype": torch.bfloat16}, {}),
    "wan22_i2v": ("wan22_i2v", {}, {}),
    "wan_vace": ("wan_vace", {}, {}),
    "wan_animate": ("wan_animate", {}, {"guidance_scale": 4.0}),
    "skyreels_v2_df": ("skyreels_v2_df", {}, {}),
    "helios": ("helios", {}, {}),
    "helios_40": ("helios", {"transformer": {"num_layers": 40}}, {}),
    "helios_pyramid": ("helios_pyramid", {}, {}),
    "sana_video": ("sana_video", {}, {}),
    "chronoedit": ("chronoedit", {}, {}),
    "wan_three_heads": ("wan_t2v", {"transformer": {"num_attention_heads": 3}}, {}),
}


def build(name: str) -> Any:
    family, options, _ = MODELS[name]
    return FAMILIES[family].build(**options)


def inputs(name: str, **more: Any) -> dict[str, Any]:
    family, _, usual = MODELS[name]
    return FAMILIES[family].inputs(**{**usual, **more})


def videos(pipe: Any, name: str, layout: str = "cfg") -> list[Any]:
    """Two requests, one after the other, and one without guidance; only the first where no branches are divided."""
    requests = [{"seed": 1}, {"seed": 2, "steps": 3}, {"seed": 3, "guidance_scale": 1.0}]
    if name == "helios_40":
        requests[0]["steps"] = 1
    if layout != "cfg":
        requests = requests[:1]
    return [pipe(**inputs(name, **request)).frames for request in requests]


@contextlib.contextmanager
def counted(pipe: Any) -> Iterator[list[str]]:
    """Which denoiser computed, time after time."""
    calls: list[str] = []
    hooks = [
        next(part for part in module.modules() if isinstance(part, torch.nn.ModuleList))[0].register_forward_pre_hook(
            lambda *_, name=name: calls.append(name)
        )
        for name, module in pipe.components.items()
        if name.startswith("transformer") and module is not None
    ]
    yield calls
    for hook in hooks:
        hook.remove()


@contextlib.contextmanager
def attention_backend_kept() -> Iterator[None]:
    """A model's `set_attention_backend` sets that of all models that name none."""
    try:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
    except ImportError:  # before 0.35
        yield
        return
    before = registry._active_backend
    try:
        yield
    finally:
        registry._active_backend = before


def with_lse(pipe: Any) -> None:
    """An attention backend that ring attention can use, on a CPU, for which stock has none."""
    from diffusers.models import attention_dispatch

    def forward(
        ctx: Any, q: Any, k: Any, v: Any, mask: Any, p: Any, causal: Any, scale: Any, *_: Any, **__: Any
    ) -> Any:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.transpose(1, 2).contiguous(), lse.transpose(1, 2).contiguous()

    attention_dispatch._native_flash_attention_forward_op = forward
    for name, denoiser in pipe.components.items():
        if name.startswith("transformer") and denoiser is not None:
            denoiser.set_attention_backend("_native_flash")


# Cases


def laid_out(name: str, layout: str, parallel: Any = None) -> Any:
    pipe = build(name)
    if parallel == "ring":
        with_lse(pipe)
    place(pipe, layout, CPU, parallel)
    with counted(pipe) as calls:
        return {"videos": videos(pipe, name, layout), "calls": len(calls), "shard": shares(pipe)}


def shares(pipe: Any) -> dict[str, float]:
    """What part of each denoiser's bytes is held by this rank."""
    from torch.distributed.tensor import DTensor

    def held(parameter: torch.Tensor) -> int:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return local.untyped_storage().nbytes()

    return {
        name: sum(map(held, module.parameters())) / sum(p.numel() * p.element_size() for p in module.parameters())
        for name, module in pipe.components.items()
        if name.startswith("transformer") and module is not None
    }


def stock_parallel(name: str, parallel: str) -> Any:
    """As a user would do it by hand, with the device count that stock divides by."""
    from diffusers import ContextParallelConfig

    pipe = build(name)
    if parallel == "ring":
        with_lse(pipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        for denoiser in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if denoiser is not None:
                denoiser.enable_parallelism(config=ContextParallelConfig(**{f"{parallel}_degree": 2}))
    return {"videos": videos(pipe, name, "context")}


def sharded_properties() -> Any:
    pipe = build("wan_t2v_bf16")
    dtype, config = pipe.transformer.dtype, dict(pipe.transformer.config)
    pipe.transformer.register_parameter("a_scalar", torch.nn.Parameter(torch.tensor(2.0, dtype=dtype)))
    pipe.transformer.register_parameter("an_index", torch.nn.Parameter(torch.arange(4), requires_grad=False))
    pipe.transformer.patch_embedding.weight.data = pipe.transformer.patch_embedding.weight.data.to(
        memory_format=torch.channels_last_3d
    )
    place(pipe, "sharded", CPU)
    with torch.inference_mode():
        first = pipe(**inputs("wan_t2v_bf16", seed=1)).frames
    second = pipe(**inputs("wan_t2v_bf16", seed=1)).frames
    return {
        "dtype": pipe.transformer.dtype == dtype,
        "device": pipe.device == pipe._execution_device == pipe.transformer.device == CPU,
        "config": dict(pipe.transformer.config) == config,
        "inference mode": bool((first == second).all()),
        "share": shares(pipe)["transformer"],
    }


def cast_before_uncond() -> Any:
    """A pipeline that keeps a copy of the conditional branch, as one that casts it would."""
    pipe = build("wan_t2v")
    place(pipe, "cfg", CPU)
    denoiser = pipe.transformer
    cls = type(denoiser)

    def copying(module: Any, *args: Any, **kwargs: Any) -> Any:
        return tuple(part.clone() for part in cls.__call__(module, *args, **kwargs))

    denoiser.__class__ = type(cls.__name__, (cls,), {"__call__": copying})
    return pipe(**inputs("wan_t2v", steps=3))


def without_uncond() -> Any:
    """A pipeline that says it uses guidance and never computes the second branch."""
    import diffusers

    class Lying(diffusers.WanPipeline):
        __call__ = diffusers.WanPipeline.__call__
        asked = 0

        @property
        def do_classifier_free_guidance(self) -> bool:
            name = sys._getframe(1).f_code.co_name
            return name == "call"  # what the layout asks from

    pipe = build("wan_t2v")
    lying = Lying(**pipe.components)
    lying.set_progress_bar_config(disable=True)
    place(lying, "cfg", CPU)
    return lying(**inputs("wan_t2v"))


def not_a_number() -> Any:
    """A model whose own output is NaN, which is not the layout's business."""
    pipe = build("wan_t2v")
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    place(pipe, "cfg", CPU)
    latents = pipe(**inputs("wan_t2v", output_type="latent", steps=3)).frames
    return bool(latents.isnan().all())


def after_a_failure() -> Any:
    """A request that fails between the branches leaves nothing behind."""
    pipe = build("wan_t2v")
    place(pipe, "cfg", CPU)

    def fail(*_: Any) -> None:
        raise KeyError("in between")

    before = pipe.transformer.cache_context

    def failing(name: str, **more: Any) -> Any:
        if name == "uncond":
            raise KeyError("in between")
        return before(name, **more)

    pipe.transformer.cache_context = failing
    with contextlib.suppress(KeyError):
        pipe(**inputs("wan_t2v"))
    del pipe.transformer.cache_context
    return {"videos": videos(pipe, "wan_t2v")}


def compiled(how: str) -> Any:
    pipe = build("wan_t2v")
    if how == "in place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    place(pipe, "cfg", CPU)
    return {"videos": [pipe(**inputs("wan_t2v", seed=1)).frames]}


def cached(pipe: Any) -> Any:
    from diffusers.hooks import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.3))
    return pipe


def cached_cfg() -> Any:
    pipe = cached(build("wan_t2v"))
    place(pipe, "cfg", CPU)
    return {"videos": videos(pipe, "wan_t2v")}


def sharded_after_a_failure() -> Any:
    """A request that fails in a block leaves nothing behind."""
    pipe = build("wan_t2v")
    place(pipe, "sharded", CPU)

    def fail(*_: Any) -> None:
        hook.remove()
        raise KeyError("in a block")

    hook = pipe.transformer.blocks[1].ffn.register_forward_pre_hook(fail)
    with contextlib.suppress(KeyError):
        pipe(**inputs("wan_t2v"))
    return {"videos": videos(pipe, "wan_t2v"), "share": shares(pipe)}


def another_scheduler() -> Any:
    """A scheduler given after the pipeline was placed is watched too."""
    pipe = build("wan_t2v")
    place(pipe, "cfg", CPU)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    videos_ = [pipe(**inputs("wan_t2v", seed=1)).frames]
    copied = copy.deepcopy(pipe.scheduler)
    return {"videos": videos_, "watched": all("step" in vars(type(s)) for s in (pipe.scheduler, copied))}


def refused(name: str, layout: str, parallel: Any = None) -> Any:
    place(build(name), layout, CPU, parallel)


def wrong_degree() -> Any:
    from diffusers import ContextParallelConfig

    refused("wan_t2v", "context", ContextParallelConfig(ulysses_degree=4))


def device() -> Any:
    """What diffusers guesses from the rank, and what two transformers share."""
    pipe = build("wan22_i2v")
    place(pipe, "context", CPU)
    high, low = (part._parallel_config.context_parallel_config for part in (pipe.transformer, pipe.transformer_2))
    return {"device": high._device == low._device == CPU, "mesh": high._mesh is low._mesh}


def anything() -> Any:
    from diffusers import ContextParallelConfig

    return laid_out("wan_three_heads", "context", ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))


def backend() -> Any:
    pipe = build("wan_t2v")
    pipe.transformer.set_attention_backend("_native_math")
    place(pipe, "context", CPU)


def quantised() -> Any:
    pipe = build("wan_t2v")
    pipe.transformer.is_quantized = True
    place(pipe, "sharded", CPU)


def offloaded() -> Any:
    pipe = build("wan_t2v")
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")
    place(pipe, "sharded", CPU)


CASES: dict[str, Callable[[], Any]] = {
    **{
        f"{layout} {name}": lambda name=name, layout=layout: laid_out(name, *layout.split()[:1], *layout.split()[1:])
        for layout, names in {
            "context ulysses": ("wan_t2v", "wan22_i2v", "helios_40"),
            "context ring": ("wan_t2v", "wan22_i2v"),
            "sharded": ("wan_t2v", "wan_t2v_bf16", "wan22_i2v", "helios", "wan_vace", "wan_animate", "sana_video"),
            "cfg": (
                "wan_t2v", "wan_t2v_bf16", "wan22_i2v", "wan_vace", "wan_animate", "skyreels_v2_df", "helios",
                "helios_pyramid",
            ),
        }.items()
        for name in names
    },
    **{
        f"stock {parallel} {name}": lambda name=name, parallel=parallel: stock_parallel(name, parallel)
        for parallel, names in {
            "ulysses": ("wan_t2v", "wan22_i2v", "helios_40"),
            "ring": ("wan_t2v", "wan22_i2v"),
        }.items()
        for name in names
    },
    "sharded properties": sharded_properties,
    "sharded after a failure": sharded_after_a_failure,
    "sharded quantised": quantised,
    "sharded offloaded": offloaded,
    "cfg compiled in place": lambda: compiled("in place"),
    "cfg compiled around": lambda: compiled("around"),
    "cfg cached": cached_cfg,
    "cfg cast": cast_before_uncond,
    "cfg without uncond": without_uncond,
    "cfg not a number": not_a_number,
    "cfg after a failure": after_a_failure,
    "cfg another scheduler": another_scheduler,
    "cfg batched": lambda: refused("sana_video", "cfg"),
    "cfg no context": lambda: refused("chronoedit", "cfg"),
    "context tensor": lambda: refused("wan_t2v", "context", "tensor"),
    "context native ring": lambda: refused("wan_t2v", "context", "ring"),
    "context heads": lambda: refused("wan_three_heads", "context"),
    "context no plan": lambda: refused("sana_video", "context"),
    "context unknown": lambda: refused("wan_t2v", "context", "usp"),
    "context degree": wrong_degree,
    "context anything": anything,
    "context device": device,
    "context backend": backend,
}  # fmt: skip


def main(rank: int, folder: Path, *cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    results: dict[str, Any] = {}
    for case in cases:
        started = time.perf_counter()
        try:
            with attention_backend_kept():
                results[case] = CASES[case]()
        except Exception as error:
            results[case] = type(error)(str(error)) if isinstance(error, (ValueError, RuntimeError)) else repr(error)
        print(f"{time.perf_counter() - started:.1f} s {case}", flush=True)
        with (folder / f"{rank}.pkl").open("wb") as file:
            pickle.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
