"""The option `vae_parallel` of layouts with several devices: all ranks of a group share the work of the VAE."""

from __future__ import annotations

from typing import Any

# `wan_patches.vae_parallel` brings torch's compiler along, which is half of the start of a worker: it is imported only
# where the option is used


def mode_of(vae_parallel: bool | str) -> str | None:
    """Returns the mode of `parallelize_vae` that the option means; None for none.

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
    """Refuses a pipeline whose VAE cannot be shared.

    Raises:
        ValueError: the message names the VAE.
    """
    from wan_patches.vae_parallel import is_wan_vae

    vae = getattr(pipe, "vae", None)
    if not is_wan_vae(vae):
        raise ValueError(
            f"vae_parallel needs a pipeline with an AutoencoderKLWan; the `vae` of {type(pipe).__name__} is "
            f"{'none' if vae is None else type(vae).__name__}"
        )


def share(pipe: Any, mode: str) -> None:
    """Has all ranks of the default process group share the work of the pipeline's VAE."""
    from wan_patches.vae_parallel import parallelize_vae

    parallelize_vae(pipe.vae, mode=mode)
