"""Fingerprints of the diffusers functions that are recognised by their whole text; each is listed only here.

They are keyed by module and function. Each text's fingerprint is paired with the diffusers version in which it was
first seen; 0.35.2 is the oldest version examined. Parts of functions are identified in the patches that change them.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

from wan_patches.patching.codeswap import has_fingerprint
from wan_patches.patching.registry import Known

AUTOENCODER = "diffusers.models.autoencoders.autoencoder_kl_wan"
QWEN_AUTOENCODER = "diffusers.models.autoencoders.autoencoder_kl_qwenimage"
PROCESSOR = "diffusers.video_processor"
UNIPC = "diffusers.schedulers.scheduling_unipc_multistep"
HELIOS = "diffusers.schedulers.scheduling_helios"
IMAGE_TO_VIDEO = "diffusers.pipelines.wan.pipeline_wan_i2v"
GROUP_OFFLOADING = "diffusers.hooks.group_offloading"
KANDINSKY_6 = "diffusers.models.transformers.transformer_kandinsky6"
KANDINSKY_6_SR = f"{KANDINSKY_6}_sr"

TEXTS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    AUTOENCODER: {
        "AutoencoderKLWan._decode": {"b3a00fbfe7ea88dc": "0.35"},
        "AutoencoderKLWan._encode": {"c153b2e76001cae4": "0.35", "fa194e82cac56543": "0.36"},
        "AutoencoderKLWan.clear_cache": {"c2bf2f3e72354f26": "0.35"},
        "AutoencoderKLWan.decode": {"d0c7812bad8b4636": "0.35"},
        "AutoencoderKLWan.encode": {"bb9c5f01af64c520": "0.35"},
        "AutoencoderKLWan.tiled_decode": {"45af8c75e53a56c1": "0.35", "335a3a4eb5a4735b": "0.36"},
        "AutoencoderKLWan.tiled_encode": {"1afcb98eab45ee76": "0.35", "8225a258bb2c904d": "0.36"},
        "AvgDown3D.forward": {"94837202ad51a582": "0.35"},
        "DupUp3D.forward": {"9ce151b116617947": "0.35"},
        "WanAttentionBlock.forward": {"220c002c809b1ace": "0.35"},
        "WanCausalConv3d.__init__": {"929b940173af746e": "0.35"},
        "WanCausalConv3d.forward": {"04d4cc1d5eef07df": "0.35"},
        "WanDecoder3d.forward": {"04ba78038458710f": "0.35", "79b6e1480503651b": "0.36"},
        "WanEncoder3d.forward": {"ccf7adb7b36ca049": "0.35", "e49c76e8d9c2ab8c": "0.36"},
        "WanMidBlock.forward": {"680be2f1110718f9": "0.35", "23fc1bae73fbb131": "0.36"},
        "WanRMS_norm.forward": {"2589c33f8908ab21": "0.35", "13d23c0e7d565d8e": "0.38"},
        "WanResample.forward": {"d2ba2e5c1e04d9bc": "0.35"},
        "WanResidualBlock.forward": {"6b11c2b5830c2809": "0.35"},
        "WanResidualDownBlock.forward": {"afd25e4c2af44b70": "0.35", "f2798108d5a5002f": "0.36"},
        "WanResidualUpBlock.forward": {"3caf892c82025550": "0.35", "083afe537c743027": "0.36"},
        "WanUpBlock.forward": {"dd853fe626a7c2ba": "0.35", "426ef8cfa2fa91d7": "0.36"},
        "WanUpsample.forward": {"9324770ad80c15cc": "0.35"},
    },
    QWEN_AUTOENCODER: {
        "AutoencoderKLQwenImage._decode": {"84739cf26e4b2cfd": "0.35"},
        "AutoencoderKLQwenImage.clear_cache": {"65a0a7d0ab6d70ea": "0.35"},
        "QwenImageAttentionBlock.forward": {"220c002c809b1ace": "0.35"},
        "QwenImageCausalConv3d.__init__": {"929b940173af746e": "0.35"},
        "QwenImageCausalConv3d.forward": {"04d4cc1d5eef07df": "0.35"},
        "QwenImageDecoder3d.forward": {"5c6fe2f4721cccf5": "0.35", "eeab46ddbeb13e54": "0.38"},
        "QwenImageEncoder3d.forward": {"ccf7adb7b36ca049": "0.35", "746b1a42078871be": "0.38"},
        "QwenImageMidBlock.forward": {"680be2f1110718f9": "0.35"},
        "QwenImageRMS_norm.forward": {"2589c33f8908ab21": "0.35", "13d23c0e7d565d8e": "0.38"},
        "QwenImageResample.forward": {"d2ba2e5c1e04d9bc": "0.35", "a5db7953bea157e8": "0.38"},
        "QwenImageResidualBlock.forward": {"6b11c2b5830c2809": "0.35", "65fa537881419e61": "0.38"},
        "QwenImageUpBlock.forward": {"5b27564abe5a56c0": "0.35"},
        "QwenImageUpsample.forward": {"9324770ad80c15cc": "0.35"},
    },
    PROCESSOR: {
        "VideoProcessor._denormalize_conditionally": {"091492619ecf6918": "0.35"},
        "VideoProcessor.denormalize": {"4fc9adfc81f2d760": "0.35"},
        "VideoProcessor.normalize": {"9cd685efad042124": "0.35"},
        "VideoProcessor.numpy_to_pil": {"73eb64feb92bf0fd": "0.35"},
        "VideoProcessor.numpy_to_pt": {"36b6e40b46a8e664": "0.35"},
        "VideoProcessor.pil_to_numpy": {"d6aef57673b3e897": "0.35"},
        "VideoProcessor.postprocess": {"8563efb3eb63cfd0": "0.35"},
        "VideoProcessor.postprocess_video": {"d3341922baa70b18": "0.35", "d3a5a3d56604a394": "0.37"},
        "VideoProcessor.preprocess": {"966aaa5eac62bbcf": "0.35"},
        "VideoProcessor.preprocess_video": {"3df7fb28b8f274e5": "0.35", "5ce0a8d003660ecb": "0.37"},
        "VideoProcessor.pt_to_numpy": {"ee73951b57c77e96": "0.35"},
        "VideoProcessor.resize": {"83a38abfdda01dd5": "0.35"},
    },
    UNIPC: {
        "UniPCMultistepScheduler.index_for_timestep": {"8c3c654c9419209f": "0.35"},
        "UniPCMultistepScheduler.multistep_uni_c_bh_update": {"a469ddef6a6bcabb": "0.35", "19a434fe5d7b901a": "0.38"},
        "UniPCMultistepScheduler.multistep_uni_p_bh_update": {"cb30ad96efae6934": "0.35", "73090d0d66fc0a12": "0.38"},
    },
    HELIOS: {
        "HeliosScheduler.multistep_uni_c_bh_update": {"26e4e1859058e623": "0.37"},
        "HeliosScheduler.multistep_uni_p_bh_update": {"9226d0720986e92d": "0.37"},
    },
    IMAGE_TO_VIDEO: {
        "WanImageToVideoPipeline.prepare_latents": {"06e2330f8dfb9215": "0.35", "fca136457d9b149a": "0.41"},
    },
    GROUP_OFFLOADING: {
        "GroupOffloadingHook.pre_forward": {
            "e1302930e3a6ed58": "0.35",
            "e5dc37b59d132d28": "0.36",
            "60878aa0b6615ee2": "0.37",
        },
        "ModuleGroup.__init__": {"d52ba5906ac0580d": "0.35", "0e0add511f653385": "0.41"},
        "ModuleGroup._offload_to_memory": {"2c8403c909b74275": "0.35", "f12685d2cf6b11b3": "0.38"},
        "ModuleGroup._onload_from_memory": {"0929c9e1fad35616": "0.35", "6c8c206dcd2a2069": "0.36"},
    },
    **{
        module: {"apply_gate_sum": {"3e9972fac6e3bf0b": "0.42"}, "apply_scale_shift": {"238ccd92f57d1922": "0.42"}}
        for module in (KANDINSKY_6, KANDINSKY_6_SR)
    },
}

#: Autoencoders with Wan's layers, and the beginning of the names of these layers' classes.
PREFIXES: Mapping[str, str] = {AUTOENCODER: "Wan", QWEN_AUTOENCODER: "QwenImage"}

#: How pipelines process decoded videos before they become frames, by the fingerprint of those statements. `STRAIGHT`:
#: not at all. `JOINED` (Helios): they concatenate them, and drop an incomplete group of frames at the end.
STRAIGHT, JOINED = "straight", "joined"
DECODED: Mapping[str, str] = {"f25979d87ae80c3d": STRAIGHT, "5a0122c1fb647184": JOINED}
#: The variables of Helios' pipelines that hold a decoded video or its length.
JOINED_NAMES = frozenset({"current_video", "history_video", "generated_frames"})

#: `GroupOffloadingHook.pre_forward` of 0.33 and 0.34, which does not wait for the weights of the last group.
PRE_FORWARD_WITHOUT_WAIT = "0a2501b816045088"


def texts(module: str, function: str) -> frozenset[str]:
    """Returns all known fingerprints of a function, whatever version is installed."""
    return frozenset(TEXTS[module][function])


def relied_on(module: str, *functions: str) -> tuple[Known, ...]:
    """Returns the functions as requirements of a patch that relies on them without changing them."""
    return tuple(Known(module, function, texts(module, function)) for function in functions)


def is_known(found: object, module: str, function: str) -> bool:
    """Whether `found`, as it was before any patch, has a known text of the function of this name."""
    return type(found) is types.FunctionType and has_fingerprint(found, texts(module, function))
