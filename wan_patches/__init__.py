"""Speeds up the Wan and Helios pipelines of the installed diffusers, with bit-identical results.

    import wan_patches

    wan_patches.enable()     # before or after importing diffusers, before or after building a pipeline
    ...
    wan_patches.disable()    # restores stock code

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
    """Patches the installed diffusers to run faster: loaded modules immediately, others when they are imported.

    A later call replaces the selection of an earlier one.

    Args:
        patches: names of the patches to use (see `status()`); None means all.
        fidelity: `"exact"` (bit-identical to stock) or `"close"` (also allows patches that change rounding only).
        strict: import the modules that the patches apply to immediately, and raise `PatchError` if a patch does not
            recognise the code there. The previous selection then stays in force. By default such code stays stock,
            and a line is logged.
        gate: on accelerators, compare each operation with stock when it first sees a new shape.

    Returns:
        The status of all patches; prints as a table.

    Raises:
        ValueError: unknown patch or fidelity; the message lists the known ones.
        PatchError: `strict` is set and a selected patch cannot be installed.
    """
    return _registry.enable(patches, fidelity=fidelity, strict=strict, gate=gate)


def disable() -> None:
    """Removes every patch: the functions of diffusers run their own code objects again."""
    _registry.disable()


def enabled(
    patches: Iterable[str] | None = None,
    *,
    fidelity: Fidelity | str = Fidelity.EXACT,
    strict: bool = False,
    gate: bool = True,
) -> AbstractContextManager[Status]:
    """Applies `enable(...)` for the length of a `with` block, then restores the previous selection. Nests."""
    return _registry.enabled(patches, fidelity=fidelity, strict=strict, gate=gate)


def status(verbose: bool = False) -> Status:
    """Returns the state of every patch: what is active, how many calls were fast, and why others were not.

    Prints as a table of one line per patch; `verbose` prints every function.
    """
    return replace(_registry.status(), verbose=verbose)


def load_ipython_extension(ipython: object) -> None:
    """Runs `enable()` for `%load_ext wan_patches` in a notebook."""
    names = dict.fromkeys(report.name for report in enable().reports)
    print(f"wan_patches: {', '.join(names)} enabled; wan_patches.status() shows what each does")


def unload_ipython_extension(ipython: object) -> None:
    """Runs `disable()` for `%unload_ext wan_patches`."""
    disable()
    print("wan_patches: disabled")


def __getattr__(name: str) -> Any:
    if name in ("ParallelExecutor", "RayParallelExecutor"):  # require torch
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
