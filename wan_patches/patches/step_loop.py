"""Where denoising loops and their schedulers make the host wait for the device, and need not.

A step of Wan 2.2 reads a timestep to choose the transformer; its scheduler uploads noise levels one by one and asks
whether a matrix of two rows was singular. Helios' schedulers read their coefficients and upload them again.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from wan_patches.bindings.originals import are_torchs, has_librarys
from wan_patches.patches.versions import since
from wan_patches.patching import tally
from wan_patches.patching.fingerprints import HELIOS, UNIPC, relied_on
from wan_patches.patching.registry import Known, Patch, Target
from wan_patches.patching.rewrite import Edit, Replace, Unknown

_WAITS = "the device is a CPU, or values are not known on the host"
_REACHES = "_wan_patches_reaches"
_SIGMA, _NUMBERS, _SOLVE = "_wan_patches_sigma", "_wan_patches_numbers", "_wan_patches_solve"
_MOVED, _SHIFTED = "_wan_patches_moved", "_wan_patches_shifted"
_INDEX, _TIMESTEPS = "_wan_patches_index", "_wan_patches_timesteps"
_TAKE = "_wan_patches_take"
_CALLS = {
    name: f"wan_patches.patches.step_loop:{name.removeprefix('_wan_patches_')}"
    for name in (_REACHES, _SIGMA, _NUMBERS, _SOLVE, _MOVED, _SHIFTED, _INDEX, _TIMESTEPS, _TAKE)
}


@dataclass(frozen=True)
class Either:
    """The first of several lists of edits that knows the function."""

    texts: tuple[tuple[Edit, ...], ...]

    def apply(self, function: ast.FunctionDef) -> None:
        reasons = []
        for edits in self.texts:
            attempt = copy.deepcopy(function)
            try:
                for edit in edits:
                    edit.apply(attempt)
            except Unknown as error:
                reasons.append(str(error))
            else:
                function.body = attempt.body
                return
        raise Unknown(reasons[0])


@dataclass(frozen=True)
class Boundary:
    """The choice of the transformer by timestep; `timesteps` is an expression for all of them.

    A function that knows of no boundary is left as it is: VACE had one transformer up to diffusers 0.35.
    """

    timesteps: str = "timesteps"

    def apply(self, function: ast.FunctionDef) -> None:
        if any(isinstance(node, ast.Name) and node.id == "boundary_timestep" for node in ast.walk(function)):
            replacement = f"{_REACHES}({self.timesteps}, t, boundary_timestep)"
            Replace("t >= boundary_timestep", replacement).apply(function)


def _patch(module: str, *targets: Target, requires: tuple[Known, ...] = (), optional: bool = False) -> Patch:
    return Patch(
        name="step_loop",
        module=f"diffusers.{module}",
        targets=targets,
        calls=_CALLS,
        implementations={"CPUs": "stock", "other devices": "the host does not wait within a step"},
        requires=requires,
        optional=optional,
        since=since(module),
    )


# The coefficients of UniPC: from the scheduler that Wan comes with, and from Helios' own

_NUMBERS_EDITS = (
    Replace("torch.tensor(rks, device=device)", f"{_NUMBERS}(rks, device)"),
    Replace("torch.tensor(b, device=device)", f"{_NUMBERS}(b, device)"),
    Replace("torch.tensor([0.5], dtype=x.dtype, device=device)", f"{_NUMBERS}([0.5], device, x.dtype)"),
)
_SIGMA_EDITS = (Replace("self.sigmas[INDEX].to(device)", f"{_SIGMA}(self, INDEX, device)", 3),)


def _predictor(scheduled: str = "True") -> Replace:
    return Replace(
        "torch.linalg.solve(R[:-1, :-1], b[:-1])", f"{_SOLVE}(self, R[:-1, :-1], b[:-1], order, 1, {scheduled})"
    )


def _corrector(scheduled: str = "True") -> Replace:
    return Replace("torch.linalg.solve(R, b)", f"{_SOLVE}(self, R, b, order, 0, {scheduled})")


_UNIPC, _HELIOS = "schedulers.scheduling_unipc_multistep", "schedulers.scheduling_helios"
_DMD = "schedulers.scheduling_helios_dmd"
_SKYREELS = "skyreels_v2.pipeline_skyreels_v2_diffusion_forcing"

_UPDATES = (
    _patch(
        _UNIPC,
        Target(
            "UniPCMultistepScheduler.multistep_uni_p_bh_update",
            (Either((_SIGMA_EDITS, _NUMBERS_EDITS)), _predictor()),  # since diffusers 0.38, and before
        ),
        Target(
            "UniPCMultistepScheduler.multistep_uni_c_bh_update",
            (Either((_SIGMA_EDITS, _NUMBERS_EDITS)), _corrector()),
        ),
        requires=relied_on(  # what the matrices are made of: their check is left out by knowing it
            UNIPC,
            "UniPCMultistepScheduler.multistep_uni_p_bh_update",
            "UniPCMultistepScheduler.multistep_uni_c_bh_update",
        ),
    ),
    _patch(
        _HELIOS,
        Target(
            "HeliosScheduler.multistep_uni_p_bh_update",
            (*_NUMBERS_EDITS, _predictor("sigma is None and sigma_next is None")),
        ),
        Target(
            "HeliosScheduler.multistep_uni_c_bh_update",
            (*_NUMBERS_EDITS, _corrector("sigma is None and sigma_before is None")),
        ),
        requires=relied_on(
            HELIOS, "HeliosScheduler.multistep_uni_p_bh_update", "HeliosScheduler.multistep_uni_c_bh_update"
        ),
    ),
)

# The schedules: Helios sets them anew for every chunk and every stage of its pyramid

_SCHEDULE = (
    Replace("torch.from_numpy(timesteps).to(device=device)", f"{_MOVED}(self, torch.from_numpy(timesteps), device)"),
    Replace(
        "torch.cat([sigmas, torch.zeros(1)]).to(device=device)",
        f"{_MOVED}(self, torch.cat([sigmas, torch.zeros(1)]), device)",
    ),
)
_SHIFT = Replace("self.time_shift(mu, 1.0, self.sigmas)", f"{_SHIFTED}(self, mu, self.sigmas)")

_SCHEDULES = (
    _patch(
        _UNIPC,
        Target(
            "UniPCMultistepScheduler.set_timesteps",
            (
                Replace(
                    "torch.from_numpy(timesteps).to(device=device, dtype=torch.int64)",
                    f"{_MOVED}(self, torch.from_numpy(timesteps), device, torch.int64)",
                ),
            ),
        ),
    ),
    _patch(
        _UNIPC,
        Target(
            "UniPCMultistepScheduler._init_step_index",
            (Replace("self.index_for_timestep(timestep)", f"{_INDEX}(self, timestep)"),),
        ),
        requires=relied_on(UNIPC, "UniPCMultistepScheduler.index_for_timestep"),
    ),
    _patch(_HELIOS, Target("HeliosScheduler.set_timesteps", (*_SCHEDULE, _SHIFT))),
    _patch(_DMD, Target("HeliosDMDScheduler.set_timesteps", _SCHEDULE)),
    _patch(
        _DMD,
        Target(
            "HeliosDMDScheduler.step",
            (
                Replace(
                    "torch.full((model_output.shape[0],), TIMESTEP, dtype=torch.long, device=model_output.device)",
                    f"{_TIMESTEPS}(model_output, TIMESTEP)",
                    2,
                ),
            ),
        ),
    ),
)

# The pipelines and models


def _diffusion_forcing(suffix: str, name: str) -> Patch:
    return _patch(
        f"pipelines.{_SKYREELS}{suffix}",
        Target(
            f"SkyReelsV2DiffusionForcing{name}Pipeline.generate_timestep_matrix",
            (Replace("step_template[new_row]", f"{_TAKE}(step_template, new_row)"),),
        ),
    )


_LOOPS = (
    _patch("pipelines.wan.pipeline_wan", Target("WanPipeline.__call__", (Boundary(),))),
    _patch("pipelines.wan.pipeline_wan_i2v", Target("WanImageToVideoPipeline.__call__", (Boundary(),))),
    _patch("pipelines.wan.pipeline_wan_vace", Target("WanVACEPipeline.__call__", (Boundary(),))),
    _patch("pipelines.lucy.pipeline_lucy_edit", Target("LucyEditPipeline.__call__", (Boundary(),))),
    _patch(
        "modular_pipelines.wan.denoise",
        Target("Wan22LoopDenoiser.__call__", (Boundary('getattr(block_state, "timesteps", None)'),)),
        optional=True,  # since diffusers 0.36
    ),
    _diffusion_forcing("", ""),
    _diffusion_forcing("_i2v", "ImageToVideo"),
    _diffusion_forcing("_v2v", "VideoToVideo"),
    _patch(
        "models.transformers.transformer_skyreels_v2",
        Target(
            "SkyReelsV2Transformer3DModel.forward",
            (
                Replace(
                    "torch.tensor(fps, dtype=torch.long, device=hidden_states.device)",
                    f"{_NUMBERS}(fps, hidden_states.device, torch.long)",
                ),
            ),
        ),
    ),
)

PATCHES = (*_UPDATES, *_SCHEDULES, *_LOOPS)


def reaches(timesteps: Any, t: Any, boundary: Any) -> Any:
    """`t >= boundary`, where `t` is an element of `timesteps`; true or false."""
    host = _on_host(timesteps, t)
    noted("boundary", host is not None)
    return t >= boundary if host is None else bool(host >= boundary)


def sigma(scheduler: Any, index: Any, device: Any) -> Any:
    """`scheduler.sigmas[index].to(device)`, of shape `()`."""
    from wan_patches.ops import step_loop

    sigmas = scheduler.sigmas
    if not noted("sigma", type(index) is int and can_move(scheduler, sigmas, device)):
        return sigmas[index].to(device)
    return step_loop.on_device(scheduler, sigmas, device)[index]


def numbers(values: Any, device: Any, dtype: Any = None) -> Any:
    """`torch.tensor(values, dtype=dtype, device=device)`."""
    import torch

    from wan_patches.ops import step_loop

    if not noted("numbers", _are_numbers(values, device)):
        return torch.tensor(values, dtype=dtype, device=device)
    return step_loop.numbers(values, device, dtype)


def solve(scheduler: Any, matrix: Any, rhs: Any, order: Any, ahead: int, scheduled: bool) -> Any:
    """`torch.linalg.solve(matrix, rhs)`, which asks the device afterwards whether the matrix was singular.

    It is made of the last `order` steps of the schedule up to the one at `scheduler.step_index + ahead`, if it is
    `scheduled`. Where those say that it is far from singular, nobody asks.
    """
    import torch

    from wan_patches.ops.tracing import is_observed

    can = scheduled and is_accelerator(matrix.device) and are_torchs(torch.linalg.solve)
    can = can and not is_observed(matrix, rhs, scheduler.sigmas)
    if noted("solve", can and _is_regular(scheduler, order, scheduler.step_index + ahead)):
        return torch.linalg.solve_ex(matrix, rhs)[0]
    return torch.linalg.solve(matrix, rhs)


def moved(scheduler: Any, values: Any, device: Any, dtype: Any = None) -> Any:
    """`values.to(device=device, dtype=dtype)`."""
    import torch

    from wan_patches.ops import step_loop

    if not noted("schedule", device is not None and can_move(scheduler, values, device)):
        return values.to(device=device, dtype=dtype)
    return step_loop.moved(scheduler, values.to(dtype=dtype), torch.device(device))


def shifted(scheduler: Any, mu: Any, sigmas: Any) -> Any:
    """`scheduler.time_shift(mu, 1.0, sigmas)`; the host gets an idea of the result."""
    from wan_patches.ops import step_loop
    from wan_patches.ops.tracing import is_observed

    can = is_accelerator(sigmas.device) and not is_observed(sigmas) and has_librarys(scheduler, "time_shift")
    if not noted("shifted schedule", can):
        return scheduler.time_shift(mu, 1.0, sigmas)
    host = step_loop.noted(sigmas)
    with step_loop.tracked():
        made = scheduler.time_shift(mu, 1.0, sigmas)
        if host is not None:
            step_loop.note(made, scheduler.time_shift(mu, 1.0, host), exact=False)
    return made


def index(scheduler: Any, timestep: Any) -> Any:
    """`scheduler.index_for_timestep(timestep)`, which compares with every timestep on the device."""
    host = _on_host(scheduler.timesteps, timestep)
    if not noted("step index", host is not None and has_librarys(scheduler, "index_for_timestep")):
        return scheduler.index_for_timestep(timestep)
    from wan_patches.ops import step_loop

    return scheduler.index_for_timestep(host, step_loop.on_host(scheduler.timesteps))


def timesteps(model_output: Any, timestep: Any) -> Any:
    """`timestep` for each in the batch: `(batch,)`, int64, on the device of `model_output`."""
    import torch

    from wan_patches.ops.tracing import is_observed

    batch, device = model_output.shape[0], model_output.device
    is_there = isinstance(timestep, torch.Tensor) and timestep.dim() == 0 and timestep.device == device
    can = is_accelerator(device) and is_there and not is_observed(model_output, timestep)
    if not noted("timesteps", can):
        return torch.full((batch,), timestep, dtype=torch.long, device=device)
    return timestep.to(torch.long).repeat(batch)


def take(template: Any, rows: Any) -> Any:
    """`template[rows]` of 1-D tensors; the rows are on the CPU."""
    import torch

    from wan_patches.ops.tracing import is_observed

    some = rows.is_cpu and rows.dtype == torch.int64 and rows.dim() == 1 and len(rows) > 0
    can = some and is_accelerator(template.device) and not is_observed(template, rows)
    if not noted("timestep matrix", can):
        return template[rows]
    return torch.stack([template[row] for row in rows.tolist()])


def noted(op: str, can: bool) -> bool:
    """Counts a call, which does not wait if it `can`; says it again."""
    tally.note(op, "without a wait" if can else "", "" if can else _WAITS)
    return can


def is_accelerator(device: Any) -> bool:
    """Whether the host waits when it reads from `device` or uploads to it, and memory there has an address."""
    return device.type in ("cuda", "npu", "xpu")


def can_move(scheduler: Any, values: Any, device: Any) -> bool:
    """Whether the small tensor `values` can be kept on `device` as long as `scheduler` lives."""
    import torch

    from wan_patches.ops.tracing import is_observed

    return (
        values.is_cpu
        and is_accelerator(torch.device(device))
        and values.dtype in (torch.float32, torch.float64, torch.int64)
        and not values.requires_grad
        and not is_observed(values)
        and type(scheduler).__hash__ is object.__hash__
        and type(scheduler).__weakrefoffset__ > 0
    )


def _are_numbers(values: Any, device: Any) -> bool:
    """Whether these are numbers and 0-D tensors that `device`, an accelerator, can be given by fills."""
    import torch

    from wan_patches.ops.tracing import is_observed

    if not is_accelerator(torch.device(device)) or type(values) is not list or not values:
        return False
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return (
        all(type(value) in (int, float) or isinstance(value, torch.Tensor) for value in values)
        and all(tensor.dim() == 0 and not tensor.requires_grad for tensor in tensors)
        and all(tensor.is_cpu or tensor.device == device for tensor in tensors)
        and not is_observed(*tensors)
    )


def _is_regular(scheduler: Any, order: Any, last: int) -> bool:
    """Whether the matrix of the steps from `last - order` to `last` is known to be far from singular."""
    import torch

    from wan_patches.ops import step_loop

    sigmas = scheduler.sigmas if scheduler.sigmas.is_cpu else step_loop.on_host(scheduler.sigmas, exact=False)
    if sigmas is None or last < order or last >= len(sigmas):
        return False
    levels = sigmas[last - order : last + 1]
    values = levels.tolist()
    if not all(before - after > 1e-5 for before, after in pairwise(values)):  # by more than the host may be off
        return False
    if not has_librarys(scheduler, "_sigma_to_alpha_sigma_t"):
        return False
    alpha, noise = scheduler._sigma_to_alpha_sigma_t(levels)
    return step_loop.apart((torch.log(alpha) - torch.log(noise)).tolist())


def _on_host(timesteps: Any, t: Any) -> Any:
    """The value of `t`, an element of `timesteps`, on the CPU; None where the device must be asked."""
    import torch

    from wan_patches.ops import step_loop
    from wan_patches.ops.tracing import is_observed

    if not (isinstance(timesteps, torch.Tensor) and isinstance(t, torch.Tensor)):
        return None
    if not is_accelerator(timesteps.device) or is_observed(timesteps, t):
        return None
    if timesteps.dtype not in (torch.float32, torch.float64, torch.int32, torch.int64):  # the host compares likewise
        return None
    nth = step_loop.position(timesteps, t)
    host = None if nth is None else step_loop.on_host(timesteps)
    return None if host is None else host[nth]
