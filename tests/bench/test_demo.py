"""The demo: its stages, its verdict, its files; on pipelines of a few pixels."""

from __future__ import annotations

import functools

import av
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from wan_patches import cli
from wan_patches.bench import demo, stages
from wan_patches.bench.measure import MeasurementError, identical
from wan_patches.testing.families import FAMILIES, available, images

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"size": (48, 32), "frames": 5, "steps": 2}
FAMILY_NAMES = [name for name in demo._SMALL if name in available()]

_small_subjects = demo.small_subjects


def _subjects(*families: str):
    image = images(0, 1, (64, 48))[0]
    return _small_subjects(
        image, CPU, torch.bfloat16, **SMALL, families=families, head_dim=32, transformer={"num_attention_heads": 2}
    )


@pytest.fixture
def small(monkeypatch):
    """The demo command on its smallest pipeline."""
    monkeypatch.setattr(demo, "small_subjects", lambda *args, **kwargs: _subjects("wan22_i2v"))
    arguments = ["demo", "--device", "cpu", "--repeats", "1"]
    return lambda out: CliRunner().invoke(cli.app, [*arguments, "--out", str(out)])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_stage_is_recorded_and_bit_identical(name):
    (make,) = _subjects(name)
    found = demo.compare(make(), CPU, 1, lambda: None)
    expected = set(stages.STAGES) - {stages.IMAGE_ENCODER}
    if "image" not in FAMILIES[name].takes:
        expected.remove(stages.PREPROCESS)
    assert found.same == dict.fromkeys([s for s in stages.STAGES if s in expected], True)
    assert found.deterministic
    assert found.first_difference() is None
    for run in found.stock + found.patched:
        assert expected <= set(run.seconds)
        assert all(seconds >= 0 for seconds in run.seconds.values())


def test_the_image_encoder_is_a_separate_stage():
    (make,) = _subjects("wan21_i2v")
    subject = make()
    run = stages.record(subject.pipe, subject.arguments(), CPU)
    assert list(run.same(run)) == list(stages.STAGES)


def test_recording_leaves_no_traces_on_the_pipeline_and_changes_no_bit():
    (make,) = _subjects("wan22_i2v")
    subject = make()
    frames = [np.asarray(frame) for frame in subject.pipe(**subject.arguments()).frames[0]]
    before = [dict(vars(owner)) for owner in (subject.pipe, subject.pipe.vae)]
    steps = []
    run = stages.record(subject.pipe, subject.arguments(), CPU, functools.partial(steps.append, 1))
    assert np.array_equal(run.frames, np.stack(frames))
    assert len(steps) == SMALL["steps"]
    for owner, held in zip((subject.pipe, subject.pipe.vae), before, strict=True):
        assert vars(owner).keys() == held.keys()
    assert not {"step", "set_timesteps"} & set(vars(subject.pipe.scheduler))


def test_recording_restores_instance_attributes_of_another_library():
    (make,) = _subjects("wan22_i2v")
    subject = make()
    subject.pipe.vae.decode = hook = functools.partial(type(subject.pipe.vae).decode, subject.pipe.vae)
    stages.record(subject.pipe, subject.arguments(), CPU)
    assert subject.pipe.vae.decode is hook


def test_the_demo_prints_one_table_and_writes_two_videos_and_a_contact_sheet(small, tmp_path):
    done = small(tmp_path)
    assert done.exit_code == 0, done.output
    for stage in set(stages.STAGES) - {stages.IMAGE_ENCODER}:
        assert stage in done.output
    assert "yes (video)" in done.output
    assert "conditioning, frames, modulation, preprocess, qk, rope" in " ".join(done.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "contact-sheet.png", "wan22_i2v-patched.mp4", "wan22_i2v-stock.mp4",
    ]  # fmt: skip
    with av.open(str(tmp_path / "wan22_i2v-patched.mp4")) as file:
        assert [frame.to_image().size for frame in file.decode(video=0)] == [SMALL["size"]] * SMALL["frames"]


def _nudge(tensor: torch.Tensor) -> torch.Tensor:
    """Moves every value by one bit, like the best inexact operation."""
    return torch.nextafter(tensor, torch.full_like(tensor, 9.0))


def _plant_rope(monkeypatch):
    from wan_patches.ops import rope

    right = rope.apply_rotary_emb.reference
    rope.apply_rotary_emb.forget()
    monkeypatch.setattr(rope.complex_rows, "refusal", lambda *args: "planted")
    monkeypatch.setattr(rope.apply_rotary_emb, "reference", lambda *args: _nudge(right(*args)))


def _plant_mask(monkeypatch):
    from wan_patches.ops import conditioning

    right = conditioning.in_latent_frames.function
    monkeypatch.setattr(conditioning.in_latent_frames, "function", lambda *args: 1 - right(*args))


def _plant_frames(monkeypatch):
    from wan_patches.ops import frames

    right = frames.video_to_uint8
    monkeypatch.setattr(frames, "video_to_uint8", lambda *args, **more: right(*args, **more) ^ 1)


def _plant_preprocess(monkeypatch):
    from wan_patches.ops import images

    right = images.normalize_uint8

    def wrong(pixels, out=None):
        result = right(pixels, out)
        return result.copy_(_nudge(result))

    monkeypatch.setattr(images, "normalize_uint8", wrong)


@pytest.mark.parametrize(
    ("plant", "stage"),
    [
        (_plant_rope, stages.DENOISE),
        (_plant_mask, stages.LATENTS),
        (_plant_preprocess, stages.PREPROCESS),
        (_plant_frames, stages.POSTPROCESS),
    ],
)
def test_an_inexact_operation_fails_the_demo_with_the_name_of_its_stage(
    plant, stage, small, any_size, monkeypatch, tmp_path
):
    plant(monkeypatch)
    done = small(tmp_path)
    assert done.exit_code == 1
    assert f"wan22_i2v: NOT bit-identical, the first stage that differs is: {stage}." in done.output
    assert "NO" in done.output
    assert (tmp_path / "contact-sheet.png").exists()  # it shows the difference


def test_a_nondeterministic_pipeline_is_not_compared(small, monkeypatch, tmp_path):
    right = demo.record

    def noisy(*args):
        run = right(*args)
        run.outputs[stages.TEXT] = [torch.rand(3)]
        return run

    monkeypatch.setattr(demo, "record", noisy)
    (make,) = _subjects("wan22_i2v")
    found = demo.compare(make(), CPU, 2, lambda: None)
    assert demo.verdict([found]) == "wan22_i2v: two stock runs differ, nothing can be compared."


@pytest.mark.parametrize("name", ["wan22_i2v", "wan_t2v"])
def test_a_model_is_loaded_from_a_folder(name, tmp_path):
    pipe = FAMILIES[name].build()
    pipe.save_pretrained(tmp_path / "model")
    images(0, 1, (64, 48))[0].save(tmp_path / "photo.png")
    arguments = [
        "demo", "--model", str(tmp_path / "model"), "--image", str(tmp_path / "photo.png"), "--device", "cpu",
        "--size", "48x32", "--frames", "5", "--steps", "2", "--repeats", "1", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert ("image preprocess" in done.output) == (name == "wan22_i2v")
    assert (tmp_path / "out" / "model-stock.mp4").exists()


def test_a_missing_model_is_reported_in_one_sentence(tmp_path):
    with pytest.raises(MeasurementError, match="Cannot load the model"):
        demo.model_subject(str(tmp_path), None, CPU, torch.float32)


def test_the_default_photo_is_a_photo():
    assert min(demo.open_image(demo.default_photo()).size) > 500


def test_missing_matplotlib_is_reported_with_a_remedy(monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MeasurementError, match=r'pip install "wan-patches\[demo\]", or give one with --image'):
        demo.default_photo()


def test_one_different_pixel_shows_in_the_contact_sheet():
    frames = torch.zeros(3, 200, 300, 3, dtype=torch.uint8)
    wrong = frames.clone()
    wrong[1, 77, 123] = 1
    subject = demo.Subject("pipeline", None, dict)
    runs = [(stages.Run(outputs={stages.POSTPROCESS: [video]}),) for video in (frames, wrong)]
    sheets = [
        np.asarray(demo.contact_sheet([demo.Comparison(subject, runs[0], other, {}, True)], columns=3))
        for other in runs
    ]
    black, differing = (sheet[-100:-20, 200:-10] for sheet in sheets)  # inside the row of differences
    assert set(np.unique(black)) == {0, 255}
    assert (differing > black).any()


def test_bits_are_compared_not_values():
    assert not identical(torch.tensor(0.0), torch.tensor(-0.0))
    assert identical(torch.tensor(float("nan")), torch.tensor(float("nan")))
    assert not identical(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not identical([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)])
    assert not identical(Image.new("L", (2, 2)), Image.new("L", (2, 2), 1))
    assert identical({"a": (np.zeros(2),)}, {"a": (np.zeros(2),)})
