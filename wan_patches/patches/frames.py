"""Conversion of video tensors to frames: `VideoProcessor.postprocess_video`, which every video pipeline calls."""

from __future__ import annotations

from wan_patches.patches.processors import POSTPROCESS, known
from wan_patches.patching.codeswap import STOCK
from wan_patches.patching.fingerprints import PROCESSOR, TEXTS
from wan_patches.patching.registry import Patch, Target
from wan_patches.patching.rewrite import Body

_CALL, _STOCK = "_wan_patches_postprocess_video", "_wan_patches_stock_postprocess_video"
_MORE = {"0.35": "", "0.37": ", **kwargs"}  # arguments, by the version that introduced them

PATCHES = (
    Patch(
        name="frames",
        module=PROCESSOR,
        targets=(
            Target(
                "VideoProcessor.postprocess_video",
                (
                    Body(
                        replacements=tuple(
                            (text, f"return {_CALL}({_STOCK}, self, video, output_type{_MORE[since]})")
                            for text, since in TEXTS[PROCESSOR]["VideoProcessor.postprocess_video"].items()
                        )
                    ),
                ),
            ),
        ),
        calls={_CALL: "wan_patches.bindings.frames:postprocess_video", _STOCK: STOCK},
        implementations={"all devices": "bytes made a few frames at a time"},
        requires=known(POSTPROCESS),
    ),
)
