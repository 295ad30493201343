"""Every example runs, in a tiny form."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import PIL.Image
import pytest

from wan_patches.bench.models import FAMILIES, images

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("one_thread")
def test_image_to_video(tmp_path, capsys):
    FAMILIES["wan22_i2v"].build().save_pretrained(tmp_path / "model")
    images(0, 1, (64, 48))[0].save(tmp_path / "image.png")
    tiny = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 64}
    output = tmp_path / "video.gif"
    load("image_to_video").main(str(tmp_path / "model"), str(tmp_path / "image.png"), "a fox", str(output), **tiny)
    assert "WanImageToVideoPipeline" in capsys.readouterr().out
    with PIL.Image.open(output) as video:
        assert video.size == (48, 32)
        assert video.n_frames == 5
