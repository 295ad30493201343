"""Tables for people: what `status()` and the benches print."""

from __future__ import annotations

import io

from rich.console import Console

# "pre" wraps in some notebooks, which would tear tables apart
_FRAGMENT = """
<pre style="white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'DejaVu Sans Mono',Consolas,monospace"
>{code}</pre>"""


def text(*renderables: object, width: int = 140) -> str:
    """What `rich` would print, as plain text. Strings are taken literally, without markup."""
    console = _console(width)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def html(*renderables: object, width: int = 140) -> str:
    """What `rich` would print, as a fragment of HTML: for notebooks (`_repr_html_`) and reports.

    One `<pre>` with its styles inline; no scripts, no style sheet. Strings are taken literally, without markup, and
    escaped; for colours use `rich.text.Text` and styles of tables.

    Args:
        renderables: strings, tables and whatever else `rich` prints.
        width: columns of text.
    """
    console = _console(width, record=True)
    for renderable in renderables:
        console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_FRAGMENT).strip()


def _console(width: int, record: bool = False) -> Console:
    return Console(
        file=io.StringIO(),
        width=width,
        color_system=None,
        force_jupyter=False,  # else rich would display the text in a notebook, not write it
        record=record,
        markup=False,  # brackets and colons in reasons and prompts mean nothing
        emoji=False,
        highlight=False,
    )
