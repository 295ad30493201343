"""Denoising loops and their schedulers: uses values known on the host instead of reading them from the device."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from wan_patches.bindings.stock_functions import are_torch_functions, has_library_methods
from wan_patches.ops import step_loop
from wan_patches.ops.tracing import is_observed
from wan_patches.patching import tally

_WAITS = "the device is a CPU, or values are not known on the host"


def reaches(timesteps: object, t: torch.Tensor, boundary: float) -> torch.Tensor | bool:
    """Returns `t >= boundary` where `t` is an element of `timesteps`: a tensor or a bool."""
    host = _on_host(timesteps, t)
    noted("boundary", host is not None)
    return t >= boundary if host is None else bool(host >= boundary)


def sigma(scheduler: Any, index: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns `scheduler.sigmas[index].to(device)`, of shape `()`."""
    sigmas = scheduler.sigmas
    if not noted("sigma", type(index) is int and can_move(scheduler, sigmas, device)):
        return sigmas[index].to(device)
    return step_loop.on_device(scheduler, sigmas, device)[index]


def numbers(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns `torch.tensor(values, dtype=dtype, device=device)`."""
    if not noted("numbers", _are_numbers(values, device)):
        return torch.tensor(values, dtype=dtype, device=device)
    return step_loop.numbers(values, device, dtype)


def solve(
    scheduler: Any, matrix: torch.Tensor, rhs: torch.Tensor, order: int, ahead: int, scheduled: bool
) -> torch.Tensor:
    """Returns `torch.linalg.solve(matrix, rhs)`, without the device read that checks whether the matrix was singular.

    If `scheduled`, the matrix is built from the last `order` steps of the schedule, up to the one at
    `scheduler.step_index + ahead`. The check is skipped if these steps show that the matrix is far from singular.
    """
    can = scheduled and is_accelerator(matrix.device) and are_torch_functions(torch.linalg.solve)
    can = can and not is_observed(matrix, rhs, scheduler.sigmas)
    if noted("solve", can and _is_regular(scheduler, order, scheduler.step_index + ahead)):
        return torch.linalg.solve_ex(matrix, rhs)[0]
    return torch.linalg.solve(matrix, rhs)


def moved(
    scheduler: Any, values: torch.Tensor, device: torch.device | str | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Returns `values.to(device=device, dtype=dtype)`."""
    can = device is not None and can_move(scheduler, values, device)
    if noted("schedule", can) and device is not None:
        return step_loop.moved(scheduler, values.to(dtype=dtype), torch.device(device))
    return values.to(device=device, dtype=dtype)


def shifted(scheduler: Any, mu: float, sigmas: torch.Tensor) -> Any:
    """Returns `scheduler.time_shift(mu, 1.0, sigmas)`, and keeps an approximate copy of the result on the host."""
    can = is_accelerator(sigmas.device) and not is_observed(sigmas) and has_library_methods(scheduler, "time_shift")
    if not noted("shifted schedule", can):
        return scheduler.time_shift(mu, 1.0, sigmas)
    host = step_loop.noted(sigmas)
    with step_loop.tracked():
        made = scheduler.time_shift(mu, 1.0, sigmas)
        if host is not None:
            step_loop.note(made, scheduler.time_shift(mu, 1.0, host), exact=False)
    return made


def index(scheduler: Any, timestep: Any) -> Any:
    """Returns `scheduler.index_for_timestep(timestep)`, which in stock compares with every timestep on the device."""
    host = _on_host(scheduler.timesteps, timestep)
    if not noted("step index", host is not None and has_library_methods(scheduler, "index_for_timestep")):
        return scheduler.index_for_timestep(timestep)
    return scheduler.index_for_timestep(host, step_loop.on_host(scheduler.timesteps))


def known(scheduler: Any, timestep: Any) -> Any:
    """Returns `timestep` on the host if it is an element of the schedule, else unchanged."""
    host = _on_host(scheduler.timesteps, timestep)
    noted("coefficients", host is not None)
    return timestep if host is None else host


def timesteps(model_output: torch.Tensor, timestep: Any) -> torch.Tensor:
    """Returns `timestep` repeated for each sample: `(batch,)`, int64, on the device of `model_output`."""
    batch, device = model_output.shape[0], model_output.device
    is_there = isinstance(timestep, torch.Tensor) and timestep.dim() == 0 and timestep.device == device
    can = is_accelerator(device) and is_there and not is_observed(model_output, timestep)
    if not noted("timesteps", can):
        return torch.full((batch,), timestep, dtype=torch.long, device=device)
    return timestep.to(torch.long).repeat(batch)


def take(template: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns `template[rows]` of 1-D tensors, with `rows` on the CPU."""
    some = rows.is_cpu and rows.dtype == torch.int64 and rows.dim() == 1 and len(rows) > 0
    can = some and is_accelerator(template.device) and not is_observed(template, rows)
    if not noted("timestep matrix", can):
        return template[rows]
    return torch.stack([template[row] for row in rows.tolist()])


def noted(op: str, can: bool) -> bool:
    """Counts a call, which avoids a wait for the device if `can`; returns `can`."""
    tally.note(op, "without a wait" if can else "", "" if can else _WAITS)
    return can


def is_accelerator(device: torch.device) -> bool:
    """Whether the host waits when it reads from `device` or uploads to it, and its memory has addresses."""
    return device.type in ("cuda", "npu", "xpu")


def can_move(scheduler: object, values: torch.Tensor, device: torch.device | str) -> bool:
    """Whether the small tensor `values` can be cached on `device` for the lifetime of `scheduler`."""
    return (
        values.is_cpu
        and is_accelerator(torch.device(device))
        and values.dtype in (torch.float32, torch.float64, torch.int64)
        and not values.requires_grad
        and not is_observed(values)
        and type(scheduler).__hash__ is object.__hash__
        and type(scheduler).__weakrefoffset__ > 0
    )


def _are_numbers(values: object, device: torch.device | str) -> bool:
    """Whether `values` are numbers and 0-D tensors that fill operations can write to `device`, an accelerator."""
    if not is_accelerator(torch.device(device)) or type(values) is not list or not values:
        return False
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return (
        all(type(value) in (int, float) or isinstance(value, torch.Tensor) for value in values)
        and all(tensor.dim() == 0 and not tensor.requires_grad for tensor in tensors)
        and all(tensor.is_cpu or tensor.device == device for tensor in tensors)
        and not is_observed(*tensors)
    )


def _is_regular(scheduler: Any, order: int, last: int) -> bool:
    """Whether the matrix of the steps from `last - order` to `last` is known to be far from singular."""
    sigmas = scheduler.sigmas if scheduler.sigmas.is_cpu else step_loop.on_host(scheduler.sigmas, exact=False)
    if sigmas is None or last < order or last >= len(sigmas):
        return False
    levels = sigmas[last - order : last + 1]
    values = levels.tolist()
    if not all(before - after > 1e-5 for before, after in pairwise(values)):  # exceeds the error of the host's copy
        return False
    if not has_library_methods(scheduler, "_sigma_to_alpha_sigma_t"):
        return False
    alpha, noise = scheduler._sigma_to_alpha_sigma_t(levels)
    return step_loop.apart((torch.log(alpha) - torch.log(noise)).tolist())


def _on_host(timesteps: object, t: object) -> torch.Tensor | None:
    """Returns the value of `t`, an element of `timesteps`, on the CPU, or None if only the device knows it."""
    if not (isinstance(timesteps, torch.Tensor) and isinstance(t, torch.Tensor)):
        return None
    if not is_accelerator(timesteps.device) or is_observed(timesteps, t):
        return None
    if timesteps.dtype not in (torch.float32, torch.float64, torch.int32, torch.int64):  # compares alike on the host
        return None
    nth = step_loop.position(timesteps, t)
    host = None if nth is None else step_loop.on_host(timesteps)
    return None if host is None else host[nth]
