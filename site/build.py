"""The documentation site: the pages of docs/, the sources they link to, and a reference from docstrings.

    python site/build.py [--out runs/site]

Zensical turns a copy of docs/ into HTML. The copy differs from docs/ in three ways: a link to a file outside docs/
becomes a link to a page that shows this file; the reference pages are written from the public names; the navigation
lists them. The finished site is then checked: each link and each anchor resolves, and nothing is loaded from a network.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from checks import faults
from reference import PAGES, command_line

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()\.\./([^)#]+)")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}
EXPLORED = ("--placements", "pre,post,span,deepnorm,peri,hybrid", "--depths", "8,32,128",
            "--depth-rules", "none,default,1/sqrt(L),1/sqrt(L):forward,1/L:ffn:forward")  # fmt: skip
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown"}


def build(out: Path) -> None:
    """Write the site into `out`, which is emptied first. Raises SystemExit with what is wrong."""
    work = out.with_name(out.name + "-work")
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
    pages = work / "docs"
    shutil.copytree(ROOT / "docs", pages)
    for page in sorted(pages.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(LINK.sub(lambda m: source_page(m[1], pages), text), encoding="utf-8")
    names = write_reference(pages)
    explorer = '    { "Explore the theory" = "explorer.md" },' if write_explorer(pages) else ""
    config = (ROOT / "site" / "zensical.toml").read_text(encoding="utf-8")
    entries = "\n".join(f'    {{ "{title}" = "{name}" }},' for title, name in names)
    for word, value in (
        ("#REFERENCE", entries),
        ("#EXPLORER", explorer),
        ("SOURCE", ROOT / "src"),
        ("SITE", ROOT / "site"),
    ):
        config = config.replace(word, str(value))
    (work / "zensical.toml").write_text(config, encoding="utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    if subprocess.run(command, cwd=work, env=ENVIRONMENT, check=False).returncode:
        sys.exit("the site does not build: see above")
    shutil.move(work / "site", out)
    shutil.rmtree(work)
    found = faults(out)
    if found:
        sys.exit("\n".join(["the site is built, and has faults:", *found]))


def source_page(path: str, pages: Path) -> str:
    """A page that shows the file at `path` of the repository. Returns the link to it."""
    file = ROOT / path
    name = path.replace("/", "-").removesuffix(".md") + ".md"
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".md":
        text = f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{text}````\n"
    (pages / name).write_text(text, encoding="utf-8")
    return name


def write_explorer(pages: Path) -> bool:
    """The page on which the theory can be explored. False, and no page, where Bokeh, which draws it, is missing."""
    if find_spec("bokeh") is None or "--html" not in command_line():
        return False
    command = [sys.executable, "-m", "spannorm", "theory", *EXPLORED, "--html", str(pages / "explorer-page.html")]
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    shown = shlex.join(["spannorm", "theory", *EXPLORED, "--html", "explorer.html"])
    (pages / "explorer.md").write_text(
        "# Explore the theory\n\nFor someone who wants to see how placement, depth rule and depth change variance and "
        "gradient. Every number was computed by the theory.\n\n[Open the explorer](explorer-page.html)\n\n"
        f"This command writes the same page:\n\n    {shown}\n",
        encoding="utf-8",
    )
    return True


def write_reference(pages: Path) -> list[tuple[str, str]]:
    """One page of public names for each entry of `PAGES`, and one of the command line. Returns (title, file name)."""
    public = set(import_module("spannorm").__all__) - {"probes", "theory"}
    missing = public - {name for _, _, module, names in PAGES if module == "spannorm" for name in names}
    if missing:
        sys.exit(f"site/reference.py: no page has {', '.join(sorted(missing))} of spannorm.__all__")
    written = []
    for title, words, module, names in PAGES:
        names = names or import_module(module).__all__
        text = "\n\n".join([f"# {title}", words, *(f"::: {module}.{name}" for name in names)])
        name = "reference-" + title.lower().replace(" ", "-").replace(",", "") + ".md"
        (pages / name).write_text(text + "\n", encoding="utf-8")
        written.append((title, name))
    (pages / "reference-command-line.md").write_text(command_line(), encoding="utf-8")
    return [*written, ("Command line", "reference-command-line.md")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "site")
    build(parser.parse_args().out.resolve())
