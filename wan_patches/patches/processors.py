"""The methods of diffusers' processors that the image and video patches rely on."""

from __future__ import annotations

from collections.abc import Iterable

from wan_patches.patching.fingerprints import PROCESSOR, relied_on
from wan_patches.patching.registry import Known

PREPROCESS = ("preprocess", "resize", "pil_to_numpy", "numpy_to_pt", "normalize")
PREPROCESS_VIDEO = (*PREPROCESS, "preprocess_video")
POSTPROCESS = ("postprocess", "denormalize", "_denormalize_conditionally", "pt_to_numpy", "numpy_to_pil")


def known(methods: Iterable[str]) -> tuple[Known, ...]:
    """Returns the methods as requirements of a patch."""
    return relied_on(PROCESSOR, *(f"VideoProcessor.{name}" for name in methods))
