"""Counts the memory traffic of computation: the bytes that ATen calls and launches of kernels touch.

Every tensor of a call counts once where it is read and once where it is written, as many elements as it has in memory:
an expanded axis counts once. Views and allocations count nothing. Caches are not modelled, so a call that reads its
input twice is counted as if the second time were free.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wan_patches.ops import tracing
from wan_patches.ops import triton as kernels
from wan_patches.ops.dispatch import Op, ops

META = torch.device("meta")


@dataclass(frozen=True)
class Call:
    """An ATen call or a launch.

    name: of the operator or the kernel. op: the op of this package that made it, or an empty string.
    flops, dtype: of matrix products, convolutions and attention, a multiply-add counted as two; else 0 and None.
    """

    name: str
    op: str
    bytes: int
    flops: int = 0
    dtype: torch.dtype | None = None
    is_kernel: bool = False


@contextlib.contextmanager
def counting() -> Iterator[list[Call]]:
    """Yields a list to which the calls that this thread makes in the block are added. Ops take the forms as usual."""
    with _observed(_Recorder()) as recorder:
        yield recorder.calls


@contextlib.contextmanager
def _observed(recorder: _Recorder) -> Iterator[_Recorder]:
    with contextlib.ExitStack() as stack:
        for name in ("_len_torch_dispatch_stack", "_len_torch_function_stack"):  # this observer is to see the forms
            stack.enter_context(mock.patch.object(tracing, name, _none))
        stack.enter_context(mock.patch.object(Op, "__call__", recorder.called(Op.__call__)))
        for launcher in _launchers():
            stack.enter_context(mock.patch.object(launcher, "run", recorder.launched(launcher.run)))
        yield stack.enter_context(recorder)


@contextlib.contextmanager
def on_paper() -> Iterator[list[Call]]:
    """Like `counting`, for tensors on `META` as if they were on an NVIDIA GPU: nothing is computed or launched."""

    forms_on = Op._forms_on
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(kernels, "is_usable", _always))
        stack.enter_context(mock.patch.object(Op, "_forms_on", lambda op, device: forms_on(op, "cuda")))
        stack.enter_context(mock.patch.object(torch.Tensor, "data_ptr", _none))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_meta", False))
        stack.enter_context(mock.patch.object(torch, "autocast", _no_autocast))
        for launcher in _launchers():
            stack.enter_context(mock.patch.object(launcher, "run", _nothing))
        recorder = stack.enter_context(_observed(_Recorder()))
        stack.enter_context(_AsOnCuda(recorder))
        stack.callback(_forget)  # forms that only a GPU can run
        yield recorder.calls


def _forget() -> None:
    for op in ops():
        op.forget()


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _none(*_: Any) -> int:
    return 0


def _always(device: torch.device) -> bool:
    return True


def _no_autocast(*_: Any, **__: Any) -> contextlib.nullcontext[None]:
    """Autocast does not know "meta"."""
    return contextlib.nullcontext()


def _launchers() -> list[Any]:
    """Returns the classes of Triton that launch or interpret a kernel."""
    if importlib.util.find_spec("triton") is None:
        return []
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return [JITFunction, InterpretedFunction]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._op = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if touched := _touched(function, args, kwargs, result):
            packet = function.overloadpacket
            formula = flop_registry.get(packet)
            more = {"flops": formula(*args, **kwargs, out_val=result), "dtype": args[0].dtype} if formula else {}
            self.add(packet.__name__, touched, **more)
        return result

    def add(self, name: str, touched: int, **more: Any) -> None:
        """Records a call."""
        self.calls.append(Call(name, self._op, touched, **more))

    def called(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns `Op.__call__`, noting the op meanwhile."""

        def noted(op: Op[Any, Any], *args: Any, **kwargs: Any) -> Any:
            before, self._op = self._op, self._op or op.name
            try:
                return call(op, *args, **kwargs)
            finally:
                self._op = before

        return noted

    def launched(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the launcher of a kernel, recording the launch."""

        def recorded(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("warmup"):
                name = getattr(kernel, "__name__", "") or kernel.fn.__name__
                touched = sum({id(arg): _held(arg) for arg in args if isinstance(arg, torch.Tensor)}.values())
                self.add(name.strip("_"), touched, is_kernel=True)
            with _disable_current_modes():  # the interpreter computes with torch
                return run(kernel, *args, **kwargs)

        return recorded


class _AsOnCuda(TorchFunctionMode):
    """Calls what CUDA computes in one kernel, where tensors on "meta" take it apart, and the other way round."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function in _CONVOLUTIONS:
            return _convolution(function, *args, **kwargs)
        if function is F.rms_norm and hasattr(torch.ops.aten, "_fused_rms_norm"):  # from torch 2.9
            with _disable_current_modes():
                result = function(*args, **kwargs)
            self._recorder.add("rms_norm", sum(map(_held, _tensors((args, kwargs, result)))))
            return result
        return function(*args, **kwargs)


_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


def _convolution(
    function: Callable[..., torch.Tensor],
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Adds the bias after the convolution, as ATen does for cuDNN."""
    result = function(input, weight, None, *args, **kwargs)
    return result if bias is None else result.add_(bias.view(-1, *[1] * (weight.dim() - 2)))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    if attn_mask is None:
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, False)
    return found[0]  # type: ignore[no-any-return]


_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}


def _touched(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Returns the bytes that an ATen call reads and writes; 0 for views."""
    if function.overloadpacket in _ALLOCATIONS:
        return 0
    given, written = _tensors((args, kwargs)), _tensors(result)
    if not function._schema.is_mutable:
        memory = {value.untyped_storage()._cdata for value in given}
        if all(value.untyped_storage()._cdata in memory for value in written):
            return 0
    overwritten = {id(value) for value in written} if _overwrites(function) else set()
    read = {id(value): _held(value) for value in given if id(value) not in overwritten}
    return sum(read.values()) + sum(map(_held, written))


def _overwrites(function: Any) -> bool:
    """Whether the tensor that a call changes is only written."""
    return function.overloadpacket.__name__ in ("copy_", "fill_", "zero_") or "out" in function._overloadname


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _held(tensor: torch.Tensor) -> int:
    """Returns the bytes of the distinct elements of a tensor."""
    sizes = zip(tensor.shape, tensor.stride())
    return math.prod(size if stride else min(size, 1) for size, stride in sizes) * tensor.itemsize
