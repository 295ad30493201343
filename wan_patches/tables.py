"""Renders tables for `status()`, the benches and reports."""

from __future__ import annotations

import io
import shutil

from rich.console import Console
from rich.table import Table

# some notebooks wrap lines in <pre>, which would break tables
_FRAGMENT = """
<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace"
>{code}</pre>"""


def terminal_width(otherwise: int) -> int:
    """Returns the columns of the terminal, or `otherwise` where there is none."""
    return shutil.get_terminal_size((otherwise, 24)).columns


def text(*renderables: object, width: int | None = None) -> str:
    """Returns the renderables as `rich` prints them, as plain text. Strings are taken literally; nothing is cut.

    Args:
        renderables: strings, tables and anything else that `rich` prints.
        width: columns of text; by default those of the terminal, or 140 where there is none.
    """
    console = _console(width or terminal_width(140))
    _print(console, renderables)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def html(*renderables: object, width: int = 140) -> str:
    """Returns the renderables as an HTML fragment, for notebooks (`_repr_html_`) and reports.

    The fragment is what `rich` prints, in one `<pre>` with inline styles, without scripts or style sheets. Strings are
    taken literally, without markup, and escaped; for colours use `rich.text.Text` and table styles.

    Args:
        renderables: strings, tables and anything else that `rich` prints.
        width: columns of text.
    """
    console = _console(width, record=True)
    _print(console, renderables)
    return console.export_html(inline_styles=True, code_format=_FRAGMENT).strip()


def _print(console: Console, renderables: tuple[object, ...]) -> None:
    for renderable in renderables:
        if isinstance(renderable, Table):
            whole = [column for column in renderable.columns if column.no_wrap]
            needed = sum(3 + max((len(str(cell)) for cell in column.cells), default=0) for column in whole)
            for column in renderable.columns:
                column.overflow = "fold"
                column.no_wrap = column.no_wrap and needed <= console.width
        console.print(renderable)


def _console(width: int, record: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_jupyter=False,  # otherwise rich displays the text in a notebook instead of writing it
        record=record,
        markup=False,  # brackets and colons in reasons and prompts are not markup
        emoji=False,
        highlight=False,
    )
