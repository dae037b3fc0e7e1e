"""The pages of docs/ hold together: their links lead somewhere, their code compiles, their command lines parse."""

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from runpy import run_path

import pytest
import typer

import spannorm
from spannorm.cli import app
from spannorm.train.recipe import load_recipe

ROOT, PACKAGE = Path(__file__).parents[1], Path(spannorm.__file__).parent
PAGES = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in
         [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES)


def anchors(text: str) -> set[str]:
    """The names that a repository host and the site give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pages
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page: str) -> None:
    text = FENCE.sub("", PAGES[page])
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pages
def test_every_file_that_is_named_exists(page: str) -> None:
    for path in re.findall(r"`((?:docs|recipes|tests|tests_hf|benchmarks|examples|src|site)/[\w./-]+)`", PAGES[page]):
        inside = path.removeprefix("src/spannorm/")
        assert (ROOT / path if inside == path else PACKAGE / inside).exists(), path
    for name in re.findall(r"^ {6}(\S+\.py|\w+/)(?:, (\w+\.py|\w+/))? ", PAGES[page], re.MULTILINE):
        assert all((PACKAGE / part).exists() for part in name), name
    for target in re.findall(r"`make ([\w-]+)`|^ {4}make ([\w-]+)", PAGES[page], re.MULTILINE):
        name = "".join(target)
        assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), f"make {name}"


@pages
def test_every_python_block_compiles(page: str) -> None:
    for language, code in FENCE.findall(PAGES[page]):
        if language == "python":
            compile(code, page, "exec")


@pages
def test_every_list_begins_after_an_empty_line(page: str) -> None:
    """A repository host shows a list without one; the site would run its entries together."""
    lines = FENCE.sub("", PAGES[page]).splitlines()
    for before, line in pairwise(lines):
        if re.match(r"- |\d+\. ", line):
            assert not before or re.match(r"- |\d+\. | {4}(-|\d+\.) ", before), line


def commands(text: str) -> list[str]:
    """Every `spannorm …` of a page: in fenced and in indented blocks, and in code within a sentence."""
    fenced = "\n".join(code for _, code in FENCE.findall(text))
    text = FENCE.sub("", text)
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    lines = f"{fenced}\n{indented}".replace("\\\n", " ").splitlines()
    spans = re.findall(r"`(spannorm [^`]+)`", re.sub(r"^ {4}.*", "", text, flags=re.MULTILINE))
    return [line.strip() for line in lines if re.match(r"\s*spannorm [a-z]", line)] + spans


def words_of(command: str) -> list[str]:
    """The words of a command line: without its comment or redirection, with what stands in [ ] as if it were given."""
    command = re.sub(r"(?<=\s)\[([^\]=]*|--set [^\]]*)\](?=\s|$)", r"\1", command.replace("…", "").replace("...", ""))
    command = re.split(r"\s+#|\s[<>|]", command)[0]
    return shlex.split(command)[1:]


@pages
def test_every_command_line_parses(page: str) -> None:
    for command in commands(PAGES[page]):
        words, verb = words_of(command), typer.main.get_command(app)
        while words and hasattr(verb, "commands"):
            assert words[0] in verb.commands, command
            verb = verb.commands[words.pop(0)]
        _, left, _ = verb.make_parser(verb.context_class(verb)).parse_args(words)
        assert not left, f"{command}: {left}"
        overrides = [value for option, value in pairwise(words) if option == "--set"]
        for recipe in (word for word in words if word.startswith("recipes/")):
            load_recipe(ROOT / recipe, overrides)  # raises for a key or a value that the recipe does not take


def test_the_sites_navigation_has_every_page_once() -> None:
    config = (ROOT / "site" / "zensical.toml").read_text(encoding="utf-8")
    listed = re.findall(r'= "([\w/]+\.md)"', config)
    assert sorted(listed) == sorted(page.removeprefix("docs/") for page in PAGES if page.startswith("docs/"))


def test_the_check_of_a_built_site_finds_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="#top"></a><a href="https://a.example/"></a>'
        '<a href="gone.html"></a><a href="#gone"></a><script src="https://b.example/c.js"></script>'
    )
    (tmp_path / "a.css").write_text("@import url(https://d.example/font.css)")
    found = run_path(str(ROOT / "site" / "checks.py"))["faults"](tmp_path)
    assert [sum(word in line for line in found) for word in ("gone.html", "#gone", "b.example", "d.example")] == [1] * 4
    assert len(found) == 4


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_a_network(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="make docs-site installs it")
    command = [sys.executable, str(ROOT / "site" / "build.py"), "--out", str(tmp_path / "site")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "site" / "reference-command-line.html").is_file()
