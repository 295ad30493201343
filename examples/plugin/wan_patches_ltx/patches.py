"""Where diffusers keeps the rotary embedding of LTX-Video. Imported at every start: no torch here."""

from wan_patches import Body, Patch, Target
from wan_patches.patching.codeswap import STOCK

PATCHES = (
    Patch(
        name="ltx",
        module="diffusers.models.transformers.transformer_ltx",
        targets=(
            Target(
                "apply_rotary_emb",
                # what wan_patches.fingerprint(apply_rotary_emb) gives: any other text is left alone
                (Body((("ede1cf7514f9921a", "return _ltx_rotate(_ltx_stock, x, *freqs)"),)),),
            ),
        ),
        calls={"_ltx_rotate": "wan_patches_ltx.ops:rotate", "_ltx_stock": STOCK},
        implementations={"all devices": "pairs rotated where they are"},
    ),
)
