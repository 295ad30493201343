"""Unnecessary waits of the host for the device in denoising loops and their schedulers.

A step of Wan 2.2 reads a timestep to choose the transformer; its scheduler uploads noise levels one by one and checks
whether a matrix of two rows was singular. Helios' schedulers read their coefficients and upload them again. Unchanged
is AnyFlow, whose loop compares two timesteps and whose scheduler looks up the given one: other code than any here.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass

from wan_patches.patches.versions import since
from wan_patches.patching.fingerprints import HELIOS, UNIPC, relied_on
from wan_patches.patching.registry import Known, Patch, Target
from wan_patches.patching.rewrite import Edit, Replace, Unknown

_REACHES = "_wan_patches_reaches"
_SIGMA, _NUMBERS, _SOLVE = "_wan_patches_sigma", "_wan_patches_numbers", "_wan_patches_solve"
_MOVED, _SHIFTED = "_wan_patches_moved", "_wan_patches_shifted"
_INDEX, _TIMESTEPS = "_wan_patches_index", "_wan_patches_timesteps"
_TAKE, _KNOWN = "_wan_patches_take", "_wan_patches_known"
_CALLS = {
    name: f"wan_patches.bindings.step_loop:{name.removeprefix('_wan_patches_')}"
    for name in (_REACHES, _SIGMA, _NUMBERS, _SOLVE, _MOVED, _SHIFTED, _INDEX, _TIMESTEPS, _TAKE, _KNOWN)
}


@dataclass(frozen=True)
class Either:
    """The first of several lists of edits that recognises the function."""

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
    """The choice of the transformer by timestep; `timesteps` is an expression for all timesteps.

    A function without a boundary is left unchanged: VACE had one transformer up to diffusers 0.35.
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


# The coefficients of UniPC: in Wan's default scheduler, and in Helios' own

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
            (Either((_SIGMA_EDITS, _NUMBERS_EDITS)), _predictor()),  # diffusers 0.38 and newer; older versions
        ),
        Target(
            "UniPCMultistepScheduler.multistep_uni_c_bh_update",
            (Either((_SIGMA_EDITS, _NUMBERS_EDITS)), _corrector()),
        ),
        requires=relied_on(  # the matrices' construction: knowing it allows their check to be skipped
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

# The schedules: Helios sets them again for every chunk and every stage of its pyramid

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

# CogVideoX: its schedulers read their coefficients, which lie on the host, at timesteps on the device


def _cogvideox(module: str, scheduler: str, *edits: Edit) -> Patch:
    before = "timestep - self.config.num_train_timesteps // self.num_inference_steps"
    known = Replace(before, f"(timestep := {_KNOWN}(self, timestep)){before.removeprefix('timestep')}")
    return _patch(f"schedulers.{module}", Target(f"{scheduler}.step", (known, *edits)))


_COEFFICIENTS = (
    _cogvideox("scheduling_ddim_cogvideox", "CogVideoXDDIMScheduler"),
    _cogvideox(
        "scheduling_dpm_cogvideox",
        "CogVideoXDPMScheduler",
        Replace("self.alphas_cumprod[timestep_back]", f"self.alphas_cumprod[{_KNOWN}(self, timestep_back)]"),
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
        "models.transformers.transformer_kandinsky",
        Target(
            "Kandinsky5TimeEmbeddings.forward",
            (Replace("self.freqs.to(device=time.device)", f"{_MOVED}(self, self.freqs, time.device)"),),
        ),
    ),
    _patch(
        "models.transformers.transformer_chroma",
        Target(
            "ChromaCombinedTimestepTextProjEmbeddings.forward",
            (
                Replace(
                    "self.guidance_proj(ZEROS).to(dtype=timestep.dtype, device=timestep.device)",
                    f"{_MOVED}(self, self.guidance_proj(ZEROS), timestep.device).to(timestep.dtype)",
                ),
            ),
        ),
    ),
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

PATCHES = (*_UPDATES, *_SCHEDULES, *_COEFFICIENTS, *_LOOPS)
