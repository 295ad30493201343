"""Names of the small models, which the command line refuses or completes before torch is imported."""

from __future__ import annotations

#: Of `wan_patches.testing.families`.
FAMILIES = (
    *("wan_t2v", "wan22_i2v", "wan21_i2v", "wan21_flf2v", "wan22_ti2v", "wan_v2v", "wan_vace", "wan_animate"),
    *("wan_animate_replace", "lucy_edit", "skyreels_v2_t2v", "skyreels_v2_i2v", "skyreels_v2_df"),
    *("skyreels_v2_df_i2v", "skyreels_v2_df_v2v", "chronoedit", "chronoedit_reasoning", "sana_video"),
    *("sana_video_i2v", "helios", "helios_i2v", "helios_v2v", "helios_pyramid", "helios_pyramid_i2v"),
    *("helios_distilled", "anyflow", "anyflow_i2v", "anyflow_far", "anyflow_far_i2v"),
)

#: Of `wan_patches.testing.relatives`.
RELATIVES = (
    *("flux", "flux2", "flux3", "chroma", "ovis_image", "longcat_image", "bria", "bria_fibo", "bria_fibo_edit"),
    *("hunyuan_video", "hunyuan_video_i2v", "framepack", "hunyuan_video_1.5", "hunyuan_image", "hunyuan_dit"),
    *("motif_video", "cogvideox", "cogvideox_i2v", "cogvideox_v2v", "cogvideox_control", "cogview4"),
    *("glm_image", "easyanimate", "cosmos", "cosmos2", "cosmos2_v2w", "omnigen", "stable_audio", "ace_step"),
    *("krea2", "ltx", "ltx_i2v", "ltx_condition", "ltx2", "ltx2_split", "sana_wm_refiner", "joyimage_edit"),
    *("joyimage_edit_plus", "joyimage_edit_pipeline", "mochi", "longcat_audio", "lumina", "lumina2"),
    *("qwen_image", "qwen_image_img2img", "qwen_image_inpaint", "qwen_image_controlnet"),
    *("qwen_image_controlnet_inpaint", "qwen_image_edit", "qwen_image_edit_inpaint", "qwen_image_edit_plus"),
    *("qwen_image_2.1", "nucleus", "z_image", "z_image_controlnet", "bria_fibo2", "wan_animate_2", "hidream"),
    *("prx", "kandinsky5", "kandinsky5_i2v", "kandinsky6", "kandinsky6_sound", "kandinsky6_sr"),
)
