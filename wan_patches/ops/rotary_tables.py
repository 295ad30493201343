"""Tables that are made of the same few tensors in the same way again and again, kept from the second time on.

A kept table is what its maker returned: nothing is computed here. It is handed out for as long as the tensors that it
was made of are the same objects with the same contents, and goes with the first of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack as _function_modes
from torch.utils._device import DeviceContext
from torch.utils.weak import WeakTensorKeyDictionary

from wan_patches.ops.tracing import is_observed

Tables = TypeVar("Tables", torch.Tensor, tuple[torch.Tensor, ...])  # of one tensor or of several


def kept(make: Callable[[], Tables], sources: tuple[torch.Tensor, ...], key: Hashable, limit: int) -> Tables:
    """What `make()` returns, made no more than twice for one `key` while `sources` stay as they are. EXACT.

    The first time nothing is kept: who needs a table once, or whose sources change from call to call, holds no memory.
    Sources that were written to, moved, or replaced are noticed, and so are tables that somebody has written to; a
    write to a source through `.data`, which tells nobody, is not. Where something looks into the operations (see
    `_reason_against`), `make()` is called.

    Args:
        make: takes nothing; returns new tensors, no views of `sources`, that depend on `sources`, `key` and the default
            device only.
        sources: tensors of one device, any dtype and shape. What was made of them lives no longer than the first.
        key: hashable.
        limit: how many keys are remembered for the same sources; past it, what was asked for longest ago is forgotten.

    Returns:
        The same tensors for every call: not to be written to.
    """
    if _reason_against(sources) is not None:
        return make()
    key = (key, _stream(sources[0].device), *(mode.device for mode in _function_modes()))
    state = _state(sources)
    with _lock:
        memory = _memories.get(sources[0])
        if memory is None or memory.state != state:  # what was made of the former contents is of no use any more
            memory = _memories[sources[0]] = _Memory(state)
        is_first = key not in memory.entries
        entry = memory.entries.pop(key, None)
        if entry is not None and not entry.is_intact():
            entry = None
        memory.entries[key] = entry  # the last now
        if len(memory.entries) > limit:
            del memory.entries[next(iter(memory.entries))]
        if entry is not None:
            return entry.tables  # type: ignore[no-any-return]
    storages = tuple(source.untyped_storage() for source in sources)
    with torch.inference_mode(False), torch.no_grad():  # tensors of one kind for every call, which autograd can take
        tables = make()
    entry = _Entry(tables)
    with _lock:
        if not is_first and key in memory.entries and entry.can_be_kept():
            memory.storages = storages
            memory.entries[key] = entry
    return tables


class _Entry:
    """Tables as they were made."""

    def __init__(self, tables: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        self.tables: Any = tables
        self._all = tables if isinstance(tables, tuple) else (tables,)
        self._versions = [0 if table.is_inference() else table._version for table in self._all]

    def can_be_kept(self) -> bool:
        return all(type(t) is torch.Tensor and not t.requires_grad and not t.is_inference() for t in self._all)

    def is_intact(self) -> bool:
        return all(t._version == version and not t.requires_grad for t, version in zip(self._all, self._versions))


class _Memory:
    """What was made of sources in one state; None for a key that was asked for but once."""

    def __init__(self, state: Hashable) -> None:
        self.state = state
        self.entries: dict[Hashable, _Entry | None] = {}
        self.storages: tuple[torch.UntypedStorage, ...] = ()  # held, so that no other gets the address of one


_memories = WeakTensorKeyDictionary()
_lock = threading.RLock()  # what is freed inside may run code of anybody's


def _reason_against(sources: tuple[torch.Tensor, ...]) -> str | None:
    """Why nothing is kept of such sources; None where it can be."""
    device = sources[0].device
    if is_observed(*sources):
        return "a compiler, autograd, autocast or a transform looks into the operations"
    if torch._C._len_torch_dispatch_stack() or any(type(mode) is not DeviceContext for mode in _function_modes()):
        return "a mode does, and it is not that of a default device"
    if any(s.is_inference() or s.device != device or s.layout != torch.strided for s in sources):
        return "the sources cannot tell whether they were written to, or are not plain tensors of one device"
    if device.type == "meta" or torch.is_autocast_enabled(device.type):
        return "the device is meta, or under autocast"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is captured"  # which would go on reading what is forgotten here
    return None


def _state(sources: tuple[torch.Tensor, ...]) -> Hashable:
    """Which tensors they are and what they hold, as far as can be told without looking."""
    return tuple((id(s), s._version, s.data_ptr(), s.dtype, s.device, s.shape, s.stride()) for s in sources)


def _stream(device: torch.device) -> Hashable:
    """The stream that tables are made on: on another they might be read before they are written."""
    if device.type == "cpu":
        return None
    current = getattr(getattr(torch, device.type, None), "current_stream", None)
    return None if current is None else current(device)
