"""Where diffusers keeps the rotary embedding of Allegro. Imported at every start: no torch here."""

from wan_patches import Body, Patch, Target
from wan_patches.patching.codeswap import STOCK

PATCHES = (
    Patch(
        name="allegro",
        module="diffusers.models.embeddings",
        targets=(
            Target(
                "apply_rotary_emb_allegro",
                # what wan_patches.fingerprint(apply_rotary_emb_allegro) gives: any other text is left alone
                (Body((("b9739e8c9370f21a", "return _allegro_rotate(_allegro_stock, x, freqs_cis, positions)"),)),),
            ),
        ),
        calls={"_allegro_rotate": "wan_patches_allegro.ops:rotate", "_allegro_stock": STOCK},
        implementations={"all devices": "pairs rotated where they are"},
    ),
)
