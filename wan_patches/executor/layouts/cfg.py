"""Layout "cfg": classifier-free guidance on two devices, one per branch.

Both ranks make the same call; rank 0 computes the conditional branch, rank 1 the unconditional one. The arithmetic has
the same order as on one device: the bits are equal wherever kernels are deterministic from call to call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import _pytree as pytree

from wan_patches.executor.layouts.placement import denoisers_of, move, ranks_in_group
from wan_patches.executor.layouts.protocol import Layout, Parallel
from wan_patches.patching.objects import exchange_class

KNOWN = 1024  # maximum number of remembered kinds of inputs
BRANCHES = ("cond", "uncond")  # computed by ranks 0 and 1; names of diffusers' cache contexts


class Cfg(Layout):
    """Runs each branch of classifier-free guidance on one of two devices.

    Calls of a pipeline that does not use guidance as expected raise RuntimeError in both ranks.
    """

    name = "cfg"

    def group_size(self, devices: Sequence[torch.device], wanted: int | None) -> int:
        size = super().group_size(devices, wanted or 2)
        if size != 2:
            raise ValueError(f"guidance has two branches: layout 'cfg' works with groups of 2 devices, not {size}")
        return size

    def place(self, pipe: Any, device: torch.device, parallel: Parallel) -> None:
        denoisers = denoisers_of(pipe, self.name)
        ranks_in_group(self.name, "exactly 2, one for each branch of guidance", most=2)
        _check_guidance(pipe, denoisers)
        move(pipe, device)
        _Guidance(pipe).install(denoisers)


class _Guidance:
    """Divides guidance between two ranks: computes one branch and receives the other.

    Pipelines call their denoiser under `cache_context("cond")` and then under `cache_context("uncond")`. For a branch
    of the other rank, the denoiser allocates tensors full of NaN; at the end of the second call, both branches are
    exchanged in place. For inputs of new shapes, both ranks compute both branches once to learn the output's shapes.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.rank = dist.get_rank()
        self.reset()
        self.known: dict[Any, tuple[list[Any], Any]] = {}  # outputs by kind of inputs

    def reset(self) -> None:
        self.branch: str | None = None
        self.pending: list[torch.Tensor] | None = None  # outputs of "cond", not exchanged yet
        self.exchanged: list[torch.Tensor] | None = None  # outputs of both branches, not passed to the scheduler yet

    def install(self, denoisers: Sequence[nn.Module]) -> None:
        self._wrap_pipeline()
        for denoiser in denoisers:
            self._wrap_denoiser(denoiser)
        self._wrap_scheduler()

    def _wrap_pipeline(self) -> None:
        cls = type(self.pipe)

        @functools.wraps(cls.__call__)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            self.reset()  # the previous request may have failed
            try:
                result = cls.__call__(pipe, *args, **kwargs)
                self.check(None)
            finally:
                self.reset()
            return result

        exchange_class(self.pipe, {"__call__": call})

    def _wrap_denoiser(self, denoiser: nn.Module) -> None:
        cls = type(denoiser)
        cache_context: Any = denoiser.cache_context  # a compiled module delegates it to the original module

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

    def call(self, compute: Callable[..., Any], module: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the denoiser's output, computed here or allocated for the result of the other rank."""
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
            self._wrap_scheduler()  # the user may have replaced the scheduler
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
        """Raises RuntimeError in both ranks if the scheduler's input cannot contain both branches."""
        if self.pending is not None:
            raise RuntimeError(self._unlike("takes a step without the unconditional branch"))
        if self.exchanged is None or not isinstance(model_output, torch.Tensor):
            return
        exchanged, self.exchanged = self.exchanged, None
        bad = model_output.isnan().any()
        if bad and not all(tensor.isfinite().all() for tensor in exchanged):
            bad = torch.zeros_like(bad)  # NaN from the model itself
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
        reason = "its denoiser has no `cache_context`, which identifies the branches of guidance"
    elif not hasattr(type(pipe), "do_classifier_free_guidance"):
        reason = "it has no `do_classifier_free_guidance`, which determines whether a second branch follows"
    else:
        try:
            source = inspect.getsource(type(pipe).__call__)
        except (OSError, TypeError):
            source = ""
        if source and not all(f'cache_context("{branch}"' in source for branch in BRANCHES):
            reason = "it does not call its denoiser once for each branch, each under its own `cache_context`"
    if reason:
        raise ValueError(f"layout 'cfg' cannot divide {name}: {reason}; use another layout")


@dataclass(frozen=True)
class _Like:
    """A tensor's shape, dtype and device."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _like(leaf: object) -> Any:
    return _Like(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf


def _kind(leaf: object) -> Any:
    """Returns the features of an input that may determine output shapes; not floats, such as a time or scale."""
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
