"""Layout "context": each device works on a part of every sequence, in diffusers' own parallel modes.

Ulysses runs the same kernels on fewer heads and tokens; ring and tensor parallelism sum in another order, so bits
differ from those of one device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from wan_patches.executor.layouts.placement import denoisers_of, move, ranks_in_group
from wan_patches.executor.layouts.protocol import Layout, Parallel

MODES = ("ulysses", "ring", "tensor")
WITHOUT_LSE = ("native", "_native_npu")  # in diffusers 0.36 to 0.42; stock raises only in the first step


class Context(Layout):
    """Context or tensor parallelism through diffusers' `enable_parallelism`."""

    name = "context"
    takes_parallel = True

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        denoisers = denoisers_of(pipe, self.name)
        config = _parallel_config(denoisers, parallel, ranks_in_group(self.name))
        move(pipe, device)
        for denoiser in denoisers:
            _enable_parallelism(denoiser, config, device)


def _parallel_config(denoisers: Sequence[nn.Module], parallel: Parallel, world: int) -> Any:
    """Returns the configuration for `enable_parallelism`, checked as far as possible before a call."""
    import diffusers

    parallel = "ulysses" if parallel is None else parallel
    found = f"the installed diffusers {diffusers.__version__}"
    if not hasattr(denoisers[0], "enable_parallelism"):
        raise RuntimeError(
            f"{found} has no parallel mode for {type(denoisers[0]).__name__}: layout 'context' needs diffusers 0.36 or "
            "newer; 'sharded', 'cfg' and 'replicas' do not"
        )
    if isinstance(parallel, str):
        if parallel not in MODES:
            raise ValueError(f"unknown parallel mode {parallel!r}; known: {', '.join(MODES)}")
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
    return parallel if given_mesh is not None else copy.deepcopy(parallel)  # diffusers modifies it


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
            f"diffusers' attention backend {backend!r} returns no log-sum-exp, which ring attention needs: use "
            "parallel='ulysses', or set a backend that returns it: pipe.transformer.set_attention_backend() with "
            "'_native_flash', '_native_cudnn' or 'flash', for example"
        )


def _attention_backend(denoiser: nn.Module) -> str | None:
    """Returns the name of the attention backend that the denoiser uses."""
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
                part.mesh = part._mesh  # lets the next denoiser reuse the process groups


@contextmanager
def _only_accelerator(device: torch.device) -> Iterator[None]:
    """Makes torch report this kind of device as the accelerator, with at least one device, during the block.

    `enable_parallelism` queries both. It would otherwise divide by zero on a CPU (since 0.42), and build a CUDA mesh
    for a group of CPUs on a machine with a GPU. Not thread-safe.
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
