"""The option `vae_parallel`: distributes the work of the VAE over all ranks of a group."""

from __future__ import annotations

from typing import Any

# `wan_patches.vae_parallel` imports torch's compiler, which takes half of the start time of a worker, so it is imported
# only if the option is used.


def mode_of(vae_parallel: bool | str) -> str | None:
    """Returns the mode of `parallelize_vae` for the option, or None if it is off.

    Raises:
        ValueError: there is no such mode.
    """
    if not vae_parallel:
        return None
    from wan_patches.vae_parallel import MODES

    mode = "tiles" if vae_parallel is True else vae_parallel
    if mode not in MODES:
        raise ValueError(f"unknown vae_parallel={vae_parallel!r}; known: True, False, {', '.join(map(repr, MODES))}")
    return mode


def check(pipe: Any) -> None:
    """Checks that the work of the pipeline's VAE can be distributed.

    Raises:
        ValueError: it cannot; the message names the VAE.
    """
    from wan_patches.vae_parallel import is_wan_vae

    vae = getattr(pipe, "vae", None)
    if not is_wan_vae(vae):
        raise ValueError(
            f"vae_parallel needs a pipeline with an AutoencoderKLWan; the `vae` of {type(pipe).__name__} is "
            f"{'none' if vae is None else type(vae).__name__}"
        )


def share(pipe: Any, mode: str) -> None:
    """Distributes the work of the pipeline's VAE over all ranks of the default process group."""
    from wan_patches.vae_parallel import parallelize_vae

    parallelize_vae(pipe.vae, mode=mode)
