"""How a pipeline lies on the devices of its group of processes.

    inline, replicas   whole, on one device
    context            every device works on a part of each sequence: diffusers' own parallel modes
    cfg                two devices: one computes the conditional branch of guidance, one the unconditional
    sharded            every device holds a part of the denoiser's weights and gathers them block by block (FSDP2)

In the last three, every rank of the group makes the same call with the same arguments, and rank 0 has the result.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from wan_patches.executor.sharding import is_sharded, make_mesh, shard, sharding_on_load
from wan_patches.patching.objects import exchange_class

__all__ = ["LAYOUTS", "device_named", "loading_sharded", "place", "resolve"]

LAYOUTS = ("inline", "replicas", "context", "cfg", "sharded")

PARALLEL = ("ulysses", "ring", "tensor")
WITHOUT_LSE = ("native", "_native_npu")  # in all versions from 0.36 to 0.42; stock raises in the first step


def resolve(
    layout: str,
    devices: Sequence[torch.device],
    group_size: int | None,
    parallel: Any,
    vae_parallel: bool | str = False,
) -> tuple[str, int]:
    """The layout that the options of an executor mean ("auto" is none), and how many devices work on a request.

    Raises ValueError for options that do not go together; the message says which do.
    """
    if layout == "auto":
        layout = "inline" if len(devices) == 1 else "replicas"
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: auto, {', '.join(LAYOUTS)}")
    if parallel is not None and layout != "context":
        raise ValueError(f'parallel={parallel!r} is for layout="context", not {layout!r}')
    _vae_mode(layout, vae_parallel)
    if layout in ("inline", "replicas"):
        if group_size not in (None, 1):
            raise ValueError(
                f"in layout {layout!r} one device works on a request; group_size={group_size} is for "
                "context, cfg and sharded"
            )
        if layout == "inline" and len(devices) > 1:
            raise ValueError(
                f'layout "inline" uses one device, and there are {len(devices)}; name one (devices='
                f'"{devices[0]}"), or use "replicas"'
            )
        return layout, 1
    size = group_size or (2 if layout == "cfg" else len(devices))
    if size < 2 or len(devices) % size:
        raise ValueError(f"layout {layout!r} wants groups of {max(size, 2)} devices, and there are {len(devices)}")
    if layout == "cfg" and size != 2:
        raise ValueError(f"guidance has two branches: layout 'cfg' works with groups of 2 devices, not {size}")
    return layout, size


def device_named(name: str | torch.device) -> torch.device:
    """The device; one of an NPU brings torch_npu, without which torch does not know the word."""
    if str(name).startswith("npu"):
        import torch_npu  # noqa: F401
    return torch.device(name)


def place(pipe: Any, layout: str, device: torch.device, parallel: Any = None, vae_parallel: bool | str = False) -> None:
    """Puts a pipeline on its device or devices, once, in every rank of its group.

    With more than one rank, `torch.distributed` must be initialised, with this group as its world and a backend
    for `device.type`. A pipeline that is offloaded or has a device map is not moved, nor is one that is there, nor a
    part that bitsandbytes has quantised. What has no `to` is left alone by "inline" and "replicas".

    layout: one of `LAYOUTS`.
    device: of this rank; it becomes the current one.
    parallel: for "context": "ulysses" (None means that), "ring" or "tensor" over all ranks of the group, or a
        `ParallelConfig`, `ContextParallelConfig` or `TensorParallelConfig` of diffusers.
    vae_parallel: for "context", "cfg" and "sharded": True or "tiles", or "spatial", has all ranks of the group share
        the work of the VAE; see `wan_patches.parallelize_vae`. "tiles" turns its tiling on.

    "sharded" and "cfg" compute what one device would, in the same order: the bits are the same wherever a kernel's
    are from call to call. The modes of "context" are diffusers' own: Ulysses runs the same kernels on fewer heads and
    tokens, ring and tensor parallelism add up in another order.

    Raises ValueError for what cannot be laid out so, with the reason, and RuntimeError for an installed torch or
    diffusers that is too old. Under "cfg", a pipeline that does not use guidance as expected raises RuntimeError when
    it is called, in both ranks.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    if parallel is not None and layout != "context":
        raise ValueError(f"`parallel` belongs to the layout 'context', not to {layout!r}")
    mode = _vae_mode(layout, vae_parallel)
    if mode is not None:
        _check_vae(pipe)
    device = _make_current(torch.device(device))
    if layout == "context":
        denoisers = _denoisers(pipe, layout)
        config = _parallel_config(denoisers, parallel, _world(layout))
        _move(pipe, device)
        for denoiser in denoisers:
            _enable_parallelism(denoiser, config, device)
    elif layout == "sharded":
        _shard(pipe, _denoisers(pipe, layout), device, _world(layout))
    elif layout == "cfg":
        denoisers = _denoisers(pipe, layout)
        _world(layout)
        _check_guidance(pipe, denoisers)
        _move(pipe, device)
        _Guidance(pipe).install(denoisers)
    else:
        _move(pipe, device)
    if mode is not None:
        from wan_patches.vae_parallel import parallelize_vae

        parallelize_vae(pipe.vae, mode=mode)


@contextmanager
def loading_sharded(device: torch.device) -> Iterator[None]:
    """Inside, transformers and UNets that diffusers loads are divided among the ranks while they are read.

        with loading_sharded(device):
            pipe = DiffusionPipeline.from_pretrained("Wan-AI/Wan2.2-T2V-A14B-Diffusers", torch_dtype=torch.bfloat16)
        place(pipe, "sharded", device)

    Without it, each rank has all weights in memory before `place` divides them. With it, a rank reads and holds only
    its rows of each parameter, from safetensors files in one or many parts, with the dtypes and values of stock; it
    does not matter whether the pipeline or the model's own `from_pretrained` loads. What else a pipeline has (text
    encoders, VAE) is loaded as ever, whole in every rank. A model that is quantised, has a device map, is stored in
    another format, or is made with `low_cpu_mem_usage=False` or without `accelerate` is loaded whole, and a warning of
    the logger "wan_patches" says why.

    device: of this rank, as for `place`; `torch.distributed` must be initialised in the same way. All ranks load the
        same models in the same order.

    On a CPU, stock leaves weights that keep their dtype in the mapped file, at any address, where kernels may round
    otherwise (by 3e-6 in a small float32 model); from weights in memory of their own come the same bits as here.

    Every thread of the process that loads meanwhile is meant. LoRA weights that are to be fused must be fused into a
    model that was loaded without this.

    Raises RuntimeError for a torch without FSDP2, and ValueError for fewer than two ranks. Loading raises ValueError
    for weights that are missing or have another shape, which it names.
    """
    device, world = _make_current(torch.device(device)), _world("sharded")
    with sharding_on_load(make_mesh(device, world), device):
        yield


# Devices and components


def _make_current(device: torch.device) -> torch.device:
    """The device with its index, made the current one: meshes and FSDP take that for granted."""
    if device.type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(device)
    if device.index is None:
        device = torch.device(device.type, module.current_device())
    module.set_device(device)
    torch.empty(0, device=device)  # a mesh sets the device itself where it finds none initialised
    return device


def _modules(pipe: Any) -> dict[str, nn.Module]:
    components = getattr(pipe, "components", None)
    if not isinstance(components, dict):
        return {}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _denoisers(pipe: Any, layout: str) -> list[nn.Module]:
    modules = _modules(pipe)
    found = [module for name, module in modules.items() if name.startswith(("transformer", "unet"))]
    if not found:
        raise ValueError(
            f"layout {layout!r} needs a diffusers pipeline with a `transformer` or a `unet`; {type(pipe).__name__} has "
            + (", ".join(modules) or "no components")
        )
    return found


def _vae_mode(layout: str, vae_parallel: bool | str) -> str | None:
    """The mode of `parallelize_vae` that an option means; None for none."""
    if not vae_parallel:
        return None
    from wan_patches.vae_parallel import MODES  # brings torch's compiler along: half of the start of a worker

    mode = "tiles" if vae_parallel is True else vae_parallel
    if mode not in MODES:
        raise ValueError(f"unknown vae_parallel={vae_parallel!r}; known: True, False, {', '.join(map(repr, MODES))}")
    if layout in ("inline", "replicas"):
        raise ValueError(
            f"in layout {layout!r} one device works on a request; vae_parallel={vae_parallel!r} is for "
            "context, cfg and sharded"
        )
    return mode


def _check_vae(pipe: Any) -> None:
    from wan_patches.vae_parallel import is_wan_vae

    vae = getattr(pipe, "vae", None)
    if not is_wan_vae(vae):
        raise ValueError(
            f"vae_parallel needs a pipeline with an AutoencoderKLWan; the `vae` of {type(pipe).__name__} is "
            f"{'none' if vae is None else type(vae).__name__}"
        )


def _world(layout: str) -> int:
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world < 2 or (layout == "cfg" and world != 2):
        wanted = "exactly 2, one for each branch of guidance" if layout == "cfg" else "2 or more"
        raise ValueError(f"layout {layout!r} needs {wanted} devices in a group, not {world}")
    return world


def _hooks(module: nn.Module, name: str) -> bool:
    """Whether diffusers' hook of that name is on the module or in it."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(registry is not None and registry.get_hook(name) is not None for registry in registries)


def _managed(pipe: Any) -> bool:
    """Whether something else decides where the pipeline's modules are."""
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        return True
    return any(hasattr(module, "_hf_hook") or _hooks(module, "group_offloading") for module in _modules(pipe).values())


def _of_bitsandbytes(module: nn.Module) -> bool:
    return any(getattr(module, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))


def _move(pipe: Any, device: torch.device) -> None:
    if not hasattr(pipe, "to") or _managed(pipe):
        return
    modules = _modules(pipe).values()
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    if tensors and all(tensor.device == device for tensor in tensors):
        return
    if not any(map(_of_bitsandbytes, modules)):
        pipe.to(device)
        return
    for module in modules:  # the whole pipeline may refuse where a part does
        if not _of_bitsandbytes(module):
            module.to(device)


# context: diffusers' own parallel modes


def _parallel_config(denoisers: Sequence[nn.Module], parallel: Any, world: int) -> Any:
    """What to give `enable_parallelism`; checked, as far as can be known before a call."""
    import diffusers

    parallel = "ulysses" if parallel is None else parallel
    found = f"the installed diffusers {diffusers.__version__}"
    if not hasattr(denoisers[0], "enable_parallelism"):
        raise RuntimeError(
            f"{found} has no parallel mode for {type(denoisers[0]).__name__}: layout 'context' needs diffusers 0.36 or "
            "newer; 'sharded', 'cfg' and 'replicas' do not"
        )
    if isinstance(parallel, str):
        if parallel not in PARALLEL:
            raise ValueError(f"unknown parallel mode {parallel!r}; known: {', '.join(PARALLEL)}")
        if parallel == "tensor":
            if not hasattr(diffusers, "TensorParallelConfig"):
                raise RuntimeError(f"{found} has no tensor parallelism: upgrade it or use parallel='ulysses'")
            parallel = diffusers.TensorParallelConfig(tp_degree=world)
        else:
            parallel = diffusers.ContextParallelConfig(**{f"{parallel}_degree": world})
    context = getattr(parallel, "context_parallel_config", parallel)
    if not hasattr(context, "ulysses_degree"):
        tensor = getattr(parallel, "tensor_parallel_config", parallel)
        if not hasattr(tensor, "tp_degree"):
            raise ValueError(
                "`parallel` must be 'ulysses', 'ring', 'tensor' or a ParallelConfig, ContextParallelConfig or "
                f"TensorParallelConfig of diffusers, not {parallel!r}"
            )
        for denoiser in denoisers:
            _check_tensor(denoiser, tensor, world)
    else:
        for denoiser in denoisers:
            _check_context(denoiser, context, world)
    given_mesh = getattr(getattr(parallel, "tensor_parallel_config", None) or context, "mesh", None)
    return parallel if given_mesh is not None else copy.deepcopy(parallel)  # diffusers writes into it


def _check_context(denoiser: nn.Module, context: Any, world: int) -> None:
    name = type(denoiser).__name__
    degree = context.ulysses_degree * context.ring_degree
    if degree != world:
        raise ValueError(f"`parallel` divides by {degree}, but the group has {world} devices")
    if getattr(denoiser, "_cp_plan", None) is None:
        raise ValueError(
            f"{name} has no context parallel plan (`_cp_plan`) in the installed diffusers: use the layout 'cfg', "
            "'sharded' or 'replicas'"
        )
    heads = getattr(getattr(denoiser, "config", None), "num_attention_heads", None)
    if heads is not None and heads % context.ulysses_degree and not getattr(context, "ulysses_anything", False):
        raise ValueError(
            f"Ulysses cannot divide the {heads} heads of {name} by {context.ulysses_degree}: use parallel='ring', or, "
            "with diffusers 0.37 or newer, "
            f"ContextParallelConfig(ulysses_degree={context.ulysses_degree}, ulysses_anything=True)"
        )
    if context.ring_degree > 1 and (backend := _attention_backend(denoiser)) in WITHOUT_LSE:
        raise ValueError(
            f"diffusers' attention backend {backend!r} gives no log-sum-exp, which ring attention needs: use "
            "parallel='ulysses', or make the pipeline with pipe.transformer.set_attention_backend('_native_flash'), "
            "'_native_cudnn', 'flash' or another that has it"
        )


def _attention_backend(denoiser: nn.Module) -> str | None:
    """The name of the attention backend that the denoiser uses."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    for module in denoiser.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
            return str(getattr(backend, "value", backend))
    return None


def _check_tensor(denoiser: nn.Module, tensor: Any, world: int) -> None:
    name = type(denoiser).__name__
    if tensor.mesh is None and tensor.tp_degree != world:
        raise ValueError(f"`parallel` divides by {tensor.tp_degree}, but the group has {world} devices")
    if getattr(denoiser, "_tp_plan", None) is None:
        raise ValueError(
            f"{name} has no tensor parallel plan (`_tp_plan`) in the installed diffusers: use parallel='ulysses' or "
            "'ring', or the layout 'sharded'"
        )


def _enable_parallelism(denoiser: nn.Module, config: Any, device: torch.device) -> None:
    if getattr(denoiser, "_parallel_config", None) is not None:
        return  # loaded with `parallel_config`
    with _only_accelerator(device):
        denoiser.enable_parallelism(config=config)  # type: ignore[operator]
    resolved: Any = denoiser._parallel_config
    for part in (resolved, *(getattr(resolved, f"{kind}_parallel_config", None) for kind in ("context", "tensor"))):
        if part is not None:
            part._device = device  # diffusers' guess is right only for a group that starts at device 0
            if hasattr(part, "mesh"):
                part.mesh = part._mesh  # the next denoiser needs no process groups of its own


@contextmanager
def _only_accelerator(device: torch.device) -> Iterator[None]:
    """Inside, torch says that this kind of device is the accelerator, and that there is one at least.

    `enable_parallelism` asks for both. It would divide by zero on a CPU (since 0.42), and build a CUDA mesh
    for a group of CPUs on a machine that has a GPU. Not for several threads at once.
    """
    asked: list[tuple[Any, str, Any]] = [(torch._C, "_get_accelerator", lambda *_: torch.device(device.type))]
    if device.type == "cpu" and hasattr(torch, "accelerator"):
        asked.append((torch.accelerator, "device_count", lambda: 1))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in asked]
    try:
        for owner, name, answer in asked:
            setattr(owner, name, answer)
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


# sharded: FSDP2


def _shard(pipe: Any, denoisers: Sequence[nn.Module], device: torch.device, world: int) -> None:
    mesh = make_mesh(device, world)
    if _managed(pipe):
        raise ValueError("layout 'sharded' cannot be combined with offloading or a device map: leave those out")
    whole = [denoiser for denoiser in denoisers if not is_sharded(denoiser)]  # the others were, when they were loaded
    for denoiser in whole:
        _check_shardable(denoiser)
    for denoiser in whole:
        shard(denoiser, mesh, device)

    denoising = set(map(id, denoisers))
    for module in _modules(pipe).values():
        if id(module) not in denoising and not _of_bitsandbytes(module):
            module.to(device)


def _check_shardable(denoiser: nn.Module) -> None:
    name = type(denoiser).__name__
    if getattr(denoiser, "is_quantized", False) or getattr(denoiser, "hf_quantizer", None) is not None:
        raise ValueError(f"layout 'sharded' cannot divide the packed weights of a quantised {name}")
    if _hooks(denoiser, "layerwise_casting"):
        raise ValueError(f"layout 'sharded' cannot divide the weights of a {name} under layerwise casting")
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise ValueError(f"{name} has been loaded with a `parallel_config`: use layout 'context'")


# cfg: a branch of guidance on each of two ranks

KNOWN = 1024  # kinds of inputs
BRANCHES = ("cond", "uncond")  # computed by rank 0, by rank 1; diffusers' names of the cache contexts


class _Guidance:
    """Computes one branch in this rank and gets the other from the other rank.

    The pipelines call their denoiser under `cache_context("cond")` and then under `cache_context("uncond")`. The rank
    that does not compute a branch returns tensors full of NaN from the first call; both branches are exchanged at the
    end of the second call, in place. The first time that inputs have certain shapes, both ranks compute: what the
    output is like is known after that.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.rank = dist.get_rank()
        self.reset()
        self.known: dict[Any, tuple[list[Any], Any]] = {}  # outputs by what the inputs are like

    def reset(self) -> None:
        self.branch: str | None = None
        self.pending: list[torch.Tensor] | None = None  # of "cond", not exchanged yet
        self.exchanged: list[torch.Tensor] | None = None  # of both, not yet seen by the scheduler

    def install(self, denoisers: Sequence[nn.Module]) -> None:
        self._wrap_pipeline()
        for denoiser in denoisers:
            self._wrap_denoiser(denoiser)
        self._wrap_scheduler()

    def _wrap_pipeline(self) -> None:
        cls = type(self.pipe)

        @functools.wraps(cls.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            self.reset()  # the last request may have failed
            try:
                result = cls.__call__(pipe, *args, **kwargs)
                self.check(None)
            finally:
                self.reset()
            return result

        exchange_class(self.pipe, {"__call__": call})

    def _wrap_denoiser(self, denoiser: nn.Module) -> None:
        cls = type(denoiser)
        cache_context: Any = denoiser.cache_context  # a compiled module has it from the one inside

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.call(functools.partial(cls.__call__, module), id(module), args, kwargs)

        @contextmanager
        def noting_context(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            outer, self.branch = self.branch, name
            try:
                with cache_context(name, *args, **kwargs) as value:
                    yield value
            finally:
                self.branch = outer

        exchange_class(denoiser, {"__call__": call, "cache_context": noting_context})

    def _wrap_scheduler(self) -> None:
        scheduler = getattr(self.pipe, "scheduler", None)
        cls: Any = type(scheduler)
        if scheduler is None or hasattr(cls, "_wan_patches_checked"):
            return

        @functools.wraps(cls.step)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            self.check(args[0] if args else kwargs.get("model_output"))
            return cls.step(scheduler, *args, **kwargs)

        exchange_class(scheduler, {"step": step, "_wan_patches_checked": True})

    def call(self, compute: Any, module: int, args: Any, kwargs: Any) -> Any:
        """What the denoiser returns for these inputs: computed here, or a place for what is computed there."""
        branch = self.branch
        guided = branch in BRANCHES and self.pipe.do_classifier_free_guidance
        if branch == "cond" or not guided:
            self.exchanged = None
            if self.pending is not None:
                raise RuntimeError(self._unlike("calls its denoiser again before the unconditional branch"))
        if not guided:
            return compute(*args, **kwargs)
        if branch == "uncond" and self.pending is None:
            raise RuntimeError(self._unlike("computes the unconditional branch before the conditional one"))
        key = (module, tuple(_kind(leaf) for leaf in pytree.tree_leaves((args, kwargs))))
        if key in self.known and BRANCHES[self.rank] != branch:
            leaves, structure = self.known[key]
            output = pytree.tree_unflatten([_unfilled(leaf) for leaf in leaves], structure)
        else:
            output = compute(*args, **kwargs)
            leaves, structure = pytree.tree_flatten(output)
            if len(self.known) >= KNOWN:
                self.known.clear()
            self.known[key] = [_like(leaf) for leaf in leaves], structure
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        if not all(tensor.is_floating_point() for tensor in tensors):
            raise RuntimeError(self._unlike("has a denoiser whose output is not floating-point"))
        if branch == "cond":
            self._wrap_scheduler()  # the user may have given the pipeline another
            self.pending = tensors
        else:
            assert self.pending is not None
            for source, group in enumerate((self.pending, tensors)):
                for tensor in group:
                    _broadcast(tensor, source)
            self.exchanged = [*self.pending, *tensors]
            self.pending = None
        return output

    def check(self, model_output: Any) -> None:
        """Raises in both ranks where what the scheduler gets cannot have both branches in it."""
        if self.pending is not None:
            raise RuntimeError(self._unlike("takes a step without the unconditional branch"))
        if self.exchanged is None or not isinstance(model_output, torch.Tensor):
            return
        exchanged, self.exchanged = self.exchanged, None
        bad = model_output.isnan().any()
        if bad and not all(tensor.isfinite().all() for tensor in exchanged):
            bad = torch.zeros_like(bad)  # the model's own
        flag = bad.to(torch.int32).reshape(1)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item():
            raise RuntimeError(self._unlike("reads the conditional branch before it calls the unconditional one"))

    def _unlike(self, what: str) -> str:
        return f"layout 'cfg' cannot run this pipeline: {type(self.pipe).__name__} {what}; use another layout"


def _check_guidance(pipe: Any, denoisers: Sequence[nn.Module]) -> None:
    name = type(pipe).__name__
    reason = None
    if not all(hasattr(denoiser, "cache_context") for denoiser in denoisers):
        reason = "its denoiser has no `cache_context`, by which the branches of guidance are told apart"
    elif not hasattr(type(pipe), "do_classifier_free_guidance"):
        reason = "it has no `do_classifier_free_guidance`, which says whether a second branch follows"
    else:
        try:
            source = inspect.getsource(type(pipe).__call__)
        except (OSError, TypeError):
            source = ""
        if source and not all(f'cache_context("{branch}"' in source for branch in BRANCHES):
            reason = "it does not call its denoiser once for each branch, under a `cache_context` of its own"
    if reason:
        raise ValueError(f"layout 'cfg' cannot divide {name}: {reason}; use another layout")


@dataclass(frozen=True)
class _Like:
    """What a tensor is like but for its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _like(leaf: Any) -> Any:
    return _Like(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _kind(leaf: Any) -> Any:
    """What the shape of the output may depend on: not on a number like the time or a scale."""
    return _like(leaf) if isinstance(leaf, (torch.Tensor, int, str)) else type(leaf)


def _unfilled(leaf: Any) -> Any:
    if not isinstance(leaf, _Like):
        return leaf
    return torch.full(leaf.shape, float("nan"), dtype=leaf.dtype, device=leaf.device)


def _broadcast(tensor: torch.Tensor, source: int) -> None:
    buffer = tensor.contiguous()
    dist.broadcast(buffer, source)
    if buffer is not tensor:
        tensor.copy_(buffer)
