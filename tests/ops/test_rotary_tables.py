"""What is kept, for how long, and when nothing is."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from wan_patches.ops import rotary_tables
from wan_patches.ops.rotary_tables import kept

pytestmark = pytest.mark.upstream


class Maker:
    """Makes a table of two sources, and counts how often."""

    def __init__(self, *sources: torch.Tensor, limit: int = 2) -> None:
        self.sources = sources or (torch.arange(12.0).view(3, 4), torch.ones(4))
        self.limit = limit
        self.made = 0

    def stock(self, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        self.made += 1
        a, b = self.sources
        return a.repeat(n, 1) * b, a + n

    def __call__(self, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """What `kept` gives, the same as would be made now."""
        tables = kept(lambda: self.stock(n), self.sources, n, self.limit)
        made, self.made = self.made, 0
        for table, expected in zip(tables, self.stock(n), strict=True):
            assert torch.equal(table, expected)
            assert table.dtype == expected.dtype
            assert table.device == expected.device
            assert table.stride() == expected.stride()
        self.made = made
        return tables

    def makes(self, n: int = 2, calls: int = 1) -> int:
        """How often so many calls make the table."""
        before = self.made
        for _ in range(calls):
            self(n)
        return self.made - before


def entries() -> int:
    """How many tables are kept, of anything."""
    gc.collect()
    return sum(entry is not None for memory in rotary_tables._memories.values() for entry in memory.entries.values())


def test_made_twice_and_then_no_more():
    maker = Maker()
    assert maker.makes(calls=10) == 2
    assert maker()[0] is maker()[0]


def test_nothing_is_held_after_the_first_call():
    maker, before = Maker(), entries()
    table = weakref.ref(maker()[0])
    assert entries() == before
    assert table() is None
    maker()
    assert entries() == before + 1


def test_a_table_of_one_tensor():
    source = torch.ones(3)
    tables = [kept(lambda: source * 2, (source,), "double", 1) for _ in range(4)]
    assert all(torch.equal(table, torch.full((3,), 2.0)) for table in tables)
    assert tables[1] is tables[2] is tables[3]


def test_the_one_asked_for_the_longest_ago_is_forgotten():
    maker = Maker(limit=2)
    maker.makes(1, 2)
    maker.makes(2, 2)
    maker(1)  # 2 is the oldest now
    before = entries()
    maker.makes(3, 2)
    assert entries() == before
    assert maker.makes(1) == 0
    assert maker.makes(2) == 1
    for n in range(50):
        maker.makes(n, 3)
    assert entries() == before


def test_what_is_kept_goes_with_its_sources():
    before, maker = entries(), Maker()
    tables = [weakref.ref(table) for table in maker()]
    tables += [weakref.ref(table) for table in maker()]
    assert entries() == before + 1
    assert sum(table() is not None for table in tables) == 2
    source = weakref.ref(maker.sources[0])
    del maker
    gc.collect()
    assert source() is None
    assert all(table() is None for table in tables)
    assert entries() == before


def write(maker: Maker) -> None:
    maker.sources[1].mul_(3)


def write_to_a_view(maker: Maker) -> None:
    maker.sources[0][1].neg_()


def write_without_gradients(maker: Maker) -> None:
    with torch.no_grad():
        maker.sources[1].copy_(torch.tensor([5.0, 6, 7, 8]))


def write_in_inference_mode(maker: Maker) -> None:
    with torch.inference_mode():
        maker.sources[1].add_(1)


def replace_the_second(maker: Maker) -> None:
    maker.sources = (maker.sources[0], maker.sources[1] * 2)


def replace_the_first(maker: Maker) -> None:
    maker.sources = (maker.sources[0] * 2, maker.sources[1])


def set_the_data(maker: Maker) -> None:
    maker.sources[1].data = maker.sources[1] * 2


def see_the_data_as_another_dtype(maker: Maker) -> None:
    other = torch.int32 if maker.sources[0].dtype == torch.float32 else torch.float32
    maker.sources[0].data = maker.sources[0].data.view(other)


def transpose_the_data(maker: Maker) -> None:
    maker.sources[0].data = maker.sources[0].data.t()


def replace_by_an_alias_that_was_written_to_as_often(maker: Maker) -> None:
    alias = maker.sources[1].data  # counts for itself
    while alias._version < maker.sources[1]._version:
        alias.add_(1)
    assert alias.data_ptr() == maker.sources[1].data_ptr()
    maker.sources = (maker.sources[0], alias)


CHANGES: list[Callable[[Maker], None]] = [
    write, write_to_a_view, write_without_gradients, write_in_inference_mode, replace_the_second, replace_the_first,
    set_the_data, see_the_data_as_another_dtype, transpose_the_data, replace_by_an_alias_that_was_written_to_as_often,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_source_is_noticed(change):
    maker = Maker(torch.arange(16.0).view(4, 4), torch.ones(4))
    maker.sources[1].add_(1)
    assert maker.makes(calls=3) == 2
    for _ in range(3):
        change(maker)
        assert maker.makes(calls=4) == 2


def test_memory_that_is_used_again_is_not_mistaken_for_a_source():
    """Data exchanged over and over, as offloading does it: the allocator gives the same addresses again."""
    maker = Maker(torch.ones(64, 64), torch.ones(64))
    addresses = set()
    for i in range(200):
        maker.sources[0].data = torch.full((64, 64), float(i))
        addresses.add(maker.sources[0].data_ptr())
        for _ in range(i % 4):
            maker()
    assert len(addresses) < 200


def test_sources_that_change_from_call_to_call_hold_no_tables():
    maker, before = Maker(), entries()
    former = []  # so that no address comes again
    for _ in range(5):
        former.append(maker.sources[0].data)
        maker.sources[0].data = maker.sources[0].data.clone()
        assert maker.makes() == 1
        assert entries() == before


def test_tables_that_somebody_wrote_to_are_made_again():
    maker = Maker()
    maker.makes(calls=3)
    maker()[1].zero_()
    assert maker.makes(calls=3) == 1
    maker()[0][0, 0] = 7.0
    assert maker.makes(calls=3) == 1
    maker()[0].requires_grad_()
    assert maker.makes(calls=3) == 1
    assert not maker()[0].requires_grad


def test_what_needs_a_gradient_is_not_kept():
    maker = Maker(torch.ones(3, 4, requires_grad=True), torch.ones(4))
    for _ in range(4):
        tables = maker()
        assert all(table.grad_fn is not None for table in tables)
    assert maker.made == 4
    with torch.no_grad():
        assert maker.makes(calls=4) == 2
    assert maker()[0].grad_fn is not None


def test_tables_kept_in_inference_mode_serve_autograd():
    maker = Maker()
    with torch.inference_mode():
        maker.makes(calls=3)
    assert maker.makes() == 0
    weight = torch.ones(4, requires_grad=True)
    (maker()[0] * weight).sum().backward()
    assert weight.grad is not None
    with torch.inference_mode():
        assert maker.makes() == 0


def test_sources_made_in_inference_mode_cannot_tell_and_nothing_is_kept():
    with torch.inference_mode():
        maker = Maker()
        assert maker.makes(calls=4) == 4
    assert maker.makes(calls=4) == 4


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        return out * 2 if func is torch.Tensor.repeat else out


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", [Doubling, Watching])
def test_modes_see_every_operation(mode):
    maker = Maker()
    maker.makes(calls=3)
    with mode():
        assert maker.makes(calls=3) == 3
    assert maker.makes(calls=3) == 0


@pytest.fixture(params=["set", "with"])
def on_device(request):
    """A default device, given in one of two ways."""

    @contextlib.contextmanager
    def setting(device: str) -> Iterator[None]:
        torch.set_default_device(device)
        try:
            yield
        finally:
            torch.set_default_device(None)

    return setting if request.param == "set" else torch.device


def test_a_default_device_looks_at_nothing(on_device):
    maker = Maker()
    with on_device("cpu"):
        assert maker.makes(calls=5) == 2
        with Doubling():
            assert maker.makes(calls=3) == 3
        assert maker.makes() == 0


def test_tables_made_on_another_default_device_are_others(on_device):
    source = torch.ones(3)

    def made() -> list[str]:
        return [kept(lambda: torch.zeros(3), (source,), "zeros", 2).device.type for _ in range(3)]

    assert made() == ["cpu"] * 3
    with on_device("meta"):
        assert made() == ["meta"] * 3
        with torch.device("cpu"):
            assert made() == ["cpu"] * 3
    assert made() == ["cpu"] * 3


def test_autocast():
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    maker = Maker(a, b)
    maker.stock = lambda n: (setattr(maker, "made", maker.made + 1), (a @ b, a.t()))[1]
    maker.makes(calls=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert maker()[0].dtype == torch.bfloat16
        assert maker.makes(calls=3) == 3
    assert maker.makes(calls=3) == 0


def test_transforms_and_tracers():
    maker = Maker()
    maker.makes(calls=3)
    x = torch.ones(2, 4)
    expected = torch.stack([(row + maker()[0]).sum(0) for row in x])
    assert torch.equal(torch.vmap(lambda row: (row + maker.stock()[0]).sum(0))(x), expected)
    before = maker.made
    torch.vmap(lambda row: (row + kept(lambda: maker.stock(), maker.sources, 2, 2)[0]).sum(0))(x)
    assert maker.made == before + 1

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + kept(lambda: (source * 3,), (source,), "three", 1)[0]

    source = torch.ones(4)
    for _ in range(3):
        function(x)
    traced = torch.jit.trace(function, (x,), check_trace=False)
    assert "aten::mul" in str(traced.graph)


def test_fake_tensors():
    maker = Maker()
    maker.makes(calls=3)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        tables = kept(lambda: maker.stock(), maker.sources, 2, 2)
    assert type(tables[0]) is not torch.Tensor
    assert maker.makes() == 0
    fake = tuple(mode.from_tensor(source) for source in maker.sources)
    for _ in range(3):
        assert type(kept(lambda: (fake[0] * fake[1],), fake, 2, 2)[0]) is not torch.Tensor


def test_meta_tensors_and_parameters():
    maker = Maker(torch.ones(3, 4, device="meta"), torch.ones(4, device="meta"))
    for _ in range(3):
        assert kept(lambda: maker.stock(), maker.sources, 2, 2)[0].is_meta
    assert maker.made == 3
    parameters = [torch.nn.Parameter(torch.ones(3, 4), requires_grad=False), torch.nn.Parameter(torch.ones(4), False)]
    assert Maker(*parameters).makes(calls=4) == 2


def test_an_error_is_the_makers_own_and_nothing_is_kept():
    source = torch.ones(3)

    def failing() -> torch.Tensor:
        raise ValueError("too long")

    for _ in range(3):
        with pytest.raises(ValueError, match="too long"):
            kept(failing, (source,), "key", 1)
    assert kept(lambda: source * 2, (source,), "key", 1).sum() == 6


def test_a_maker_that_keeps_tables_itself():
    inner, outer = torch.ones(3), torch.ones(3)

    def make() -> torch.Tensor:
        return outer + kept(lambda: inner * 2, (inner,), "inner", 1)

    for _ in range(5):
        assert torch.equal(kept(make, (outer,), "outer", 1), torch.full((3,), 3.0))


def test_a_derived_table_goes_with_the_one_it_is_made_of():
    before = entries()

    def use() -> weakref.ref[torch.Tensor]:
        source = torch.ones(3)
        for _ in range(5):
            table = kept(lambda: source * 2, (source,), "double", 1)
            derived = kept(functools.partial(torch.add, table, 1), (table,), "one more", 1)
        assert entries() == before + 2
        return weakref.ref(derived)

    derived = use()
    gc.collect()
    assert derived() is None
    assert entries() == before


def test_threads():
    makers = [Maker(torch.full((64, 4), float(i)), torch.ones(4), limit=3) for i in range(3)]
    errors, start = [], threading.Barrier(8)

    def work(seed: int) -> None:
        start.wait()
        try:
            for i in range(400):
                maker, n = makers[(seed + i) % 3], (seed * i) % 5 + 1
                first, second = kept(lambda m=maker, n=n: Maker.stock(m, n), maker.sources, n, maker.limit)
                assert first.shape == (64 * n, 4)
                assert torch.equal(second, maker.sources[0] + n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
