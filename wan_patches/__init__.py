"""Faster Wan and Helios pipelines in the diffusers that is installed, with the same bits.

    import wan_patches

    wan_patches.enable()     # before or after importing diffusers, before or after building a pipeline
    ...
    wan_patches.disable()    # everything as it was

Importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from wan_patches.patching.fidelity import Fidelity, Verdict
from wan_patches.patching.registry import Known, Patch, PatchError, Registry, Target
from wan_patches.patching.rewrite import Block, Body, Replace, Unknown, fingerprint
from wan_patches.patching.status import Report, Status

if TYPE_CHECKING:
    from wan_patches.diagnostics.profiling import Profile, profile
    from wan_patches.diagnostics.verification import Verification, verify
    from wan_patches.diagnostics.warming import Warmth, warm
    from wan_patches.executor import ParallelExecutor, RayParallelExecutor
    from wan_patches.offload import OffloadPlan, disable_offload, enable_offload
    from wan_patches.pipelines.streaming import stream_frames
    from wan_patches.vae_parallel import ParallelVAE, parallelize_vae

__version__ = "0.1.0"

_registry = Registry()


def enable(
    patches: Iterable[str] | None = None,
    *,
    fidelity: Fidelity | str = Fidelity.EXACT,
    strict: bool = False,
    gate: bool = True,
) -> Status:
    """Makes the installed pipelines faster: patches diffusers' modules, now and as they are imported.

    Called again, the newest call's choice holds.

    Args:
        patches: names of the patches to use (see `status()`); None means all.
        fidelity: `"exact"` (same bits as stock) or `"close"` (also patches that move rounding only).
        strict: import the modules that patches are for at once, and raise `PatchError` (leaving the
            earlier choice in force) if the code of one is not known, instead of leaving stock code there
            with a line in the log.
        gate: on accelerators, compare each operation with stock the first time it meets a new shape.

    Returns:
        The status; it prints as a table.

    Raises:
        ValueError: for an unknown patch or fidelity; the message lists the known ones.
        PatchError: with `strict`, if a wanted patch cannot be installed.
    """
    return _registry.enable(patches, fidelity=fidelity, strict=strict, gate=gate)


def disable() -> None:
    """Takes every patch out again: the functions of diffusers run their own code objects."""
    _registry.disable()


def enabled(
    patches: Iterable[str] | None = None,
    *,
    fidelity: Fidelity | str = Fidelity.EXACT,
    strict: bool = False,
    gate: bool = True,
) -> AbstractContextManager[Status]:
    """`enable(...)` for the length of a `with` block; what held before holds again afterwards. Nests."""
    return _registry.enabled(patches, fidelity=fidelity, strict=strict, gate=gate)


def status(verbose: bool = False) -> Status:
    """Returns the state of every patch: what is active, how many calls were fast, and why others were not.

    Prints as a table of one line per patch; `verbose` prints every function.
    """
    return replace(_registry.status(), verbose=verbose)


def load_ipython_extension(ipython: object) -> None:
    """`%load_ext wan_patches`: `enable()`, in one line of a notebook."""
    names = dict.fromkeys(report.name for report in enable().reports)
    print(f"wan_patches: {', '.join(names)} enabled; wan_patches.status() shows what each does")


def unload_ipython_extension(ipython: object) -> None:
    """`%unload_ext wan_patches`: `disable()`."""
    disable()
    print("wan_patches: disabled")


def __getattr__(name: str) -> Any:
    if name in ("ParallelExecutor", "RayParallelExecutor"):  # they need torch
        import wan_patches.executor

        return getattr(wan_patches.executor, name)
    if name in ("OffloadPlan", "disable_offload", "enable_offload"):
        import wan_patches.offload

        return getattr(wan_patches.offload, name)
    if name in ("Profile", "profile"):
        import wan_patches.diagnostics.profiling

        return getattr(wan_patches.diagnostics.profiling, name)
    if name == "stream_frames":
        import wan_patches.pipelines.streaming

        return wan_patches.pipelines.streaming.stream_frames
    if name in ("ParallelVAE", "parallelize_vae"):
        import wan_patches.vae_parallel

        return getattr(wan_patches.vae_parallel, name)
    if name in ("Verification", "verify"):
        import wan_patches.diagnostics.verification

        return getattr(wan_patches.diagnostics.verification, name)
    if name in ("Warmth", "warm"):
        import wan_patches.diagnostics.warming

        return getattr(wan_patches.diagnostics.warming, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Block",
    "Body",
    "Fidelity",
    "Known",
    "OffloadPlan",
    "ParallelExecutor",
    "ParallelVAE",
    "Patch",
    "PatchError",
    "Profile",
    "RayParallelExecutor",
    "Replace",
    "Report",
    "Status",
    "Target",
    "Unknown",
    "Verdict",
    "Verification",
    "Warmth",
    "disable",
    "disable_offload",
    "enable",
    "enable_offload",
    "enabled",
    "fingerprint",
    "parallelize_vae",
    "profile",
    "status",
    "stream_frames",
    "verify",
    "warm",
]
