"""The diffusers versions that introduced the model families newer than the oldest supported version."""

from __future__ import annotations

_SINCE = {
    "vace": "0.34",
    "skyreels_v2": "0.35",
    "animate": "0.36",
    "chronoedit": "0.36",
    "lucy": "0.36",
    "sana_video": "0.36",
    "helios": "0.37",
    "anyflow": "0.39",
}


def since(module: str) -> str | None:
    """Returns the first diffusers version that has the module, or None if every supported version has it."""
    return next((version for family, version in _SINCE.items() if family in module), None)
