"""Counts transfers between host and device, from the operators that torch's profiler records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Transfer:
    """Transfers of one kind between host and device, as recorded by torch's profiler.

    what: `"copy to device"`, `"copy to host"`, `"copy between devices"`, or the operator that reads a value.
    inside: the operator that caused it; empty if it was called directly.
    bytes: size of the copied data, in its dtype before the copy.
    waits: how many times the host had to wait.
    """

    what: str
    inside: str
    count: int = 0
    bytes: int = 0
    waits: int = 0


def has_accelerator() -> bool:
    """Whether torch has an accelerator."""
    import torch

    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return torch.accelerator.is_available() if found is not None else torch.cuda.is_available()


def recorder(notes: list[str], trace: bool | None) -> Any:
    """Returns torch's profiler, not started; None if it is not wanted or not available."""
    if trace is False or (trace is None and not has_accelerator()):
        return None
    import torch
    from torch.profiler import ProfilerActivity, supported_activities

    if torch.autograd._profiler_enabled():
        notes.append("torch's profiler was already on and was left alone")
        return None
    wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA, ProfilerActivity.XPU}
    return torch.profiler.profile(activities=wanted & set(supported_activities()), record_shapes=True)


def mark(name: str) -> Any:
    """Returns a context manager that labels its block in the trace."""
    import torch

    return torch.profiler.record_function(name)


#: Operators that only copy, and operators that read a value, for which the host waits.
_COPYING = ("to", "_to_copy", "copy_", "contiguous", "clone", "type_as", "item", "is_nonzero")
_READING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")


def count_transfers(recorder: Any, notes: list[str]) -> list[Transfer] | None:
    """Counts copies and reads of the recorded operators by the devices of their inputs; None and a note on failure."""
    try:
        events = [(event, "") for event in recorder.profiler.kineto_results.experimental_event_tree()]
        rows: dict[tuple[str, str], Transfer] = {}
        while events:
            event, inside = events.pop()
            name = event.name.removeprefix("aten::")
            if name != event.name:
                tensors = [value for value in getattr(event.extra_fields, "inputs", ()) if hasattr(value, "device")]
                transfer = _transfer(name, tensors, event, inside)
                if transfer is not None:
                    row = rows.setdefault((transfer.what, inside), Transfer(transfer.what, inside))
                    row.count += 1
                    row.bytes += transfer.bytes
                    row.waits += transfer.waits
                    continue
                inside = inside or ("" if name in _COPYING else event.name)
            events += [(child, inside) for child in event.children]
    except Exception as error:  # not a stable interface of torch
        notes.append(f"copies were not counted, because torch's profiler failed ({type(error).__name__}: {error})")
        return None
    return sorted(rows.values(), key=lambda row: (row.inside, row.what))


def _transfer(name: str, tensors: Sequence[Any], event: Any, inside: str) -> Transfer | None:
    if name in _READING:
        away = any(tensor.device.type not in ("cpu", "meta") for tensor in tensors)
        return Transfer(event.name, inside, waits=1) if away else None
    if name not in ("copy_", "_copy_from_and_resize") or len(tensors) != 2:
        return None
    target, source = tensors if name == "copy_" else reversed(tensors)
    if target.device == source.device or "meta" in (target.device.type, source.device.type):
        return None
    what = "copy between devices"
    if source.device.type == "cpu":
        what = "copy to device"
    elif target.device.type == "cpu":
        what = "copy to host"
    waits = not any(value is True for value in event.extra_fields.inputs)  # True may be `non_blocking`
    size = source.dtype.itemsize
    for length in source.sizes:
        size *= length
    return Transfer(what, inside, bytes=size, waits=int(waits and what != "copy between devices"))
