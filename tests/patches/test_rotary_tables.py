"""The rotary tables of every family, kept between forwards, against the installed code that makes them anew."""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import wan_patches
from wan_patches.bench.models import FAMILIES, available
from wan_patches.codeswap import functions_behind, stock
from wan_patches.observation import observing
from wan_patches.ops import rotary_tables
from wan_patches.patches.rotary_tables import PATCHES, pooled_table

pytestmark = [pytest.mark.upstream, pytest.mark.usefixtures("one_thread")]

ROPES = {
    "wan": ("transformer_wan", "WanRotaryPosEmbed"),
    "animate": ("transformer_wan_animate", "WanRotaryPosEmbed"),
    "skyreels": ("transformer_skyreels_v2", "SkyReelsV2RotaryPosEmbed"),
    "chronoedit": ("transformer_chronoedit", "ChronoEditRotaryPosEmbed"),
    "sana": ("transformer_sana_video", "WanRotaryPosEmbed"),
}
GRIDS = [(5, 6, 8), (1, 4, 4), (2, 8, 4), (5, 8, 6), (7, 10, 12)]  # of one model, two of them of as many tokens


def module_of(name: str) -> Any:
    try:
        return importlib.import_module(f"diffusers.models.transformers.{name}")
    except ModuleNotFoundError:
        return None


def is_complex(module: Any, cls: str) -> bool:
    """Whether this diffusers keeps the tables as complex numbers, which stay stock."""
    return not hasattr(getattr(module, cls)(32, (1, 2, 2), 32), "freqs_cos")


KINDS = [kind for kind, (name, cls) in ROPES.items() if (m := module_of(name)) and not is_complex(m, cls)]
HELIOS = module_of("transformer_helios")
# 0.37 has a cache of its own, which would keep our tables when the model is gone
HELIOS_KEPT = HELIOS is not None and not hasattr(
    HELIOS.HeliosRotaryPosEmbed._get_spatial_meshgrid.__wrapped__, "cache_info"
)
needs_helios = pytest.mark.skipif(HELIOS is None, reason="this version has no Helios")
needs_helios_kept = pytest.mark.skipif(not HELIOS_KEPT, reason="in this version Helios' tables are left to stock")


def make_rope(kind: str, head_dim: int = 32, patch: Any = (1, 2, 2)) -> Any:
    name, cls = ROPES[kind]
    return getattr(module_of(name), cls)(head_dim, patch, 32)


def stock_codes() -> list[Any]:
    """The code of every rotary embedding's forward, as it was installed."""
    codes = []
    for patch in PATCHES:
        module = module_of(patch.module.rpartition(".")[2])
        for target in patch.targets:
            cls = getattr(module, target.qualname.partition(".")[0], None)
            if cls is not None and "RotaryPosEmbed" in cls.__name__:
                functions = [stock(function) for function in functions_behind(vars(cls)["forward"], module.__file__)]
                # not of decorators
                codes += [f.__code__ for f in functions if f.__code__.co_filename == module.__file__]
    return codes


class Count:
    """How often stock's own code made tables."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, frame: Any) -> None:
        self.made += 1

    def of(self, call: Callable[[], Any]) -> int:
        before = self.made
        call()
        return self.made - before


@pytest.fixture
def count() -> Iterator[Count]:
    counter = Count()
    with observing(stock_codes(), on_call=counter):
        yield counter


@pytest.fixture
def patched() -> Iterator[None]:
    with wan_patches.enabled(["rotary_tables"]) as status:
        assert all("as complex numbers" in report.reason for report in status.skipped()), status
        yield


def same(a: Any, b: Any) -> None:
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert type(x) is type(y) is torch.Tensor
        assert torch.equal(x, y)
        assert (x.dtype, x.device, x.shape, x.stride()) == (y.dtype, y.device, y.shape, y.stride())
        assert x.requires_grad == y.requires_grad


def stocks(call: Callable[[], Any]) -> Any:
    """What stock gives, asked in between."""
    with wan_patches.enabled([]):
        return call()


def hidden(grid: tuple[int, int, int], **options: Any) -> torch.Tensor:
    return torch.empty(2, 3, *grid, **options)


# One rotary embedding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [12, 32, 44, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tables_are_bit_identical_to_stock(kind, head_dim, dtype, patched):
    rope = make_rope(kind, head_dim).to(dtype)
    for grid in [*GRIDS, *GRIDS[:2] * 3, GRIDS[0], GRIDS[0]]:
        x = hidden(grid, dtype=dtype)
        same(rope(x), stocks(lambda x=x: rope(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_stock_makes_them_twice_for_a_grid(kind, patched, count):
    rope = make_rope(kind)
    assert count.of(lambda: stocks(lambda: rope(hidden(GRIDS[0])))) == 1  # or the counts below say nothing
    assert [count.of(lambda: rope(hidden(GRIDS[0]))) for _ in range(5)] == [1, 1, 0, 0, 0]
    assert [count.of(lambda: rope(hidden(GRIDS[1]))) for _ in range(4)] == [1, 1, 0, 0]
    assert [count.of(lambda g=grid: rope(hidden(g))) for grid in GRIDS[:2] * 4] == [0] * 8
    assert count.of(lambda: rope(torch.empty(1, 16, *GRIDS[0], dtype=torch.bfloat16))) == 0  # the grid is what counts


@pytest.mark.parametrize("kind", KINDS)
def test_stock_makes_them_twice_under_a_default_device_too(kind, patched, count):
    rope = make_rope(kind)
    with torch.device("cpu"):
        same(rope(hidden(GRIDS[0])), stocks(lambda: rope(hidden(GRIDS[0]))))
        assert [count.of(lambda: rope(hidden(GRIDS[0]))) for _ in range(4)] == [1, 0, 0, 0]
        same(rope(hidden(GRIDS[0])), stocks(lambda: rope(hidden(GRIDS[0]))))


@pytest.mark.parametrize("kind", KINDS)
def test_few_grids_are_kept(kind, patched):
    rope = make_rope(kind)
    for grid in GRIDS * 3:
        for _ in range(3):
            rope(hidden(grid))
    kept = rotary_tables._memories[rope.freqs_cos].entries.values()
    assert len(kept) == 2
    assert None not in kept


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_noticed(kind, patched):
    rope = make_rope(kind)
    grid = (2, 8, 8)  # two frames: ChronoEdit skips in time
    for _ in range(3):
        rope(hidden(grid))
    rope.patch_size = [1, 4, 2]  # a list, as configurations hold it
    for _ in range(3):
        same(rope(hidden(grid)), stocks(lambda: rope(hidden(grid))))
    if kind == "chronoedit":
        before = rope(hidden(grid))
        rope.temporal_skip_len = 5
        for _ in range(3):
            same(rope(hidden(grid)), stocks(lambda: rope(hidden(grid))))
        assert not torch.equal(before[0], rope(hidden(grid))[0])


def in_place(rope: Any) -> None:
    rope.freqs_cos.mul_(2)


def assigned(rope: Any) -> None:
    rope.freqs_sin = rope.freqs_sin * 3


def data_set(rope: Any) -> None:
    rope.freqs_cos.data = rope.freqs_cos * 5


def loaded(rope: Any) -> None:
    rope._non_persistent_buffers_set.clear()
    rope.load_state_dict({name: buffer + 1 for name, buffer in rope.state_dict().items()})


def cast(rope: Any) -> None:
    rope.to(torch.bfloat16)


def cast_to_and_fro(rope: Any) -> None:
    rope.half().float()  # which rounds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [in_place, assigned, data_set, loaded, cast, cast_to_and_fro])
def test_changed_buffers_are_noticed(kind, change, patched, count):
    rope = make_rope(kind)
    x = hidden(GRIDS[0])
    for _ in range(3):
        before = rope(x)
    change(rope)
    assert [count.of(lambda: rope(x)) for _ in range(4)] == [1, 1, 0, 0]
    same(rope(x), stocks(lambda: rope(x)))
    assert not all(map(torch.equal, before, rope(x)))


def test_a_device_that_data_alone_moves_to_and_fro(patched):
    """As group offloading does with buffers; here between two places in memory."""
    rope, x = make_rope("wan"), hidden(GRIDS[0])
    home = {name: buffer.data for name, buffer in rope.named_buffers()}
    for _ in range(20):
        for name, buffer in rope.named_buffers():
            buffer.data = home[name].clone()
        for _ in range(3):
            same(rope(x), stocks(lambda: rope(x)))
        for name, buffer in rope.named_buffers():
            buffer.data = home[name]


def test_what_stock_refuses_is_refused_alike(patched):
    rope = make_rope("wan")

    def outcome(call: Callable[[], Any]) -> tuple[str, str]:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            call()
        return caught.type.__name__, str(caught.value)

    for shape in [(1, 3, 5, 6), (1, 3, 99, 4, 4), (1, 3, 5, 6, 8, 1)]:
        for _ in range(3):
            assert outcome(lambda s=shape: rope(torch.empty(s))) == outcome(
                lambda s=shape: stocks(lambda: rope(torch.empty(s)))
            )


def test_tables_that_a_hook_writes_to_are_made_anew(patched):
    rope, x = make_rope("wan"), hidden(GRIDS[0])

    def scale(module: Any, args: Any, output: Any) -> None:
        output[0].mul_(2)

    hook = rope.register_forward_hook(scale)
    for _ in range(4):
        same(rope(x), stocks(lambda: rope(x)))
    hook.remove()
    same(rope(x), stocks(lambda: rope(x)))


def test_inference_mode_then_training(patched, count):
    rope, x = make_rope("wan"), hidden(GRIDS[0])
    with torch.inference_mode():
        for _ in range(3):
            rope(x)
    assert count.of(lambda: rope(x)) == 0
    weight = torch.ones(32, requires_grad=True)
    (rope(x)[0] * weight).sum().backward()
    assert torch.equal(weight.grad, stocks(lambda: rope(x))[0].sum((0, 1, 2)))


def test_a_copy_has_tables_of_its_own_and_files_hold_none(patched):
    rope, x = make_rope("wan"), hidden(GRIDS[0])
    text = pickle.dumps(rope)
    for _ in range(3):
        rope(x)
    assert pickle.dumps(rope) == text
    assert vars(rope).keys() == vars(make_rope("wan")).keys()
    other = copy.deepcopy(rope)
    other.freqs_cos.zero_()
    assert not other(x)[0].any()
    for _ in range(3):
        same(rope(x), stocks(lambda: rope(x)))
        same(other(x), stocks(lambda: other(x)))
    same(pickle.loads(text)(x), rope(x))


def test_tables_are_freed_with_their_model(patched):
    rope, x = make_rope("wan"), hidden(GRIDS[0])
    for _ in range(3):
        tables = rope(x)
    watched = [weakref.ref(rope), *map(weakref.ref, tables)]
    del rope, tables
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3


def test_tables_are_freed_when_their_model_moves(patched):
    rope, x = make_rope("wan"), hidden(GRIDS[0])
    for _ in range(3):
        tables = rope(x)
    watched = [*map(weakref.ref, tables)]
    del tables
    rope.to(torch.float16)  # for new buffers, as `.to("cpu")` on an accelerator
    gc.collect()
    assert [ref() for ref in watched] == [None] * 2


def test_threads_with_models_and_grids_of_their_own_and_in_common(patched):
    ropes = [make_rope("wan") for _ in range(2)]
    ropes[1].freqs_cos.mul_(2)
    expected = {(i, grid): stocks(lambda i=i, g=grid: ropes[i](hidden(g))) for i in (0, 1) for grid in GRIDS}
    errors, start = [], threading.Barrier(4)

    def work(seed: int) -> None:
        start.wait()
        try:
            for n in range(100):
                i, grid = (seed + n) % 2, GRIDS[(seed * n) % 3]
                same(ropes[i](hidden(grid)), expected[i, grid])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# Helios


def make_helios_rope() -> Any:
    return HELIOS.HeliosRotaryPosEmbed(rope_dim=(8, 12, 12), theta=10000.0)


def helios_call(indices: torch.Tensor, height: int = 4, width: int = 6) -> dict[str, Any]:
    return {"frame_indices": indices, "height": height, "width": width, "device": torch.device("cpu")}


INDICES = [
    torch.arange(5)[None],
    torch.arange(1, 6)[None],
    torch.tensor([[0, 19, 20]]),
    torch.arange(10).view(2, 5),
    torch.arange(10)[None],
    torch.arange(5, dtype=torch.int32)[None],
    torch.arange(10)[None, ::2],
    torch.arange(5).float()[None],
    torch.arange(5)[None] * 1000,
]


@needs_helios
def test_helios_tables_are_bit_identical_to_stock(patched):
    rope = make_helios_rope()
    for indices, (height, width) in itertools.product(INDICES, [(4, 6), (6, 4), (4, 1), (1, 4)]):
        for _ in range(3):
            call = helios_call(indices, height, width)
            same(rope(**call), stocks(lambda call=call: rope(**call)))


@needs_helios_kept
def test_helios_tables_are_kept_by_the_values_of_the_indices(patched, count):
    rope = make_helios_rope()
    assert [count.of(lambda: rope(**helios_call(torch.arange(5)[None]))) for _ in range(5)] == [1, 1, 0, 0, 0]
    indices = torch.arange(5)[None]
    assert count.of(lambda: rope(**helios_call(indices))) == 0
    indices.add_(3)
    assert count.of(lambda: rope(**helios_call(indices))) == 1
    same(rope(**helios_call(indices)), stocks(lambda: rope(**helios_call(indices))))
    for _ in range(3):
        floats = helios_call(torch.arange(5).float()[None])
        assert count.of(lambda call=floats: rope(**call)) == 1


@needs_helios_kept
def test_helios_buffers_that_change_are_noticed(patched, count):
    rope, call = make_helios_rope(), helios_call(INDICES[0])
    for _ in range(3):
        before = rope(**call)
    for name in ("freqs_base_t", "freqs_base_y", "freqs_base_x"):
        getattr(rope, name).mul_(1.5)
        assert [count.of(lambda: rope(**call)) for _ in range(4)] == [1, 1, 0, 0]
        same(rope(**call), stocks(lambda: rope(**call)))
        assert not torch.equal(before, rope(**call))
        before = rope(**call)


@needs_helios
def test_helios_with_indices_that_cannot_be_read(patched):
    rope, call = make_helios_rope(), helios_call(INDICES[0])
    for _ in range(3):
        rope(**call)

    def mapped(indices: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda i: rope(**helios_call(i)))(indices)

    indices = torch.arange(10).view(2, 1, 5)
    for _ in range(3):
        same(mapped(indices), stocks(lambda: mapped(indices)))


@needs_helios
def test_helios_under_autocast_gives_what_stock_gives(patched):
    rope, call = make_helios_rope(), helios_call(torch.arange(300, 305)[None], 4, 300)
    for _ in range(3):
        rope(**call)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            same(rope(**call), stocks(lambda: rope(**call)))
    same(rope(**call), stocks(lambda: rope(**call)))


@needs_helios
def test_helios_tables_are_freed_with_their_model(patched):
    rope = make_helios_rope()
    for _ in range(4):
        table = rope(**helios_call(INDICES[0]))
    watched = weakref.ref(table)
    del rope, table
    gc.collect()
    assert watched() is None


@needs_helios
@pytest.mark.parametrize("how", ["subclass", "instance", "class"])
def test_helios_with_a_method_of_someone_elses(how, patched, monkeypatch):
    class Scaled(HELIOS.HeliosRotaryPosEmbed):
        scale = 1.0

        def get_frequency_batched(self, freqs_base: torch.Tensor, pos: torch.Tensor) -> Any:
            return plain(self, freqs_base * self.scale, pos)

    plain = HELIOS.HeliosRotaryPosEmbed.get_frequency_batched
    rope, call = make_helios_rope(), helios_call(INDICES[0])
    for _ in range(3):
        rope(**call)
    if how == "subclass":
        rope = Scaled(rope_dim=(8, 12, 12), theta=10000.0)
    elif how == "instance":
        rope.scale = 1.0
        rope.get_frequency_batched = Scaled.get_frequency_batched.__get__(rope)
    else:
        rope.scale = 1.0
        monkeypatch.setattr(HELIOS.HeliosRotaryPosEmbed, "get_frequency_batched", Scaled.get_frequency_batched)
    for scale in (1.0, 2.0, 3.0):
        rope.scale = scale
        for _ in range(3):
            same(rope(**call), stocks(lambda: rope(**call)))


# Models and pipelines


def transformer_and_call(name: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A transformer, and what its pipeline calls it with in the last step."""
    pipe = FAMILIES[name].build(**options)
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipe(**FAMILIES[name].inputs(steps=1, output_type="latent"))
    hook.remove()
    return pipe.transformer, {**calls[-1], "return_dict": False}


def _frames(name: str, pipe: Any, **more: Any) -> np.ndarray:
    torch.manual_seed(0)  # some versions of Helios' pyramid draw from the global state
    return np.asarray(pipe(**FAMILIES[name].inputs(steps=3, **more)).frames)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_videos_are_bit_identical_and_tables_are_made_less_often(name, dtype, count):
    pipe = FAMILIES[name].build(dtype=dtype)
    expected = _frames(name, pipe)
    in_stock, count.made = count.made, 0
    with wan_patches.enabled(["rotary_tables"]) as status:
        assert np.array_equal(expected, _frames(name, pipe))
        is_stock = any("as complex numbers" in report.reason for report in status.skipped()) and "skyreels" in name
        at_first, count.made = count.made, 0
        assert np.array_equal(expected, _frames(name, pipe))
    again = count.made
    if is_stock or (name.startswith("helios") and not HELIOS_KEPT):
        assert at_first == again == in_stock
    else:
        assert at_first < in_stock
        assert again == 0


@needs_helios_kept
def test_helios_pools_the_tables_of_its_history_no_more_often(monkeypatch, patched):
    pooled = []
    plain = HELIOS.center_down_sample_3d
    monkeypatch.setattr(HELIOS, "center_down_sample_3d", lambda *args: pooled.append(1) or plain(*args))
    model, call = transformer_and_call("helios")
    model = copy.deepcopy(model)  # of which nothing is kept yet
    with torch.no_grad():
        expected = stocks(lambda: model(**call))[0]
        pooled.clear()
        counts = []
        for _ in range(6):
            assert torch.equal(model(**call)[0], expected)
            counts.append(len(pooled))
            pooled.clear()
    assert counts == [2, 2, 2, 0, 0, 0]  # of the tables made anew, of those kept, and then no more


@needs_helios
def test_pooled_tables_are_kept_by_how_they_are_pooled():
    table = torch.rand(1, 4, 4, 4, 4)
    ways = [
        (HELIOS.pad_for_3d_conv, HELIOS.center_down_sample_3d, (2, 2, 2)),
        (HELIOS.pad_for_3d_conv, HELIOS.center_down_sample_3d, (4, 4, 4)),
        (HELIOS.pad_for_3d_conv, torch.nn.functional.max_pool3d, (2, 2, 2)),
        (lambda x, kernel: -x, torch.nn.functional.max_pool3d, (2, 2, 2)),
    ]
    for pad, pool, kernel in [way for way in ways for _ in range(3)]:
        same(pooled_table(pad, pool, table, kernel), pool(pad(table, kernel), kernel))


def test_lora_training_has_the_gradients_of_stock(patched):
    model, call = transformer_and_call("wan_t2v", transformer={"num_layers": 1})

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**call)[0].float().square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = stocks(gradients)
    with torch.inference_mode():
        for _ in range(3):
            model(**call)
    for _ in range(3):
        assert all(map(torch.equal, gradients(), expected))


@pytest.mark.parametrize("name", [n for n in ("wan_t2v", "chronoedit", "helios") if n in available()])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_compiled_in_one_graph_with_the_bits_of_stock(name, mode):
    import torch._dynamo

    model, call = transformer_and_call(name, transformer={"num_layers": 1})
    call = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    with mode(), wan_patches.enabled(["rotary_tables"]):
        expected = stocks(lambda: model(**call))[0]
        for _ in range(3):  # tables are kept, and no graph may take them for constants
            model(**call)
        memory = rotary_tables._memories.get(next(model.rope.buffers()))
        assert (memory is None) == (name == "helios" and not HELIOS_KEPT)
        before = dict(memory.entries) if memory else {}
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(4):
            assert torch.equal(compiled(**call)[0], expected)
        assert len(graphs) == 1
        assert not memory or memory.entries == before
        for buffer in model.rope.buffers():
            buffer.mul_(1.25)
        changed = compiled(**call)[0]
        assert torch.equal(changed, stocks(lambda: model(**call))[0])
        assert not torch.equal(changed, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_blocks_are_not_compiled_again(mode):
    import torch._dynamo

    model, call = transformer_and_call("wan_t2v", transformer={"num_layers": 2})
    torch._dynamo.reset()
    with mode(), wan_patches.enabled(["rotary_tables"]):
        expected = stocks(lambda: model(**call))[0]
        for block in model.blocks:
            block.compile(fullgraph=True, backend="eager")
        model(**call)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(4):
                assert torch.equal(model(**call)[0], expected)
    torch._dynamo.reset()


def test_every_table_of_an_installed_family_is_patched():
    for patch in PATCHES:
        module_of(patch.module.rpartition(".")[2])
    with wan_patches.enabled(["rotary_tables"]) as status:
        for report in status.of("rotary_tables"):
            if module_of(report.module.rpartition(".")[2]) is None:
                assert report.state == "waiting for import"
            elif "as complex numbers" not in report.reason:
                assert report.state == "active", report
