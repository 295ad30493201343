"""verify: what it finds on tiny pipelines that are right, and on those with something broken on purpose."""

from __future__ import annotations

import cProfile
import itertools
import json
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches import Patch, Replace, Target, verify
from wan_patches.diagnostics.verification.divergence import compare_calls, find_first_divergence, smallest
from wan_patches.diagnostics.verification.report import page
from wan_patches.diagnostics.verification.trials import Choice, Event, Subject, Trial, ops_of
from wan_patches.ops import frames as frames_op
from wan_patches.ops import rope as rope_op
from wan_patches.ops.modulation import SegmentedModulation
from wan_patches.patching.registry import Registry
from wan_patches.testing.families import FAMILIES, available

pytestmark = pytest.mark.usefixtures("one_thread")

T2V = FAMILIES["wan_t2v"]


@pytest.fixture(scope="module")
def pipe():
    return T2V.build()


def inputs(**more):
    return T2V.inputs(frames=5, steps=1, **more)


def one_ulp_up(function):
    def wrong(*args, **kwargs):
        out = function(*args, **kwargs)
        return torch.nextafter(out, torch.full_like(out, torch.inf), out=out)

    return wrong


@pytest.fixture
def broken_rope(monkeypatch):
    monkeypatch.setattr(rope_op.apply_rotary_emb, "reference", one_ulp_up(rope_op.apply_rotary_emb.reference))


@pytest.fixture
def broken_frames(monkeypatch):
    monkeypatch.setattr(frames_op, "_denormalize", one_ulp_up(frames_op._denormalize))


def theirs(edit, name="theirs", **more):
    """A patch of somebody else, for a module that no patch of ours is for."""
    called = f"_theirs_{id(edit)}"  # the names that patches put into a module stay there
    target = Target("FP32LayerNorm.forward", (Replace("inputs.float()", f"{called}(inputs)"),))
    return Patch(name, "diffusers.models.normalization", (target,), {called: edit}, **more)


def names(found):
    return [[patch.name for patch in culprit.patches] for culprit in found.culprits]


# What is right


@pytest.mark.parametrize("name", ["wan_t2v", "wan22_i2v"])
def test_the_patches_verify(name):
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"this diffusers has no {name}")
    found = verify(family.build(), **family.inputs(frames=5, steps=2))
    assert found.exact, found
    assert found.culprits == ()
    assert {"rope", "frames", "vae"} <= set(found.patches)
    ops = {op.name.removeprefix("diffusers."): op for op in found.ops}
    rope = ops["models.transformers.transformer_wan.WanAttnProcessor.__call__.apply_rotary_emb"]
    assert (rope.state, rope.patches) == ("same", ("rope",))
    assert rope.stock_calls == rope.patched_calls > 0
    assert ops["video_processor.VideoProcessor.postprocess_video"].state == "same"
    assert ops["models.autoencoders.autoencoder_kl_wan.AutoencoderKLWan.clear_cache"].state == "not compared"
    assert {block.state for block in found.blocks} == {"same"}
    assert any(block.name == "transformer.blocks.1" and block.stock_calls for block in found.blocks)
    stages = {stage.name: stage for stage in found.stages}
    assert all(stages[stage].difference.exact for stage in ("text", "denoise", "decode", "postprocess"))
    assert all(stage.stock_seconds > 0 and stage.patched_seconds > 0 for stage in found.stages)
    assert all(stage.stock_peak is not None for stage in found.stages)
    assert found.video.shape == (5, 32, 48, 3)
    assert set(found.video.ssim) == {1.0}
    assert found.strips.largest == 0


def test_verify_restores_everything(pipe):
    pipe(**inputs())  # which keeps some things on the instances itself
    generator = torch.Generator("cpu").manual_seed(7)
    torch.rand(3, generator=generator)
    before = generator.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    held = [dict(vars(part)) for part in (pipe, pipe.scheduler, pipe.vae)]
    wan_patches.enable(["frames"])
    profiler = sys.getprofile()
    found = verify(pipe, repeat=0, **inputs(generator=[generator]))
    assert found.exact
    assert "rope" in found.patches  # all are verified, whatever is enabled
    assert {report.name for report in wan_patches.status().reports if report.state == "active"} == {"frames"}
    assert sys.getprofile() is profiler
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]
    assert np.random.get_state()[1].tolist() == before[3]
    assert [vars(part).keys() for part in (pipe, pipe.scheduler, pipe.vae)] == [part.keys() for part in held]
    assert not any("__call__" in vars(kind) for kind in {type(module) for module in pipe.transformer.modules()})


@pytest.mark.skipif("helios" not in available(), reason="this diffusers has none")
def test_watched_blocks_get_the_same_arguments(any_size, monkeypatch):
    handed, added_to = [], SegmentedModulation.added_to
    monkeypatch.setattr(
        SegmentedModulation, "added_to", lambda rows, table: handed.append(rows) or added_to(rows, table)
    )
    subject = Subject(FAMILIES["helios"].build(), FAMILIES["helios"].inputs(output_type="latent"), str)
    with wan_patches.enabled():
        run = subject.observe([], "patched")
    assert run.error is None
    of_blocks = [event for event in run.events if event.kind == "block"]
    assert 0 < len(handed) <= len(of_blocks)  # the first chunk of a video has no history
    assert {event.name for event in of_blocks} == {name for name, _ in subject.blocks}


def test_without_a_generator_every_run_draws_the_same_noise(pipe):
    found = verify(pipe, repeat=1, **inputs(generator=None))
    assert found.stock_repeats
    assert found.exact


def test_compiled_models_are_verified_without_hooks():
    compiled = T2V.build()
    compiled.transformer.compile(backend="eager")
    found = verify(compiled, repeat=0, **inputs())
    assert found.exact
    assert found.blocks == ()
    assert "Compiled, so its blocks were not compared: transformer." in found.notes


def test_latent_output_is_verified_without_a_video(pipe):
    found = verify(pipe, repeat=0, **inputs(output_type="latent"))
    assert found.exact
    assert found.video is None
    assert str(found)


def test_only_the_named_patches_are_active(pipe):
    found = verify(pipe, patches="rope", repeat=0, **inputs())
    assert found.patches == ("rope",)
    assert all(op.patches == ("rope",) for op in found.ops)


# What is broken


def quantised(pipe):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())


def in_four_bits(pipe):
    """As diffusers loads a model with bitsandbytes, which it refuses to do without a GPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, linear in list(pipe.transformer.blocks.named_modules()):
        if type(linear) is torch.nn.Linear:
            sizes = linear.in_features, linear.out_features
            packed = bitsandbytes.nn.Linear4bit(*sizes, linear.bias is not None, compute_dtype=torch.bfloat16)
            packed.load_state_dict(linear.state_dict())
            pipe.transformer.blocks.set_submodule(name, packed.to("cpu"))


def from_gguf(pipe):
    """The weights of attention in eight bits, written to a file and loaded from it as users do."""
    gguf = pytest.importorskip("gguf")
    diffusers = pytest.importorskip("diffusers")
    with tempfile.TemporaryDirectory() as folder:
        path, kind = f"{folder}/model.gguf", gguf.GGMLQuantizationType.Q8_0
        writer = gguf.GGUFWriter(path, "wan")
        for name, weight in pipe.transformer.state_dict().items():
            values = weight.float().numpy()
            if values.ndim == 2 and ".attn" in name:
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        pipe.transformer.save_config(f"{folder}/transformer")
        pipe.transformer = type(pipe.transformer).from_single_file(
            path,
            config=folder,
            subfolder="transformer",
            quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
            torch_dtype=torch.bfloat16,
        )


def with_lora(pipe):
    peft = pytest.importorskip("peft")
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"]), "style")


def cast_by_layers(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


def offloaded(pipe):
    here = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=here, offload_device=here, offload_type="block_level", num_blocks_per_group=1
    )


@pytest.mark.parametrize("prepare", [quantised, in_four_bits, from_gguf, with_lora, cast_by_layers, offloaded])
def test_quantised_cast_and_offloaded_pipelines_are_verified(prepare, any_size, tmp_path):
    pipe = FAMILIES["wan_t2v"].build(dtype=torch.bfloat16)
    prepare(pipe)
    found = verify(pipe, repeat=0, report=tmp_path / "report.html", **inputs())
    assert found.exact, found
    fast, total = found.calls["modulation"]
    assert fast == total > 0
    assert found.exercise.startswith("fast in")
    assert json.loads(found.to_json())["calls"]["modulation"] == [fast, total]
    assert "fast in" in (tmp_path / "report.html").read_text()


def test_small_sizes_exercise_no_fast_forms(pipe):
    found = verify(pipe, patches=["rope"], repeat=0, **inputs())
    assert found.exact
    assert found.exercise == "fast forms were not exercised"
    assert "fast forms were not exercised" in str(found)


def test_a_broken_patch_is_named(pipe, broken_rope):
    found = verify(pipe, repeat=0, **inputs())
    assert not found.exact
    assert names(found) == [["rope"]]
    (culprit,) = found.culprits
    assert culprit.patches[0].module == "diffusers.models.transformers.transformer_wan"
    assert culprit.first_divergence.kind == "op"
    assert culprit.first_divergence.name.endswith("WanAttnProcessor.__call__.apply_rotary_emb")
    assert culprit.first_divergence.call == 1
    states = {stage.name: stage.difference.exact for stage in found.stages}
    assert states["text"]
    assert not states["denoise"]
    assert next(block.name for block in found.blocks if block.differing) == "transformer.blocks.0"
    assert "rope" in str(found)
    assert "NOT the same bits" in str(found)


def test_a_broken_last_step_is_named_with_its_difference(pipe, broken_frames):
    found = verify(pipe, repeat=0, **inputs(output_type="np"))
    assert names(found) == [["frames"]]
    assert found.first_divergence.name == "diffusers.video_processor.VideoProcessor.postprocess_video"
    assert found.result.max_ulp == 1
    assert {stage.name for stage in found.stages if not stage.difference.exact} == {"postprocess"}
    assert 100 < min(found.video.psnr) < 200


def test_two_broken_patches_are_both_named(pipe, broken_rope, broken_frames):
    assert sorted(names(verify(pipe, repeat=0, **inputs()))) == [["frames"], ["rope"]]


def test_a_broken_third_party_patch_is_named(pipe, monkeypatch):
    ours = [place.patch for place in _active()]
    patch = theirs(lambda x: x.float() * (1 + 1e-6))
    monkeypatch.setattr(wan_patches, "_registry", Registry([*ours, patch]))
    found = verify(pipe, repeat=0, **inputs())
    assert names(found) == [["theirs"]]
    assert found.culprits[0].patches[0].targets == ("FP32LayerNorm.forward",)
    assert found.first_divergence.name == "diffusers.models.normalization.FP32LayerNorm.forward"


def _active():
    import diffusers.video_processor  # noqa: F401

    with wan_patches.enabled(["frames", "rope"]):
        return wan_patches._registry.places()


def test_patches_can_be_given_as_values(pipe):
    found = verify(pipe, patches=[theirs(lambda x: x.float())], repeat=0, **inputs())
    assert found.exact
    assert found.patches == ("theirs",)
    with pytest.raises(ValueError, match="not a mixture"):
        verify(pipe, patches=["rope", theirs(lambda x: x.float())])


def test_a_patch_that_raises_is_named(pipe):
    def fail(x):
        raise RuntimeError("out of luck")

    found = verify(pipe, patches=[theirs(fail)], **inputs())
    assert not found.exact
    assert found.error == "RuntimeError: out of luck"
    assert names(found) == [["theirs"]]
    assert "out of luck" in str(found)
    assert found.video is None


def test_first_results_of_the_gate_do_not_count_against_close_patches(pipe):
    runs = []

    def first_as_stock(x):
        return x.float() if runs[-1] == "patched, to warm up" else x.float() * (1 + 1e-3)

    patch = theirs(first_as_stock, fidelity=wan_patches.Fidelity.CLOSE)
    found = verify(pipe, patches=[patch], fidelity="close", repeat=1, on_run=runs.append, **inputs())
    assert found.patched_repeats
    assert found.verdict == "different"
    assert not any("differ from each other" in note for note in found.notes)


def test_patches_that_differ_only_together_are_found_together():
    def differs(patches):
        tried.append(len(patches))
        return {3, 6} <= {*patches}

    for total in (7, 8, 20):
        tried = []
        assert smallest(range(total), differs) == [3, 6]
        assert len(tried) < 4 * total
    assert smallest([1, 2], lambda patches: len(patches) == 2) == [1, 2]
    assert smallest([1, 2, 3], lambda patches: 2 in patches) == [2]


def test_differently_divided_work_is_never_reported_as_the_same():
    def trial(*digests):
        return Trial([Event("op", "f", one) for one in digests] + [Event("result", "result", "r")])

    def compared(stock, patched):
        return compare_calls(stock, patched, [])["op", "f"]

    assert compared(trial("a"), trial("a")).state == "same"
    assert compared(trial("a"), trial("a", "b")).state == "not compared"
    assert compared(trial(None), trial(None)).state == "not compared"
    assert compared(trial("a", "b"), trial("a", None)).state == "not compared"
    assert compared(trial("a", "b"), trial("a", "c")).state == "differs"
    assert find_first_divergence(trial("a"), trial("b", "c"), compare_calls(trial("a"), trial("b", "c"), [])) is None


def test_additional_calls_of_blocks_and_stages_are_differences():
    stock, patched = (Trial([Event("block", "b", "a")] * calls) for calls in (2, 1))
    assert find_first_divergence(stock, patched, compare_calls(stock, patched, [])).call == 2
    assert find_first_divergence(patched, stock, compare_calls(patched, stock, [])).call == 2


def test_the_watched_code_is_the_code_that_runs():
    from diffusers.models.transformers import transformer_wan

    function = transformer_wan.WanAttnProcessor.__call__
    with wan_patches.enabled(["rope"]):
        (op,) = (op for op in ops_of(wan_patches._registry.places()) if op.function is function)
        patched = op.codes()
    stock = op.codes()
    assert [code.co_name for code in (*stock, *patched)] == ["apply_rotary_emb"] * 2
    assert stock != patched


# Other pipelines, and what is asked of them


@dataclass
class Anything:
    result: object

    def __call__(self, **inputs):
        return self.result() if callable(self.result) else self.result


def test_any_callable_can_be_verified():
    from diffusers.video_processor import VideoProcessor

    video = torch.rand(1, 3, 2, 16, 16)
    found = verify(Anything(lambda: VideoProcessor().postprocess_video(video)))
    assert found.exact, found
    assert [stage.name for stage in found.stages] == ["call"]


def test_without_calls_of_patched_functions_the_verdict_is_unknown():
    found = verify(Anything(torch.ones(3)), repeat=0)
    assert (found.exact, found.verdict, found.undecided) == (False, "unknown", "no patched function was seen to run")
    assert str(found).startswith("NOT verified: no patched function was seen to run (Anything on cpu, patches: ")
    assert any("patches do not apply to this pipeline" in note for note in found.notes)


def test_without_an_active_patch_the_verdict_is_unknown(pipe):
    found = verify(pipe, patches="timesteps", repeat=0, **inputs())
    assert (found.exact, found.verdict, found.undecided) == (False, "unknown", "no patch was in force")
    assert "Not in force: timesteps, which requires fidelity='close'." in found.notes
    assert "NOT verified: no patch was in force (WanPipeline on cpu, patches: none)" in str(found)
    assert "Every bit" not in str(found) + found._repr_html_() + page(found)
    content = json.loads(found.to_json())
    assert (content["exact"], content["verdict"]) == (False, "unknown")
    assert content["undecided"] == "no patch was in force"


def test_with_only_a_skipped_patch_the_verdict_is_unknown(pipe):
    target = Target("FP32LayerNorm.forward", (Replace("what is not there", "_theirs(inputs)"),))
    patch = Patch("theirs", "diffusers.models.normalization", (target,), {"_theirs": torch.neg})
    found = verify(pipe, patches=[patch], repeat=0, **inputs())
    assert found.undecided == "no patch was in force"
    assert any(note.startswith("Not in force: theirs in diffusers.models.normalization, ") for note in found.notes)


def test_with_only_a_patch_waiting_for_an_import_the_verdict_is_unknown(pipe):
    patch = Patch("theirs", "a_module_that_is_not_there", (Target("f", ()),), {})
    found = verify(pipe, patches=[patch], repeat=0, **inputs())
    assert found.undecided == "no patch was in force"
    assert "Not in force: theirs, because none of its modules was imported." in found.notes


def test_an_active_patch_beside_an_inactive_one_is_verified(pipe):
    found = verify(pipe, patches=["frames", "timesteps"], repeat=0, **inputs())
    assert (found.exact, found.undecided) == (True, "")
    assert "Not in force: timesteps, which requires fidelity='close'." in found.notes


def test_a_nondeterministic_pipeline_has_an_unknown_verdict():
    numbers = iter(range(100))
    found = verify(Anything(lambda: torch.tensor(next(numbers))), repeat=0)
    assert not found.exact
    assert not found.stock_repeats
    assert found.culprits == ()
    assert found.undecided == "runs of stock code differ from each other"


def stateful(calls):
    """A callback that makes every run another one."""

    def on_step(pipe, step, timestep, given):
        given["latents"] = given["latents"] + 1e-2 * next(calls)
        return given

    return on_step


def test_patches_are_not_blamed_for_differences_between_stock_runs(pipe):
    found = verify(pipe, repeat=0, **inputs(callback_on_step_end=stateful(itertools.count(1))))
    assert not found.exact
    assert (found.verdict, found.undecided) == ("unknown", "runs of stock code differ from each other")
    assert found.culprits == ()
    assert any(note.startswith("Runs of stock code differ") for note in found.notes)
    for shown in (str(found), found._repr_html_(), page(found)):
        assert "NOT verified: runs of stock code differ from each other" in shown
        assert "The first difference" not in shown
        assert "Runs of patched code differ" not in shown
        assert "No set of patches" not in shown


def test_cprofile_is_paused_during_watched_runs(pipe):
    cprofile = cProfile.Profile()
    cprofile.enable()
    try:
        on = sys.getprofile()
        found = verify(pipe, repeat=0, **inputs())
        assert sys.getprofile() is on
    finally:
        cprofile.disable()
    assert found.exact, found


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="cProfile takes the place of no other there")
def test_a_profiler_that_takes_over_is_noted(pipe):
    def on_step(pipe, step, timestep, given):
        with cProfile.Profile():
            return given

    found = verify(pipe, patches="frames", repeat=0, **inputs(callback_on_step_end=on_step))
    assert found.exact, found
    assert not any(op.patched_calls for op in found.ops)
    assert any(note.startswith("Another profiler was set") for note in found.notes)
    assert not any("No patched function was seen" in note for note in found.notes)


@pytest.mark.parametrize("path", ["nowhere/report.html", "."])
def test_an_unwritable_report_is_rejected_before_the_runs(path, tmp_path):
    with pytest.raises(OSError, match=r"there is no folder|is a folder"):
        verify(Anything(lambda: pytest.fail("it ran")), report=tmp_path / path)


def test_a_failed_report_does_not_lose_the_result(tmp_path, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()

    def result():
        shutil.rmtree(folder, ignore_errors=True)
        return torch.ones(1)

    found = verify(Anything(result), repeat=0, report=folder / "report.html")
    assert found.result.exact
    assert found.notes[-1].startswith("The report was not written to ")
    assert "The report was not written to " in caplog.text


def test_names_of_patches_may_stand_in_one_text():
    assert Choice("rope, frames,", "exact").names == ["rope", "frames"]
    assert Choice(["rope", "qk,vae"], "exact").names == ["rope", "qk", "vae"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repeat": -1}, ValueError, "0 or more measured runs, not -1"),
        ({"repeat": "2"}, TypeError, "repeat must be an integer.*'2'"),
        ({"repeat": 1.5}, TypeError, "repeat must be an integer.*1.5"),
        ({"patches": ["rpoe"]}, ValueError, "unknown patch rpoe; known: "),
        ({"patches": "rope, rpoe"}, ValueError, "unknown patch rpoe; known: "),
        ({"fidelity": "exactly"}, ValueError, "unknown fidelity 'exactly'"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, error, message):
    with pytest.raises(error, match=message):
        verify(Anything(torch.ones(1)), **arguments)


def test_unverifiable_objects_are_rejected():
    with pytest.raises(TypeError, match="verify expects a pipeline or another callable"):
        verify(torch.ones(1))
    with pytest.raises(TypeError, match="nothing to verify"):
        verify(Anything("words"))
    with pytest.raises(TypeError, match=r"not the class Anything: pass Anything\.from_pretrained"):
        verify(Anything)
    with pytest.raises(TypeError, match="not a Linear: pass the pipeline that has it"):
        verify(torch.nn.Linear(1, 1))


def test_errors_of_stock_propagate_and_everything_is_restored(pipe):
    generator = torch.Generator("cpu").manual_seed(3)
    before = generator.get_state()
    with pytest.raises(ValueError, match="divisible"):
        verify(pipe, **inputs(generator=generator, size=(47, 31)))
    assert torch.equal(generator.get_state(), before)
    assert not any(report.state == "active" for report in wan_patches.status().reports)


def test_json_is_valid_and_complete(pipe, broken_frames, tmp_path):
    found = verify(pipe, repeat=1, **inputs(prompt="A <fox>"))
    found.save_json(tmp_path / "found.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "found.json").read_text(), parse_constant=refuse)
    assert read["exact"] is False
    assert (read["verdict"], read["undecided"]) == ("different", "")
    assert read["culprits"][0]["patches"][0]["name"] == "frames"
    assert read["inputs"]["prompt"] == "'A <fox>'"
    assert read["stages"][0]["stock_seconds"] > 0
    assert "strips" not in read
    assert set(read["facts"]) >= {"torch", "diffusers", "device", "transformer"}
