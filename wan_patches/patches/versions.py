"""Since when diffusers has the families that are younger than the oldest supported version."""

from __future__ import annotations

_SINCE = {
    "vace": "0.34",
    "skyreels_v2": "0.35",
    "animate": "0.36",
    "chronoedit": "0.36",
    "lucy": "0.36",
    "sana_video": "0.36",
    "helios": "0.37",
}


def since(module: str) -> str | None:
    """The first version of diffusers that has the module; None for what every supported version has."""
    return next((version for family, version in _SINCE.items() if family in module), None)
