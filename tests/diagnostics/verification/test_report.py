"""The HTML report: complete by itself, and opened in a real browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from wan_patches import verify
from wan_patches.ops import frames as frames_op
from wan_patches.testing.families import FAMILIES

PROMPT = "A red <script>alert('fox')</script>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")


@pytest.fixture(scope="module")
def found():
    """A verification that has everything to show: the last frame is wrong in one corner."""
    right = frames_op.video_to_uint8

    def wrong(video, *args):
        out = right(video, *args)
        out[:, -1, :8, :8] ^= 4
        return out

    family = FAMILIES["wan_t2v"]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("wan_patches.bindings.frames._to_pil", _to_pil(wrong))
            return verify(family.build(), **family.inputs(frames=9, steps=1, prompt=PROMPT, output_type="pil"))
    finally:
        torch.set_num_threads(before)


def _to_pil(op):
    def to_pil(stock, processor, video, to):
        return [[Image.fromarray(frame) for frame in batch] for batch in op(video).numpy()]

    return to_pil


@pytest.fixture(scope="module")
def page(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    found.save_html(path)
    return path


def pictures(text, kind):
    return [base64.b64decode(data) for data in re.findall(rf'src="data:{re.escape(kind)};base64,([^"]+)"', text)]


def test_the_page_is_self_contained(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"|url\(|@import|<script|<link|<iframe', text)
    assert "default-src 'none'" in text


def test_the_page_contains_the_result(found, page):
    text = page.read_text()
    assert "NOT the same bits" in text
    assert "patch &#39;frames&#39; in diffusers.video_processor (VideoProcessor.postprocess_video)" in text
    assert "&lt;script&gt;alert" in text  # the user's words are not markup
    assert "VideoProcessor.postprocess_video" in text
    assert "all 2 calls" in text or "all 4 calls" in text  # of the blocks, which are right
    assert torch.__version__.split("+")[0] in text
    assert "white is the largest difference, 4 of 255" in text


def test_the_strips_show_where_frames_differ(found, page):
    shown = [np.asarray(Image.open(io.BytesIO(data))) for data in pictures(page.read_text(), "image/png")]
    assert len(shown) == 18  # six frames of three rows
    stock, patched, amplified = shown[:6], shown[6:12], shown[12:]
    assert all(frame.shape == (32, 48, 3) for frame in shown)
    assert all(np.array_equal(a, b) for a, b in zip(stock[:-1], patched[:-1]))
    assert not np.array_equal(stock[-1], patched[-1])
    assert not any(frame.any() for frame in amplified[:-1])
    assert (amplified[-1][:8, :8] == 255).all()
    assert not amplified[-1][8:].any()


def test_shrinking_large_frames_keeps_single_different_pixels():
    from wan_patches.diagnostics.verification.report import _brightest, _png

    frame = np.zeros((720, 1280, 3), np.uint8)
    frame[357, 1001] = 255
    small = _brightest(frame)
    assert small.shape == (180, 320, 3)
    assert small.max() == 255
    assert _png(small).startswith("data:image/png;base64,")


def test_the_page_contains_charts_if_matplotlib_is_installed(page, found, monkeypatch):
    charts = pictures(page.read_text(), "image/svg+xml")
    assert len(charts) == 3
    assert all(b"<svg" in chart for chart in charts)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found.save_html(page.with_name("plain.html"))
    plain = page.with_name("plain.html").read_text()
    assert not pictures(plain, "image/svg+xml")
    assert "pip install &#34;wan-patches[verify]&#34;" in plain or 'pip install "wan-patches[verify]"' in plain


def test_without_scikit_image_the_column_names_the_extra_to_install(monkeypatch):
    from wan_patches.diagnostics.verification.pictures import compare_videos

    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    stock = np.zeros((1, 2, 16, 16, 3), np.float32)
    video, _ = compare_videos(stock, stock + np.float32(0.1))
    assert video.ssim is None
    assert compare_videos(stock, stock)[0].ssim == (1.0, 1.0)


def test_notebooks_get_html(found):
    html = found._repr_html_()
    assert html.startswith("<")
    assert "NOT the same bits" in html
    assert "<script" not in html


@browser
def test_a_browser_shows_text_and_pictures(page, tmp_path):
    # a copy in which a script may tell what has been loaded
    tell = (
        "<script>addEventListener('load', () => { const images = [...document.images];"
        "document.body.dataset.loaded = images.filter(one => one.naturalWidth > 0).length + ' of ' + images.length;"
        "})</script>"
    )
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("</body>", tell + "</body>"))
    dom = _chromium("--dump-dom", copy.as_uri()).decode()
    assert 'data-loaded="21 of 21"' in dom
    assert "NOT the same bits" in dom


@browser
def test_a_browser_shows_the_page_under_its_own_policy(page, tmp_path):
    shot = tmp_path / "shot.png"
    _chromium("--window-size=1100,2600", f"--screenshot={shot}", page.as_uri())
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    assert (pixels == (0xB3, 0x26, 0x1E)).all(axis=1).mean() > 0.005  # the banner
    assert (pixels == (0x2F, 0x6F, 0xDF)).all(axis=1).any()  # a bar of a chart
    assert len(np.unique(pixels, axis=0)) > 500  # the frames


def _chromium(*arguments):
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *arguments]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout
