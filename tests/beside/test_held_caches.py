"""Whoever drives the autoencoder frame by frame and keeps its caches finds what stock would have left there."""

from __future__ import annotations

import copy

import pytest
import torch

import wan_patches
from wan_patches.ops import vae_division as division
from wan_patches.ops.vae import FrameCaches

pytestmark = [pytest.mark.upstream]

AutoencoderKLWan = pytest.importorskip("diffusers").AutoencoderKLWan

KINDS = {
    "wan 2.1": {"base_dim": 16, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
    "wan 2.2": {
        **{"base_dim": 16, "decoder_base_dim": 24, "z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
        **{"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16},
    },
}

#: What people keep of an entry. Each is read again after other chunks.
HOLDERS = {
    "the tensor": lambda entry: entry,
    "a view": lambda entry: entry[:, :, -1:],
    "detached": lambda entry: entry.detach(),
    "numpy": lambda entry: torch.from_numpy(entry.numpy()),
    "dlpack": torch.utils.dlpack.from_dlpack,
    "its memory": lambda entry: (entry.untyped_storage(), entry.shape, entry.stride(), entry.dtype),
}


def read(held):
    if isinstance(held, tuple):
        storage, shape, stride, dtype = held
        return torch.tensor([], dtype=dtype).set_(storage, 0, shape, stride)
    return held


@pytest.fixture(params=KINDS)
def vae(request):
    torch.manual_seed(0)
    return AutoencoderKLWan(**KINDS[request.param]).eval()


@pytest.fixture(params=["decoder", "encoder"])
def coder(request, vae):
    """`run(frames)` sends a chunk through the coder, and `caches()` are those of the pass."""
    return _Coder(vae, request.param)


class _Coder:
    def __init__(self, vae, name):
        self.vae, self.name = vae, name
        self.module = getattr(vae, name)
        generator = torch.Generator().manual_seed(1)
        channels = vae.config.z_dim if name == "decoder" else vae.config.in_channels
        side = 6 if name == "decoder" else 32
        sizes = (1, 1, 1, 1, 1) if name == "decoder" else (1, 4, 4, 4, 4)
        self.chunks = [torch.randn(1, channels, size, side, side, generator=generator) for size in sizes]

    def caches(self):
        return self.vae._feat_map if self.name == "decoder" else self.vae._enc_feat_map

    def run(self, nth, caches=None):
        first = {"first_chunk": nth == 0} if self.name == "decoder" else {}
        caches = self.caches() if caches is None else caches
        return self.module(self.chunks[nth], feat_cache=caches, feat_idx=[0], **first)


def compared(act):
    """`act()` with stock and patched, and that the latter took the short way."""
    with torch.no_grad():
        stock = act()
        with wan_patches.enabled(["vae"], strict=True):
            patched = act()
    return stock, patched


def assert_same(stock, patched):
    assert len(stock) == len(patched) > 0
    for nth, (ours, theirs) in enumerate(zip(patched, stock)):
        if isinstance(theirs, torch.Tensor):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs), nth
        else:
            assert ours == theirs, nth


def test_entries_are_those_of_stock_after_every_chunk(coder):
    def act():
        coder.vae.clear_cache()
        seen = []
        for nth in range(4):
            seen.append(coder.run(nth))
            seen += [entry.clone() if isinstance(entry, torch.Tensor) else entry for entry in coder.caches()]
        return seen

    assert_same(*compared(act))


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_is_kept_of_an_entry_stays_as_it_was(coder, holder):
    def act():
        coder.vae.clear_cache()
        kept = []
        for nth in range(4):
            coder.run(nth)
            tensors = [entry for entry in coder.caches() if isinstance(entry, torch.Tensor)]
            kept += [HOLDERS[holder](entry) for entry in tensors]
            del tensors
        return [read(held).clone() for held in kept]

    assert_same(*compared(act))


@pytest.mark.parametrize("save", [list, list.copy, lambda caches: caches[:], copy.copy])
def test_a_pass_can_go_back_to_saved_caches(coder, save):
    """Looking ahead, branching: from the same caches, other chunks, again and again."""

    def act():
        coder.vae.clear_cache()
        results = [coder.run(0), coder.run(1)]
        saved = save(coder.caches())
        results += [coder.run(nth) for nth in (2, 3)]
        for nth in (3, 4):
            coder.caches()[:] = saved
            results.append(coder.run(nth))
        results.append(coder.run(2, list(saved)))
        return results

    assert_same(*compared(act))


def test_entries_that_somebody_puts_there_stay_his(coder):
    def act():
        coder.vae.clear_cache()
        coder.run(0)
        coder.run(1)
        given = [entry.clone() if isinstance(entry, torch.Tensor) else entry for entry in coder.caches()]
        coder.caches()[:] = given
        return [coder.run(2), *given]

    assert_same(*compared(act))


def test_caches_in_inference_mode_can_be_used_outside_of_it(coder):
    def act():
        with torch.inference_mode():
            coder.vae.clear_cache()
            coder.run(0)
            coder.run(1)
        kept = [entry for entry in coder.caches() if isinstance(entry, torch.Tensor)]
        return [coder.run(2), *kept]

    assert_same(*compared(act))


def test_memory_is_used_again_where_nobody_holds_it(coder):
    with torch.no_grad(), wan_patches.enabled(["vae"], strict=True):
        coder.vae.clear_cache()
        assert type(coder.caches()) is FrameCaches
        coder.run(0)
        coder.run(1)
        places = [entry.data_ptr() for entry in coder.caches()[:2]]
        coder.run(2)
        assert places == [entry.data_ptr() for entry in coder.caches()[:2]]


@pytest.mark.parametrize("seed", range(4))
def test_random_holds_drops_and_returns(coder, seed):
    def act():
        pick = torch.Generator().manual_seed(seed)

        def one_of(count):
            return int(torch.randint(count, (), generator=pick))

        coder.vae.clear_cache()
        saved, held, results = [], [], [coder.run(0)]
        for _ in range(8):
            what = one_of(5)
            if what == 0:
                saved.append(list(coder.caches()))
            elif what == 1 and saved:
                coder.caches()[:] = saved[one_of(len(saved))]
            elif what == 2:
                entry = coder.caches()[one_of(len(coder.caches()))]
                if isinstance(entry, torch.Tensor):
                    held.append(list(HOLDERS.values())[one_of(len(HOLDERS))](entry))
            elif what == 3 and held:
                held.pop(one_of(len(held)))
            else:
                results.append(coder.run(1 + one_of(4)))
        return [*results, *(read(one).clone() for one in held)]

    assert_same(*compared(act))


class Streaming(AutoencoderKLWan):
    """As streaming decoders do it: caches are kept between calls, and a chunk can be taken back."""

    def decode_next(self, z, first):
        before = list(self._feat_map)
        chunk = self.decoder(z, feat_cache=self._feat_map, feat_idx=[0], first_chunk=first)
        return chunk, before


def test_a_streaming_decoder_takes_a_chunk_back():
    torch.manual_seed(0)
    vae = Streaming(**KINDS["wan 2.1"]).eval()
    z = torch.randn(1, 4, 4, 6, 6)

    def act():
        vae.clear_cache()
        video = [vae.decode_next(z[:, :, :1], True)[0], vae.decode_next(z[:, :, 1:2], False)[0]]
        _, before = vae.decode_next(z[:, :, 3:4], False)  # a guess
        vae._feat_map = before
        return [*video, vae.decode_next(z[:, :, 2:3], False)[0], vae.decode_next(z[:, :, 3:4], False)[0]]

    assert_same(*compared(act))


def test_entries_stay_where_a_chunk_is_divided(monkeypatch):
    """Published channels: the large layers take two frames and a band of rows at a time."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan().eval()
    z = torch.randn(1, 16, 3, 15, 6)
    divided, divide = [], FrameCaches.divide
    monkeypatch.setattr(division, "_divided", {})
    monkeypatch.setattr(FrameCaches, "divide", lambda caches: divided.append(1) or divide(caches))

    def act():
        vae.clear_cache()
        kept, results = [], []
        for nth in range(3):
            chunk = z[:, :, nth : nth + 1]
            results.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=nth == 0))
            kept += vae._feat_map[-4:]
        return [*results, *kept]

    assert_same(*compared(act))
    if not all(division._divided.values()):
        pytest.skip("convolutions add up in another order here: nothing is divided")
    assert divided
