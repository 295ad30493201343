"""Weights divided while they are read, over two processes under gloo, against the same folder loaded by stock.

Also the program of those processes: `python test_sharding.py RANK FOLDER CASE...`, as in `ranks.py`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wan_patches.bench.measure import peak_extra_bytes
from wan_patches.executor import ParallelExecutor, sharding
from wan_patches.executor.layouts import LAYOUTS, loading_sharded, place
from wan_patches.executor.session import Pretrained, Session
from wan_patches.testing.families import FAMILIES

CPU = torch.device("cpu")
SECONDS = 300
MIB = 1 << 20
HERE = Path(__file__).parent

BF16, FP32 = torch.bfloat16, torch.float32
ODD = {"transformer": {"ffn_dim": 131, "num_attention_heads": 3, "out_channels": 16, "freq_dim": 250}}

# What is saved: family, options of its builder, arguments of `save_pretrained`
SAVED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "wan_t2v": ("wan_t2v", {}, {"max_shard_size": "100KB"}),
    "one_file": ("wan_t2v", {}, {}),
    "bf16": ("wan_t2v", {"dtype": BF16}, {"max_shard_size": "100KB"}),
    "odd": ("wan_t2v", ODD, {"max_shard_size": "100KB"}),
    "variant": ("wan_t2v", {}, {"max_shard_size": "100KB", "variant": "mine"}),
    "wan22_i2v": ("wan22_i2v", {}, {"max_shard_size": "100KB"}),
    "wan_vace": ("wan_vace", {}, {"max_shard_size": "100KB"}),
    "helios": ("helios", {}, {"max_shard_size": "100KB"}),
}

# What is loaded: the folder, arguments of `from_pretrained`
LOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "wan_t2v": ("wan_t2v", {}),
    "wan_t2v in bf16": ("wan_t2v", {"torch_dtype": BF16}),
    "one file": ("one_file", {}),
    "one file in bf16": ("one_file", {"torch_dtype": BF16}),
    "bf16 in fp32": ("bf16", {"torch_dtype": FP32}),
    "bf16 in bf16": ("bf16", {"torch_dtype": BF16}),
    "dtypes by name": ("wan_t2v", {"torch_dtype": {"transformer": BF16, "default": FP32}}),
    "odd": ("odd", {}),
    "odd in bf16": ("odd", {"torch_dtype": BF16}),
    "variant": ("variant", {"variant": "mine", "use_safetensors": True}),
    "wan22_i2v": ("wan22_i2v", {}),
    "wan22_i2v in bf16": ("wan22_i2v", {"torch_dtype": BF16}),
    "wan_vace": ("wan_vace", {"torch_dtype": BF16}),
    "helios": ("helios", {}),
    "helios in bf16": ("helios", {"torch_dtype": BF16}),
}


def available(case: str) -> bool:
    return FAMILIES[SAVED[LOADED[case][0]][0]].available


# In each of two processes


def load(folder: Path, **arguments: Any) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **arguments)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(folder: Path, **arguments: Any) -> Any:
    """As stock loads it, with the weights in memory of their own.

    On the CPU, stock's lie where they are in the file, if they keep their dtype: at any address. Kernels may round
    otherwise there than at the addresses that an allocator gives; on other devices weights are always copied.
    """
    pipe = load(folder, **arguments)
    for model in denoisers(pipe).values():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return pipe


def denoisers(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if name.startswith("transformer") and part is not None}


def video(pipe: Any, family: str) -> np.ndarray:
    return pipe(**FAMILIES[family].inputs(seed=1)).frames


def differences(model: Any, other: Any) -> list[str]:
    """What is not as in the model that stock has loaded: parameters and buffers, values and dtypes."""
    found = []
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(model, kind)()), dict(getattr(other, kind)())
        found += [f"{name} is in one only" for name in ours.keys() ^ theirs.keys()]
        for name in (name for name in ours if name in theirs):  # all ranks in the same order
            tensor = ours[name].full_tensor() if hasattr(ours[name], "full_tensor") else ours[name]
            if tensor.dtype != theirs[name].dtype:
                found.append(f"{name} is {tensor.dtype}, not {theirs[name].dtype}")
            elif not torch.equal(tensor, theirs[name]):
                found.append(f"{name} has other values")
    return [*found, *(["training"] if model.training else [])]


def unlike_stock(folder: Path, case: str) -> dict[str, Any]:
    """What differs between a pipeline that is divided while it is loaded and that of stock."""
    name, arguments = LOADED[case]
    family, expected = SAVED[name][0], stock(folder / name, **arguments)
    with loading_sharded(CPU):
        pipe = load(folder / name, **arguments)
    divided = {part: sharding.is_sharded(module) for part, module in denoisers(pipe).items()}
    held = {part: share(module) for part, module in denoisers(pipe).items()}
    place(pipe, "sharded", CPU)
    found = {part: differences(module, getattr(expected, part)) for part, module in denoisers(pipe).items()}
    same = np.array_equal(video(pipe, family), video(expected, family))
    again = {part: share(module) for part, module in denoisers(pipe).items()}
    return {"divided": divided, "held": held, "held after": again, "differences": found, "video": same}


def share(model: Any) -> float:
    """The part of the model's bytes that this rank holds."""
    held = sum(getattr(p, "to_local", lambda p=p: p)().untyped_storage().nbytes() for p in model.parameters())
    return held / sum(p.numel() * p.element_size() for p in model.parameters())


def sessions(folder: Path) -> dict[str, Any]:
    """What is divided while it is loaded: pipelines that the session loads, not those of a user's factory."""
    found: dict[str, Any] = {}
    fill, filled = sharding._fill, []

    def noting(model: Any, *arguments: Any) -> None:
        filled.append(type(model).__name__)
        fill(model, *arguments)

    sharding._fill = noting
    builds = {"ours": Pretrained(str(folder / "wan22_i2v")), "factory": lambda: load(folder / "wan22_i2v")}
    for name, build in builds.items():
        filled.clear()
        session = Session(build, LAYOUTS["sharded"], CPU, ranks=2)
        output, _ = session.run(0, (), FAMILIES["wan22_i2v"].inputs(seed=1))
        found[name] = {"filled": len(filled), "video": output.frames, "share": share(session._pipe.transformer_2)}
    sharding._fill = fill
    assert diffusers.ModelMixin.__dict__["_load_pretrained_model"].__func__.__module__.startswith("diffusers")
    return found


def given_transformer(folder: Path) -> dict[str, Any]:
    """A transformer of the user's own is taken as it is, and divided by `place`; one left out is none."""
    # not by DiffusionPipeline, which does not look for components that are optional
    build = functools.partial(diffusers.WanImageToVideoPipeline.from_pretrained, str(folder / "wan22_i2v"))
    own, same = (FAMILIES["wan22_i2v"].build(seed=7).transformer for _ in range(2))
    expected = build(transformer=same, transformer_2=None, boundary_ratio=None)
    with loading_sharded(CPU):
        left_out = build(transformer_2=None, boundary_ratio=None)
        pipe = build(transformer=own, transformer_2=None, boundary_ratio=None)
    found = {"taken": pipe.transformer is own, "divided": sharding.is_sharded(left_out.transformer)}
    found["none"] = pipe.transformer_2 is None and left_out.transformer_2 is None
    place(pipe, "sharded", CPU)
    return found | {"video": np.array_equal(video(pipe, "wan22_i2v"), video(expected, "wan22_i2v"))}


def subfolder(folder: Path) -> list[str]:
    """One model by itself."""
    arguments = {"subfolder": "transformer", "torch_dtype": BF16}
    with loading_sharded(CPU):
        model = diffusers.WanTransformer3DModel.from_pretrained(str(folder / "wan_t2v"), **arguments)
    assert sharding.is_sharded(model)
    return differences(model, diffusers.WanTransformer3DModel.from_pretrained(str(folder / "wan_t2v"), **arguments))


@contextlib.contextmanager
def logged() -> Iterator[list[str]]:
    """What is warned of meanwhile: by us, and by diffusers."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger("wan_patches"), logging.getLogger("diffusers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield messages
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def whole(folder: Path, name: str, **arguments: Any) -> dict[str, Any]:
    """A pipeline that cannot be divided while it is loaded."""
    expected = video(stock(folder / name, **arguments), "wan_t2v")
    with loading_sharded(CPU), logged() as messages:
        pipe = load(folder / name, **arguments)
    divided = sharding.is_sharded(pipe.transformer)
    place(pipe, "sharded", CPU)
    return {"divided": divided, "messages": messages, "video": np.array_equal(video(pipe, "wan_t2v"), expected)}


def broken(folder: Path, name: str) -> list[str]:
    with loading_sharded(CPU), logged() as messages:
        try:
            load(folder / name)
        except OSError as error:
            raise RuntimeError(f"OSError: {error}") from error
    return messages


def memory(folder: Path, how: str) -> dict[str, float]:
    """MiB of this rank, over what it had before, while and after it loads and calls a large model."""
    inputs = {
        "hidden_states": torch.zeros(1, 16, 1, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.zeros(1, 8, 32),
    }
    kept: list[Any] = []

    def build() -> None:
        with loading_sharded(CPU) if how == "on load" else contextlib.nullcontext():
            kept.append(diffusers.WanTransformer3DModel.from_pretrained(str(folder / "large"), torch_dtype=FP32))
        place(Holder(kept[0]), "sharded", CPU)

    def call() -> None:
        with torch.no_grad():
            kept[0](**inputs)

    small = Holder(FAMILIES["wan_t2v"].build().transformer)  # what torch and diffusers need once
    place(small, "sharded", CPU)
    small.components["transformer"](**inputs)
    del small
    before = resident()
    found = {"load": peak_extra_bytes(build, CPU) or 0, "loaded": resident() - before}
    found["call"] = resident() - before + (peak_extra_bytes(call, CPU) or 0)
    found["called"] = resident() - before
    sizes = [[p.numel() * p.element_size() for p in part.parameters()] for part in (kept[0], kept[0].blocks[0])]
    found |= {"weights": sum(sizes[0]), "block": sum(sizes[1])}
    return {name: size / MIB for name, size in found.items()}


class Holder:
    """All that `place` wants of a pipeline."""

    def __init__(self, transformer: Any) -> None:
        self.components = {"transformer": transformer}


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


CASES: dict[str, Callable[[Path], Any]] = {
    **{f"load {case}": functools.partial(unlike_stock, case=case) for case in LOADED if available(case)},
    "sessions": sessions,
    "given": given_transformer,
    "subfolder": subfolder,
    "whole bin": functools.partial(whole, name="bin"),
    "broken missing": functools.partial(broken, name="missing"),
    "broken part": functools.partial(broken, name="part"),
    "broken shape": functools.partial(broken, name="shape"),
    "broken pointer": functools.partial(broken, name="pointer"),
    "broken unexpected": functools.partial(broken, name="unexpected"),
}

# Not with the others, whose memory would be used again
MEMORY: dict[str, Callable[[Path], Any]] = {
    "memory on load": functools.partial(memory, how="on load"),
    "memory after": functools.partial(memory, how="after"),
}

if __name__ == "__main__":
    import ranks

    checkpoints = Path(sys.argv[2]).parent / "checkpoints"
    cases = {**CASES, **MEMORY}
    ranks.CASES = {case: functools.partial(cases[case], checkpoints) for case in sys.argv[3:]}
    ranks.main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])


# In the process of the tests


def run(folder: Path, *chosen: str, **environment: str) -> list[dict[str, Any]]:
    """What each rank got in each case."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), **environment}
    folder.mkdir()
    processes = []
    try:
        for rank in range(2):
            with (folder / f"{rank}.log").open("w") as log:
                command = [sys.executable, __file__, str(rank), str(folder), *chosen]
                processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        for process in processes:
            process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(2)]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(log[-3000:] for log in logs)
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def checkpoints(folder: Path) -> Path:
    saved = folder / "checkpoints"
    for name, (family, options, arguments) in SAVED.items():
        if FAMILIES[family].available:
            pipe = FAMILIES[family].build(**options)
            pipe.save_pretrained(saved / name, **arguments)
    FAMILIES["wan_t2v"].build().save_pretrained(saved / "bin", safe_serialization=False)
    for name in ("missing", "shape", "pointer", "unexpected"):
        shutil.copytree(saved / "one_file", saved / name)
    shutil.copytree(saved / "wan_t2v", saved / "part")
    _damage(saved)
    return saved


def _damage(saved: Path) -> None:
    def file(name: str) -> Path:
        return saved / name / "transformer" / "diffusion_pytorch_model.safetensors"

    weights = load_file(file("one_file"))
    less = {key: tensor for key, tensor in weights.items() if not key.startswith("blocks.1.ffn")}
    save_file(less, file("missing"))
    save_file({**weights, "proj_out.bias": torch.zeros(7)}, file("shape"))
    save_file({**weights, "of_another.model": torch.zeros(7)}, file("unexpected"))
    part = sorted((saved / "part" / "transformer").glob("*-00002-of-*"))[0]
    part.unlink()
    part.write_bytes((saved / "part" / "transformer").glob("*-00001-of-*").__next__().read_bytes())
    file("pointer").unlink()
    file("pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")


@pytest.fixture(scope="module")
def results(folder: Path, checkpoints: Path) -> list[dict[str, Any]]:
    return run(folder / "ranks", *CASES)


def given(results: list[dict[str, Any]], case: str) -> list[Any]:
    for rank in results:
        if isinstance(rank[case], Exception):
            raise rank[case]
    assert len(results) == 2
    return [rank[case] for rank in results]


@pytest.mark.upstream
@pytest.mark.parametrize("case", LOADED)
def test_what_is_divided_on_load_is_what_stock_loads(case, request):
    if not available(case):
        pytest.skip(f"diffusers {diffusers.__version__} has no {case.split()[0]}")
    for rank in given(request.getfixturevalue("results"), f"load {case}"):
        assert rank["divided"] == dict.fromkeys(rank["divided"], True)
        assert rank["divided"].keys() == rank["differences"].keys() >= {"transformer"}
        assert all(not found for found in rank["differences"].values()), rank["differences"]
        assert rank["video"]
        # rows of tables of one row, and of odd ones, cannot be halved: much here and nothing in large models
        for when in ("held", "held after"):
            assert all(0.45 < part < 0.55 for part in rank[when].values())


@pytest.mark.upstream
def test_models_were_stored_in_several_files_with_rows_that_cannot_be_halved(checkpoints):
    for name in ("wan_t2v", "odd", "variant", "wan22_i2v"):
        assert len([*(checkpoints / name / "transformer").glob("*.safetensors")]) > 3
    assert all("mine" in path.name for path in (checkpoints / "variant" / "transformer").glob("*.safetensors"))
    index = json.loads((checkpoints / "odd/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    odd = []
    for key, file in index["weight_map"].items():
        with safe_open(checkpoints / "odd" / "transformer" / file, "pt") as tensors:
            odd += [key] if tensors.get_slice(key).get_shape()[0] % 2 else []
    assert {"blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.net.0.proj.bias", "scale_shift_table"} <= {*odd}


@pytest.mark.upstream
@pytest.mark.usefixtures("one_thread")
def test_a_session_divides_on_load_what_it_loads_itself(results, checkpoints):
    expected = video(stock(checkpoints / "wan22_i2v"), "wan22_i2v")
    for rank in given(results, "sessions"):
        assert rank["ours"]["filled"] == 2
        assert rank["factory"]["filled"] == 0
        for how in ("ours", "factory"):
            assert np.array_equal(rank[how]["video"], expected)
            assert rank[how]["share"] == pytest.approx(0.5, abs=0.02)


def test_a_transformer_of_the_users_own_is_taken(results):
    for rank in given(results, "given"):
        assert rank == {"taken": True, "divided": True, "none": True, "video": True}


def test_a_model_by_itself_can_be_loaded(results):
    assert given(results, "subfolder") == [[], []]


@pytest.mark.upstream
def test_what_cannot_be_divided_on_load_is_divided_after_it(results):
    for rank in given(results, "whole bin"):
        assert not rank["divided"]
        reason = "its weights are not in safetensors files"
        warning = f"every rank loads all weights of WanTransformer3DModel before they are sharded: {reason}"
        assert warning in rank["messages"]
        assert rank["video"]


def test_keys_that_stock_renames_in_one_file_are_renamed(tmp_path):
    class Renaming:
        def _fix_state_dict_keys_on_load(self, state_dict):
            state_dict["to_q.weight"] = state_dict.pop("query.weight")

    names = ["query.weight", "scale"]
    save_file({names[0]: torch.zeros(3, 2), names[1]: torch.zeros(4, dtype=torch.int64)}, tmp_path / "a.safetensors")
    found = sharding._stored(Renaming(), [str(tmp_path / "a.safetensors")])
    assert {name: (part.key, part.shape, part.floating) for name, part in found.items()} == {
        "to_q.weight": ("query.weight", (3, 2), True),
        "scale": ("scale", (4,), False),
    }


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, None),
        ({"hf_quantizer": object()}, "quantised"),
        ({"device_map": {"": "cpu"}}, "device map"),
        ({"tp_shard_specs": {}}, "parallel_config"),
        ({"dduf_entries": {"a": 1}}, "DDUF"),
        ({"dtype": torch.float8_e4m3fn}, "casts it to torch.float8_e4m3fn after loading"),
        ({"files": ["a.safetensors", "b.bin"]}, "not in safetensors files"),
        ({"model": torch.nn.ModuleList([torch.nn.Linear(1, 1)])}, "low_cpu_mem_usage=False"),
        ({"model": torch.nn.Linear(1, 1, device="meta")}, "no list of blocks"),
    ],
)
def test_what_cannot_be_divided_on_load_is_known_before_it_is_read(given, reason):
    usual = {"dtype": BF16, "device_map": None, "hf_quantizer": None}
    model = given.pop("model", torch.nn.ModuleList([torch.nn.Linear(1, 1, device="meta")]))
    found = sharding._obstacle(model, given.pop("files", ["a.safetensors"]), usual | given)
    assert (found is None) if reason is None else (reason in found)


BROKEN: dict[str, tuple[type[Exception], str]] = {
    "missing": (ValueError, r"transformer \(diffusion_pytorch_model.safetensors\) has no weights for 4 parameters of "
                            r"WanTransformer3DModel: blocks.1.ffn.net.0.proj.bias, blocks.1.ffn.net.0.proj.weight"),
    "part": (ValueError, r"-00008-of-00008.safetensors\) has no weights for \d+ parameters of Wan"),
    "shape": (ValueError, r"proj_out.bias has shape \(7,\) in diffusion_pytorch_model.safetensors, and \(64,\) in Wan"),
    "pointer": (RuntimeError, "OSError: .*git-lfs"),
}  # fmt: skip


@pytest.mark.upstream
@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_checkpoint_is_refused_in_both_ranks(case, results):
    error, message = BROKEN[case]
    for rank in results:
        with pytest.raises(error, match=message):
            raise rank[f"broken {case}"]


@pytest.mark.upstream
def test_weights_that_the_model_does_not_have_are_told_as_stock_does(results):
    told, _ = given(results, "broken unexpected")  # newer versions warn in the first rank only
    assert any("were not used when initializing WanTransformer3DModel" in m and "of_another.model" in m for m in told)


def test_every_case_is_judged():
    judged = {f"load {case}" for case in LOADED if available(case)} | {f"broken {case}" for case in BROKEN}
    judged |= {"sessions", "given", "subfolder", "whole bin", "broken unexpected"}
    assert judged == set(CASES)


@pytest.mark.upstream
@pytest.mark.usefixtures("one_thread", "nothing_left")
@pytest.mark.slow
def test_an_executor_gives_the_bits_of_one_process(checkpoints):
    expected = video(stock(checkpoints / "wan22_i2v", torch_dtype=BF16), "wan22_i2v")
    with ParallelExecutor.from_pretrained(
        checkpoints / "wan22_i2v", layout="sharded", devices=["cpu", "cpu"], threads=1, torch_dtype=BF16, timeout=120
    ) as executor:
        found = executor.submit(**FAMILIES["wan22_i2v"].inputs(seed=1)).result(120).frames
    assert np.array_equal(found, expected)


# Memory

BLOCKS = 12


@pytest.fixture(scope="module")
def large(folder: Path) -> Path:
    """A transformer of 400 MB, most of it in twelve blocks."""
    config = {
        "num_attention_heads": 6,
        "attention_head_dim": 128,
        "ffn_dim": 2048,
        "num_layers": BLOCKS,
        "text_dim": 32,
    }
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**config)
    rope = diffusers.WanTransformer3DModel(**{**config, "num_layers": 1}).rope
    model.to_empty(device="cpu").rope = rope
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    model.to(BF16).save_pretrained(folder / "checkpoints" / "large", max_shard_size="50MB")  # to be loaded in float32
    return folder


@pytest.mark.upstream
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux has it")
@pytest.mark.slow
def test_a_rank_needs_memory_for_its_part_and_a_few_blocks(large):
    # What is freed goes back to the system at once: malloc would keep it, and no accelerator counts that
    for rank in run(large / "memory", *MEMORY, MALLOC_MMAP_THRESHOLD_="65536"):
        ours, stocks = rank["memory on load"], rank["memory after"]
        weights, block = ours["weights"], ours["block"]
        half, root, slack = weights / 2, weights - BLOCKS * block, 15  # MiB: what does not grow with the model
        assert weights > 350
        assert block < 35
        assert half < ours["load"] < half + block + slack
        assert ours["loaded"] < half + slack
        # the block that computes, the next as it is and as it comes, and gloo's own buffer
        assert ours["call"] < half + root + 4 * block + slack
        assert ours["called"] < half + block
        assert stocks["load"] > 0.9 * weights
        assert stocks["loaded"] < half + slack
