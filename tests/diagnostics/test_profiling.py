"""Where the time of pipelines goes, which calls took stock's way and why; and that watching leaves nothing behind."""

from __future__ import annotations

import cProfile
import json
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches import Body, Patch, Registry, Target, fingerprint
from wan_patches.diagnostics import profiling
from wan_patches.ops import rope
from wan_patches.ops.dispatch import SMALL as FEW
from wan_patches.ops.dispatch import op as op_of
from wan_patches.patching import tally
from wan_patches.patching.codeswap import STOCK
from wan_patches.pipelines import stages
from wan_patches.testing.families import FAMILIES, images

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"size": (48, 32), "frames": 5, "steps": 1}


@pytest.fixture(scope="module")
def built():
    made = {}

    def build(name):
        if name not in made:
            made[name] = FAMILIES[name].build()
        return made[name]

    return build


@pytest.fixture
def pipe(built):
    """Wan text to video."""
    return built("wan_t2v")


def call(pipe, name="wan_t2v", **more):
    return pipe(**FAMILIES[name].inputs(**{**SMALL, "generator": torch.Generator().manual_seed(0), **more})).frames


def op(profile, name):
    return next(row for row in profile.ops if row.op == name)


# Stages


def test_the_stages_of_every_pipeline_that_is_called_are_summed(pipe, built):
    with wan_patches.profile() as profile:
        call(pipe)
        call(pipe)
        call(built("wan22_i2v"), "wan22_i2v", image=images(0, 1, (64, 48))[0])
    wan, i2v = profile.pipelines
    assert (wan.pipeline, wan.device, wan.calls, wan.failed) == ("WanPipeline", "cpu", 2, 0)
    assert (i2v.pipeline, i2v.calls) == ("WanImageToVideoPipeline", 1)
    assert list(i2v.seconds) == [stage for stage in stages.STAGES if stage != stages.IMAGE_ENCODER]
    assert list(wan.peak_bytes) == list(wan.seconds)
    assert wan.total == pytest.approx(sum(wan.seconds.values()))
    assert 0 < wan.total + i2v.total < profile.seconds


def test_only_the_given_pipeline_is_watched(pipe, built):
    with wan_patches.profile(pipe) as profile:
        call(built("wan22_i2v"), "wan22_i2v", image=images(0, 1, (64, 48))[0])
        call(FAMILIES["wan_t2v"].build())
        call(pipe)
    assert [(row.pipeline, row.calls) for row in profile.pipelines] == [("WanPipeline", 1)]


def test_any_object_with_a_call_can_be_given():
    class Thing:
        def __call__(self) -> None:
            time.sleep(0.01)

    thing = Thing()
    with wan_patches.profile(thing) as profile:
        for _ in range(3):
            thing()
        Thing()()
    (row,) = profile.pipelines
    assert (row.pipeline, row.calls, row.failed, list(row.seconds)) == ("Thing", 3, 0, [stages.CALL])
    assert 0.03 * 0.9 < row.total < profile.seconds


def test_a_call_that_raises_is_counted_as_failed(pipe, monkeypatch):
    def decode(*args, **kwargs):
        raise RuntimeError("too large")

    monkeypatch.setattr(pipe.vae, "decode", decode)
    with pytest.raises(RuntimeError, match="too large"), wan_patches.profile() as profile:
        call(pipe)
    row = profile.pipelines[0]
    assert (row.calls, row.failed) == (1, 1)
    assert list(row.seconds) == [stages.TEXT, stages.LATENTS, stages.DENOISE]
    assert "1 call, 1 failed" in str(profile)


def test_without_patches_there_are_stages_and_a_note(pipe):
    with wan_patches.profile() as profile:
        call(pipe)
    assert stages.DENOISE in profile.pipelines[0].seconds
    assert profile.ops == []
    assert profile.active == ()
    assert "no patch is enabled" in str(profile)


def test_calls_in_other_threads_are_not_seen_and_noted(pipe):
    with wan_patches.profile() as profile:
        thread = threading.Thread(target=call, args=(pipe,))
        thread.start()
        thread.join()
    assert profile.pipelines == []
    assert "no pipeline was called in this thread" in str(profile)


# Operations


def test_calls_of_operations_are_counted(pipe):
    with wan_patches.enabled(), wan_patches.profile() as profile:
        call(pipe)
    rotations = 2 * 2 * 2  # queries and keys, layers, with and without the prompt
    assert op(profile, "apply_rotary_emb").calls == rotations
    assert {(row.patch, row.op) for row in profile.ops} == {
        ("rope", "apply_rotary_emb"),
        ("frames", "postprocess_video"),
        *(("modulation", name) for name in ("modulated_norm", "residual_norm", "gated_residual")),
        ("qk", "qk_norm"),  # and not `rotate_both`, which hands on
        *(("step_loop", name) for name in ("sigma", "moved")),
        *(("vae", name) for name in ("decode", "decode_chunk", "residual_block", "resample")),
    }
    assert op(profile, "decode_chunk").calls == 2  # latent frames
    for row in profile.ops:
        assert row.calls == row.fast + row.stock + row.first_sight
        assert 0 < row.own_seconds <= row.seconds <= profile.seconds
        if row.patch in ("frames", "vae"):
            assert row.fast == row.calls, row
    inner = sum(op(profile, name).own_seconds for name in ("decode", "decode_chunk", "residual_block", "resample"))
    assert inner == pytest.approx(op(profile, "decode").seconds)
    assert {"rope", "frames", "vae"} <= set(profile.active)


def test_small_rotary_embeddings_report_their_reason(pipe):
    with wan_patches.enabled(["rope"]), wan_patches.profile() as profile:
        call(pipe)
    row = op(profile, "apply_rotary_emb")
    assert row.stock == row.calls
    assert row.reasons == {FEW: row.calls}
    assert f"{row.calls} of {row.calls} fell back to stock: {FEW}" in str(profile)


def test_a_probe_is_not_counted_as_a_fallback(pipe, any_size):
    rope._is_exact.cache_clear()
    with wan_patches.enabled(["rope"]), wan_patches.profile() as profile:
        call(pipe, size=(128, 128), frames=13, output_type="latent")
    row = op(profile, "apply_rotary_emb")
    assert rope._is_exact.cache_info().misses == 1  # it was probed
    assert row.fast == row.calls > 0


def test_vae_calls_report_why_they_fall_back(pipe):
    hook = pipe.vae.decoder.conv_in.register_forward_hook(lambda *args: None)
    try:
        with wan_patches.enabled(["vae"]), wan_patches.profile() as profile:
            call(pipe)
    finally:
        hook.remove()
    assert {row.op for row in profile.ops} >= {"decode", "decode_chunk", "residual_block"}
    why = "a WanCausalConv3d has hooks or methods of its own"
    for row in profile.ops:
        because = why if row.op.startswith("decode") else "the frame caches are stock's, or somebody's own"
        assert (row.fast, row.reasons) == (0, {because: row.calls}), row


def test_tiles_are_counted_in_stocks_loop(built):
    pipe = FAMILIES["wan_t2v"].build()
    pipe.vae.enable_tiling(
        tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24, tile_sample_stride_width=24
    )
    with wan_patches.enabled(["vae"]), wan_patches.profile() as profile:
        call(pipe, frames=1)
    assert not any(row.op == "decode" for row in profile.ops)  # stock's loop over tiles
    assert op(profile, "decode_chunk").fast == op(profile, "decode_chunk").calls > 1
    assert op(profile, "blend").fast > 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"output_type": "pt"}, "the output type is neither pil nor np"),
        ({"output_type": "np"}, None),
    ],
)
def test_frames_report_why_they_fall_back(pipe, arguments, why):
    with wan_patches.enabled(["frames"]), wan_patches.profile() as profile:
        call(pipe, **arguments)
    row = op(profile, "postprocess_video")
    assert row.reasons == ({why: 1} if why else {})
    assert row.fast == (0 if why else 1)


def test_code_that_ran_before_it_was_stock_for_a_patch_is_recognised(pipe):
    with wan_patches.profile() as profile:
        call(pipe, output_type="pt")
        with wan_patches.enabled(["frames", "vae"]):
            call(pipe, output_type="pt")
    assert op(profile, "postprocess_video").stock == 1
    assert op(profile, "decode").fast == 1


def test_preprocessing_and_the_condition_video_report_why_they_fall_back(built, monkeypatch):
    pipe = built("wan22_i2v")
    encode = pipe.vae._encode
    monkeypatch.setattr(pipe.vae, "_encode", lambda video: encode(video))
    arguments = FAMILIES["wan22_i2v"].inputs(**SMALL) | {"image": torch.zeros(1, 3, 32, 48)}
    with wan_patches.enabled(), wan_patches.profile() as profile:
        pipe(**arguments)
    assert op(profile, "preprocess").reasons == {"the input is not PIL images in RGB": 1}
    assert op(profile, "condition_video").reasons == {"somebody looks on between encode and the encoder's layers": 1}
    assert op(profile, "condition_mask").fast == 1


def test_profiling_changes_no_bits(pipe):
    with wan_patches.enabled():
        expected = call(pipe)
        with wan_patches.profile(trace=True):
            watched = call(pipe)
    assert np.array_equal(expected, watched)


# Patches of others


def work(x, kind):
    return x + 1


def work_patched(stock, x, kind):
    if kind == "stock":
        tally.note("work", "", "it is odd")
        return stock(x, kind)
    tally.note("work", "turned round")
    return 1 + x


@op_of("of theirs")
def theirs(x, kind):
    return x + 1


@theirs.form("turned round")
def _turned_round(x, kind):
    return 1 + x


@_turned_round.refuses
def _(x, kind):
    return "it is odd" if kind == "stock" else None


def through_op(stock, x, kind):
    return theirs(x, kind)


@pytest.mark.parametrize("function", [work_patched, through_op])
def test_third_party_patches_are_profiled_too(function, monkeypatch):
    module, other = types.ModuleType("somebodys_ops"), types.ModuleType("theirs_ops")
    module.work = types.FunctionType(work.__code__, vars(module), "work")
    vars(other).update(tally=tally, theirs=theirs)
    other.patched = types.FunctionType(function.__code__, vars(other), "patched")
    other.patched.__code__ = function.__code__.replace(co_name="patched")
    module.__file__ = __file__
    monkeypatch.setitem(sys.modules, "somebodys_ops", module)
    monkeypatch.setitem(sys.modules, "theirs_ops", other)
    edit = Body(((fingerprint(work), "return _theirs_work(_theirs_stock, x, kind)"),))
    patch = Patch(
        name="theirs",
        module="somebodys_ops",
        targets=(Target("work", (edit,)),),
        calls={"_theirs_work": "theirs_ops:patched", "_theirs_stock": STOCK},
    )
    monkeypatch.setattr(wan_patches, "_registry", Registry([patch]))
    status = wan_patches.enable(strict=True)
    assert not status.skipped()
    x = torch.zeros(1)
    try:
        with wan_patches.profile() as profile:
            other.patched(module.work, x, "fast")  # not from patched code
            for kind in ("fast", "fast", "stock"):
                assert module.work(x, kind) == 1
        (report,) = wan_patches.status().reports
    finally:
        wan_patches.disable()
    (row,) = profile.ops
    assert (row.patch, row.op, row.calls, row.fast) == ("theirs", "patched", 3, 2)
    assert (row.forms, row.reasons) == ({"turned round": 2}, {"it is odd": 1})
    assert report.note == "fast in 2 of 3 calls; others: it is odd (1)"


# Costs nothing when off


def test_profiling_leaves_nothing_behind(pipe):
    with wan_patches.enabled():
        call(pipe)
        places = wan_patches._registry.places()
        owners = (pipe, pipe.scheduler, pipe.vae, *pipe.transformer.modules())

        def state():
            codes = [id(function.__code__) for place in places for function in (place.function, place.stock)]
            code_of_ops = [id(function.__code__) for function in (rope.stacked, type(pipe).__call__)]
            hooks = [len(module._forward_hooks) for module in pipe.transformer.modules()]
            return codes, code_of_ops, [sorted(vars(owner)) for owner in owners], hooks, sys.getprofile()

        before = state()
        with wan_patches.profile(trace=True):
            call(pipe)
            assert state() != before
        assert state() == before
        with pytest.raises(KeyError), wan_patches.profile():
            raise KeyError("no")
        assert state() == before
        assert not torch.autograd._profiler_enabled()


def test_a_profiler_set_before_is_restored(pipe):
    def other(frame, event, value):
        pass

    before = sys.getprofile()
    sys.setprofile(other)
    try:
        with wan_patches.profile():
            pass
        assert sys.getprofile() is other
    finally:
        sys.setprofile(before)


def test_cprofile_is_paused_and_resumed(pipe):
    cprofile = cProfile.Profile()
    cprofile.enable()
    try:
        on = sys.getprofile()
        with wan_patches.profile() as profile:
            call(pipe)
        assert sys.getprofile() is on
    finally:
        cprofile.disable()
    assert [row.calls for row in profile.pipelines] == [1]
    assert not any("another profiler" in note for note in profile.notes)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cProfile takes the place of no other there")
def test_a_profiler_that_takes_over_is_noted_and_nothing_is_left_behind(pipe):
    def on_step(pipe, step, timestep, given):
        with cProfile.Profile():
            return given

    call(pipe)
    before = [sorted(vars(owner)) for owner in (pipe, pipe.scheduler, pipe.vae)]
    with wan_patches.enabled(["vae"]), wan_patches.profile() as profile:
        call(pipe, callback_on_step_end=on_step)
    assert [sorted(vars(owner)) for owner in (pipe, pipe.scheduler, pipe.vae)] == before
    (row,) = profile.pipelines
    assert (row.calls, row.failed) == (1, 0)
    assert row.seconds["text"] > 0
    assert "another profiler was set meanwhile" in str(profile)
    with wan_patches.profile() as profile, cProfile.Profile():
        pass
    assert "no pipeline was called" not in str(profile)


def test_a_profile_within_a_profile_is_noted(pipe):
    with wan_patches.profile() as outer:
        with wan_patches.profile() as inner:
            call(pipe)
        call(pipe)
    assert [row.calls for row in (*outer.pipelines, *inner.pipelines)] == [1, 1]
    assert "another profiler was set meanwhile" in str(outer)
    assert "another profiler was set meanwhile" not in str(inner)


def test_a_running_torch_profiler_is_left_alone():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), wan_patches.profile(trace=True) as p:
        torch.ones(1)
    assert not p.recorded
    assert "torch's profiler was already on" in str(p)


# What it can be made into


@pytest.fixture(scope="module")
def found(built):
    with wan_patches.enabled(), wan_patches.profile(trace=True) as profile:
        call(built("wan_t2v"))
    return profile


def test_json_contains_the_whole_profile(found, tmp_path):
    found.save_json(tmp_path / "profile.json")
    content = json.loads((tmp_path / "profile.json").read_text())
    assert content == json.loads(found.to_json())
    assert content["pipelines"][0]["seconds"] == found.pipelines[0].seconds
    rows = {row["op"]: row for row in content["ops"]}
    assert rows["apply_rotary_emb"]["reasons"] == op(found, "apply_rotary_emb").reasons
    assert rows["decode"]["fast"] == 1
    assert content["machine"]["torch"]
    assert content["transfers"] == []


def test_the_profile_prints_as_tables_and_as_html(found):
    for shown in (str(found), found._repr_html_()):
        for text in ("WanPipeline", "denoise", "apply_rotary_emb", "residual_block", "first sight", "share"):
            assert text in shown
    assert "<pre" in found._repr_html_()


def test_the_chart_is_an_image_file(found, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    found.save_chart(tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 20)) > 5  # stages in colours


def test_the_trace_names_patched_operations(found, tmp_path):
    for name in ("trace.json", "again.json"):
        found.save_trace(tmp_path / name)
        events = json.loads((tmp_path / name).read_text())["traceEvents"]
        names = {event.get("name") for event in events}
        assert {"wan_patches: WanPipeline", "wan_patches: rope: apply_rotary_emb", "aten::mul"} <= names


def test_without_a_recording_there_is_no_trace(tmp_path):
    with wan_patches.profile(trace=False) as profile:
        pass
    with pytest.raises(RuntimeError, match=r"profile\(trace=True\)"):
        profile.save_trace(tmp_path / "trace.json")


def test_an_empty_chart_is_an_error(tmp_path):
    with wan_patches.profile() as profile:
        pass
    with pytest.raises(ValueError, match="no pipeline"):
        profile.save_chart(tmp_path / "chart.png")


def test_missing_matplotlib_is_an_error(found, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "wan-patches\[demo\]"'):
        found.save_chart(tmp_path / "chart.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"pipe": "script.py"}, "wan-patches profile script.py"), ({"trace": "trace.json"}, r"save_trace\(path\)")],
)
def test_invalid_arguments_are_explained(arguments, message):
    with pytest.raises(TypeError, match=message), wan_patches.profile(**arguments):
        pass


# The command


def test_the_command_runs_a_script_and_exits_with_its_status(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "script.py").write_text(
        "import sys\n"
        "from wan_patches.testing.families import FAMILIES\n"
        "family = FAMILIES['wan_t2v']\n"
        "pipe = family.build()\n"
        "pipe(**family.inputs(size=(48, 32), frames=1, steps=1))\n"
        "print('arguments', sys.argv[1:], __name__)\n"
        "sys.exit(7)\n"
    )
    files = ["--json", "p.json", "--chart", "p.png", "--trace", "t.json"]
    done = subprocess.run(
        [sys.executable, "-m", "wan_patches", "profile", "--patches", "frames,vae", *files, "script.py", "--json", "x"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == "arguments ['--json', 'x'] __main__"
    assert "postprocess_video" in done.stderr
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["active"] == ["frames", "vae"]
    assert content["pipelines"][0]["pipeline"] == "WanPipeline"
    assert (tmp_path / "p.png").stat().st_size > 0
    assert "traceEvents" in (tmp_path / "t.json").read_text()


def test_a_script_that_raises_is_profiled_until_then(tmp_path, monkeypatch, capsys):
    def run(target, arguments, *, module):
        raise KeyError(target)

    monkeypatch.setattr("wan_patches.diagnostics.script_runner.run", run)
    with pytest.raises(KeyError, match=r"script\.py"):
        profiling.run("script.py", json=tmp_path / "p.json")
    assert "no pipeline was called" in capsys.readouterr().err
    assert json.loads((tmp_path / "p.json").read_text())["pipelines"] == []


def test_the_first_rank_prints(monkeypatch, capsys):
    monkeypatch.setattr("wan_patches.diagnostics.script_runner.run", lambda *args, **kwargs: None)
    monkeypatch.setenv("RANK", "1")
    profiling.run("script.py")
    assert capsys.readouterr().err == ""


def test_a_file_that_cannot_be_written_does_not_hide_the_end_of_the_script(tmp_path, monkeypatch, capsys):
    def run(*args, **kwargs):
        raise SystemExit(3)

    monkeypatch.setattr("wan_patches.diagnostics.script_runner.run", run)
    with pytest.raises(SystemExit):
        profiling.run("script.py", chart=tmp_path / "chart.png")
    assert "chart.png was not written: nothing to draw" in capsys.readouterr().err


def test_an_error_at_the_start_of_a_profile_propagates(monkeypatch):
    def fail(*args):
        raise ImportError("no torch here")

    monkeypatch.setattr(profiling, "recorder", fail)
    with pytest.raises(ImportError, match="no torch here"):
        profiling.run("script.py")
