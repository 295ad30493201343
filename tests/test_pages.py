"""Pages: links lead somewhere, commands and names exist, Python compiles, and the front page stays short."""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from markdown_it import MarkdownIt

import wan_patches

ROOT = Path(__file__).parents[1]
FRONT = ROOT / "README.md"
PAGES = [FRONT, ROOT / "CHANGELOG.md", *sorted([*ROOT.glob("examples/**/*.md"), *ROOT.glob(".github/*.md")])]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


class Code(NamedTuple):
    """A fenced block with its language, or a code span, whose language is None."""

    language: str | None
    text: str


class Page(NamedTuple):
    """What a page consists of; anchors are those that GitHub gives to headings."""

    links: tuple[str, ...]
    anchors: frozenset[str]
    code: tuple[Code, ...]


@cache
def read(path: Path) -> Page:
    links, anchors, code = [], set(), []
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text())
    for before, token in zip([None, *tokens], tokens):
        if token.type == "fence":
            code.append(Code(token.info, token.content))
        children = token.children or ()
        code += [Code(None, child.content) for child in children if child.type == "code_inline"]
        links += [
            link for child in children for name in ("href", "src") if isinstance(link := child.attrGet(name), str)
        ]
        if before is not None and before.type == "heading_open":
            anchors.add(slug("".join(child.content for child in children if child.type in ("text", "code_inline"))))
    return Page(tuple(links), frozenset(anchors), tuple(code))


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def targets(page: Path) -> Iterator[tuple[str, Path, str]]:
    """Links into this repository: as written, the file, and the anchor in it."""
    for link in read(page).links:
        if not re.match(r"\w+:", link):
            file, _, anchor = link.partition("#")
            yield link, (page.parent / file).resolve() if file else page, anchor


def test_anchors_are_those_of_github():
    assert slug("`verify`: is it the same on my machine?") == "verify-is-it-the-same-on-my-machine"


@pages
def test_links_and_anchors_resolve(page):
    for link, file, anchor in targets(page):
        assert file.is_relative_to(ROOT), link
        assert file.exists(), link
        assert not anchor or anchor in read(file).anchors, link


def test_every_page_can_be_reached_from_the_front_page():
    seen, left = set(), [FRONT]
    while left:
        page = left.pop()
        if page.suffix == ".md" and page not in seen:
            seen.add(page)
            left += [file for _, file, _ in targets(page)]
    assert set(PAGES) - seen == {ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md"}  # shown by itself


def test_the_citation_names_the_version():
    assert f"\nversion: {wan_patches.__version__}\n" in (ROOT / ".github" / "CITATION.cff").read_text()


def test_the_page_of_examples_lists_every_script():
    listed = {file for _, file, _ in targets(ROOT / "examples" / "README.md")}
    assert set(ROOT.glob("examples/*.py")) <= listed


def test_the_front_page_is_short():
    assert len(FRONT.read_text().split()) <= 1500


@pytest.mark.parametrize("name", ["adding-a-family", "adding-an-op", "adding-a-layout"])
def test_a_walk_for_contributors_has_at_most_60_lines(name):
    assert len((ROOT / ".github" / f"{name}.md").read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_the_front_page_has_the_commands_that_are_run_from_it(name):
    assert re.search(rf"^<!-- command: {name} -->\n```bash\n.+\n```$", FRONT.read_text(), flags=re.M)


def commands(code: Code) -> Iterator[list[str]]:
    """The words of every shell command in a block or span."""
    if code.language in (None, "", "bash", "sh", "console"):
        for line in code.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
            lexer.whitespace_split, lexer.commenters = True, "#" if code.language is not None else ""
            try:
                words = list(lexer)
            except ValueError:  # a quote that is an apostrophe
                words = line.split()
            command: list[str] = []
            for word in [*words, ";"]:
                if set(word) <= set("|&;"):
                    yield command
                    command = []
                else:
                    command.append(word)


def ours(words: list[str]) -> list[str] | None:
    """The arguments of `wan-patches` or `python -m wan_patches`, None for another command."""
    for number, word in enumerate(words):
        if word.rpartition("/")[2] == "wan-patches" or words[max(number - 1, 0) : number + 1] == ["-m", "wan_patches"]:
            return words[number + 1 :]
    return None


def check(arguments: list[str], whole: bool = True) -> None:
    """Parses arguments of `wan-patches` without running anything; what is not whole may lack arguments."""
    from wan_patches.cli import app

    command, left = typer.main.get_command(app), [word for word in arguments if word != "..."]
    while left and not left[0].startswith("-") and hasattr(command, "commands"):
        name, *left = left
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    if hasattr(command, "commands") and not left:  # a command that is only named
        return
    refusal = None
    try:
        command.make_context(command.name, left)
    except Exception as error:  # of typer, or of click where typer stands on it
        refusal = error
    allowed = {"NoneType", "Exit"} if whole else {"NoneType", "Exit", "MissingParameter"}
    assert type(refusal).__name__ in allowed, f"{' '.join(arguments)}: {refusal!r}, {refusal}"


@pages
def test_commands_parse(page):
    for code in read(page).code:
        for words in commands(code):
            if (arguments := ours(words)) is not None:
                check(arguments, whole=code.language is not None)
            for flag, name in itertools.pairwise(words):
                if flag == "-m" and name.startswith("wan_patches."):
                    assert '__name__ == "__main__"' in inspect.getsource(importlib.import_module(name)), name


@pytest.mark.parametrize(
    "line",
    ["wan-patches statu", "wan-patches status --every", "wan-patches bench blocks", "python -m wan_patches verify"],
)
def test_wrong_commands_are_noticed(line):
    (words,) = commands(Code("bash", line))
    with pytest.raises(AssertionError):
        check(ours(words))


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    found, *rest = name.split(".")
    value = importlib.import_module(found)
    for part in rest:
        found = f"{found}.{part}"
        if not hasattr(value, part):
            try:
                importlib.import_module(found)
            except ModuleNotFoundError:
                return False
        value = getattr(value, part)
    return True


@pages
def test_names_exist(page):
    for code in read(page).code:
        for name in re.findall(r"(?<![\w/.-])wan_patches(?:\.[A-Za-z_]\w*)+", code.text):
            assert resolves(name), name


def test_wrong_names_are_noticed():
    assert resolves("wan_patches.executor.layouts.loading_sharded")
    assert not resolves("wan_patches.executor.layouts.loading")
    assert not resolves("wan_patches.dispatch")


@pages
def test_python_compiles_and_imports_what_there_is(page):
    for code in read(page).code:
        if code.language == "python":
            compile(code.text, str(page), "exec")
            for node in ast.walk(ast.parse(code.text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wan_patches":
                    for alias in node.names:
                        assert resolves(f"{node.module}.{alias.name}"), ast.unparse(node)


@pages
def test_files_and_extras_exist(page):
    known = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S)
    assert known
    extras = re.findall(r"^(\w+) = \[", known[1], re.M)
    for code in read(page).code:
        for wanted in re.findall(r"(?:wan-patches|\.)\[([\w,]+)\]", code.text):
            assert set(wanted.split(",")) <= set(extras), wanted
        for path in re.findall(
            r"(?<![\w/.$])((?:wan_patches|examples|tests|\.ci|\.github)/[\w./-]*)(?![\w<*{])", code.text
        ):
            assert (ROOT / path).exists(), path
