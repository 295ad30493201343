"""In a notebook: one line enables, and results are shown as tables."""

from __future__ import annotations

import builtins
import subprocess
import sys

import pytest
from rich.table import Table

import wan_patches
from wan_patches.patching.status import ACTIVE, SKIPPED, Report, Status
from wan_patches.tables import html, text


def test_the_extension_enables_and_disables(capsys):
    shell = object()
    wan_patches.load_ipython_extension(shell)
    assert wan_patches._registry.chosen() is not None
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "rope" in out
    wan_patches.unload_ipython_extension(shell)
    assert wan_patches._registry.chosen() is None
    assert capsys.readouterr().out == "wan_patches: disabled\n"


IPYTHON = """
from IPython.core.interactiveshell import InteractiveShell
import wan_patches

shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "wan_patches")
assert wan_patches._registry.chosen() is not None
formats, _ = shell.display_formatter.format(wan_patches.status())
assert formats["text/html"].startswith("<pre")
shell.run_line_magic("unload_ext", "wan_patches")
assert wan_patches._registry.chosen() is None
"""


def test_in_ipython():
    pytest.importorskip("IPython", reason="IPython is not installed")
    done = subprocess.run([sys.executable, "-c", IPYTHON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_status_is_shown_as_html_and_escaped():
    reports = (
        Report("rope", "diffusers.a", ("A.__call__",), ACTIVE),
        Report("vae", "diffusers.b", ("B.f",), SKIPPED, "<script>alert('[x]')</script> & :smile:"),
    )
    fragment = Status(reports)._repr_html_()
    assert fragment.startswith("<pre")
    assert fragment.endswith("</pre>")
    assert "<script" not in fragment
    assert "[x]" in fragment
    assert "&lt;script&gt;" in fragment
    assert "&amp; :smile:" in fragment
    assert "vae in b: left stock: " in fragment


def test_html_has_what_the_text_has():
    table = Table("a", "b")
    table.add_row("1", "[bold]2[/bold] [/nothing]")
    assert "[bold]2[/bold] [/nothing]" in text(table, "done")
    fragment = html(table, "done", width=60)
    assert "[bold]2[/bold] [/nothing]" in fragment
    assert "done" in fragment
    assert "font-weight: bold" in fragment  # the header


def test_text_stays_text_in_a_notebook(monkeypatch):
    """There rich would display it, and give nothing to whoever asked for the text."""
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr(builtins, "get_ipython", shell, raising=False)
    assert text("a table") == "a table"
    assert "a table" in html("a table")


@pytest.mark.parametrize("width", ["40", "100"])
def test_tables_follow_the_terminal_and_lose_nothing(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    table = Table("first", "second")
    table.columns[0].no_wrap = True
    table.add_row("a" * 50, "b" * 50)
    lines = text(table).splitlines()
    assert max(map(len, lines)) <= int(width)
    assert "".join(lines).count("a") == "".join(lines).count("b") == 50
