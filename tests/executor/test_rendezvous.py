"""A store of torch.distributed that others cannot connect to."""

from __future__ import annotations

import datetime
import threading

import pytest
import torch

from wan_patches.executor.rendezvous import Notes, Rendezvous

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def stores():
    """Of two ranks."""
    notes = Notes()
    return [Rendezvous(lambda method, *arguments: method(notes, *arguments)) for _ in range(2)]


def test_it_answers_as_torchs_own_store_does(stores):
    ours, theirs = stores[0], torch.distributed.HashStore()
    for store in (ours, theirs):
        store.set("text", "one")
        store.set("bytes", b"two")
    for ask in (
        lambda store: store.get("text"),
        lambda store: store.get("bytes"),
        lambda store: store.add("count", 2),
        lambda store: store.add("count", 3),
        lambda store: store.get("count"),
        lambda store: store.compare_set("text", "one", "three"),
        lambda store: store.compare_set("text", "one", "four"),
        lambda store: store.compare_set("new", "", "five"),
        lambda store: store.check(["text", "new"]),
        lambda store: store.check(["text", "never"]),
        lambda store: store.delete_key("bytes"),
        lambda store: store.delete_key("bytes"),
        lambda store: store.num_keys(),
    ):
        assert ask(ours) == ask(theirs)


def test_who_asks_early_waits(stores):
    timer = threading.Timer(0.2, stores[1].set, ("late", b"here"))
    timer.start()
    assert stores[0].get("late") == b"here"
    stores[0].set_timeout(datetime.timedelta(seconds=0.1))
    with pytest.raises(torch.distributed.DistStoreError, match="have not set"):
        stores[0].get("never")
    timer.join()


def test_it_serves_torch_through_its_own_wrapper(stores):
    inside = torch.distributed.PrefixStore("group", stores[0])
    inside.set("key", "value")
    assert stores[1].get("group/key") == b"value"
    assert torch.distributed.PrefixStore("group", stores[1]).get("key") == b"value"
