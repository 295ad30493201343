"""The diffusers versions that introduced the model families newer than the oldest supported version."""

from __future__ import annotations

#: Found by a part of the module's name; the first that fits counts.
_SINCE = {
    "vace": "0.34",
    "skyreels_v2": "0.35",
    "animate_2": "0.40",
    "animate": "0.36",
    "chronoedit": "0.36",
    "lucy": "0.36",
    "sana_video": "0.36",
    "helios": "0.37",
    "anyflow": "0.39",
    "controlnet_z_image": "0.37",
    "z_image": "0.36",
    "prx": "0.36",
    "hunyuan_video15": "0.36",
    "hunyuanimage": "0.36",
    "kandinsky6": "0.42",
    "kandinsky": "0.36",
    "ltx2": "0.37",
    "motif_video": "0.39",
    "glm_image": "0.37",
    "longcat_audio": "0.38",
    "nucleusmoe": "0.38",
    "joyimage_edit": "0.40",
    "joyimage": "0.39",
    "qwenimage21": "0.41",
    "bria_fibo2": "0.42",
    "sana_wm": "0.42",
}


def since(module: str) -> str | None:
    """Returns the first diffusers version that has the module, or None if every supported version has it."""
    return next((version for family, version in _SINCE.items() if family in module), None)
