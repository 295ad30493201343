"""`wan-patches run`."""

from __future__ import annotations

from wan_patches.cli import options, shared


def run(
    script: options.Script,
    arguments: options.Arguments = None,
    module: options.Module = False,
    patches: options.Patches = None,
    fidelity: options.Fidelity = "exact",
    gate: options.Gate = True,
) -> None:
    """Run a Python script, unchanged, with the patches enabled.

    Behaves like `python SCRIPT ARGUMENTS`: same exit status, same tracebacks.
    A last line on stderr lists the active patches.
    Also works as `torchrun ... -m wan_patches run SCRIPT`
    and as `accelerate launch ... -m wan_patches run SCRIPT`.
    """
    from wan_patches.diagnostics.script_runner import run as run_script

    shared.enable(patches, fidelity, gate)
    raise shared.Outside(lambda: run_script(script, arguments or (), module=module))
