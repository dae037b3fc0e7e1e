"""Whatever somebody writes into a comparison's files: a page without a tag of theirs, or one message."""

import json
import re
import secrets
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from lab_files import arm, comparison, failed
from matplotlib.figure import Figure
from our_scripts import without_our_scripts

from spannorm.errors import InputError
from spannorm.lab.report.arms import Arm, Rate
from spannorm.lab.report.figures.conditions import draw_conditions
from spannorm.lab.report.looks import Look
from spannorm.lab.report.page import draw_report
from spannorm.lab.results.files import read_results
from spannorm.lab.results.runs import Run, Series

HOSTILE = [
    '"><img src=x onerror=alert(1)>', "<script>alert(1)</script>", "</style><b>", "{{ 7*7 }}", "{x}", "{", "a/b/../c",
    "=cmd|' /C calc'!A0", "+1", "-1", "@x", "\x1b[31m", "\x00", "\u202egpj", "\ud800", "[/b]", "$\\frac{", "%s", "-->",
    ' id="x"', ']]>', "a" * 400, "", "..", "con", "\u6f22", "\n", "&lt;", "javascript:alert(1)", "span", "pre none",
]  # fmt: skip
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "ul", "li", "b", "br", "span"),
    *("div", "table", "thead", "tbody", "tr", "th", "td", "small", "figure", "figcaption", "details", "summary", "pre"),
    *("code", "dl", "dt", "dd", "button"),
    *(
        "svg",
        "g",
        "defs",
        "path",
        "use",
        "text",
        "tspan",
        "line",
        "rect",
        "clippath",
        "image",
        "lineargradient",
        "stop",
    ),
}
"""Those that we or matplotlib write."""
ATTRIBUTES = {
    "href": r"#[\w.+-]+|data:image/png;base64,[\w+/=\s]*",
    "xlink:href": r"#[\w.+-]+|data:image/png;base64,.*",
}


class Strict(HTMLParser):
    """A page in which every tag and attribute must be one that we write."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert not name.startswith("on") and name != "src", (tag, name, value)
            assert re.fullmatch(ATTRIBUTES.get(name, ".*"), value or "", re.DOTALL), (tag, name, value)

    def handle_data(self, data: str) -> None:
        self.text += data


def is_safe(folder: Path) -> None:
    page = without_our_scripts((folder / "report.html").read_text(encoding="utf-8"))
    Strict(page)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)
    for path in (folder / "figures").iterdir():
        assert re.fullmatch(r"[A-Za-z0-9_+-][\w.+-]*\.(png|svg|csv)", path.name), path.name
        if path.suffix == ".svg":
            ElementTree.fromstring(path.read_text(encoding="utf-8"))
        if path.suffix == ".csv":
            for cell in re.findall(r'(?:^|,)"?([=+@-][^,\n]*)', path.read_text(encoding="utf-8"), re.MULTILINE):
                float(cell.strip('"'))


def files(folder: Path) -> None:
    """A comparison with every kind of field in use."""
    score = {"value": 0.5, "stderr": 0.1, "higher_is_better": True}
    task = {"metrics": {"acc": score}, "questions": 9, "chance": 0.25, "cut": 0, "version": 1, "questions_sha256": "x"}
    rates = {"learned": True, "rates": {"0.25": 0.01, "0.5": 0.02, "1": None}}
    arms: list[dict[str, Any]] = []
    for depth in (0, 2):
        more = {"condition": {"model.num_hidden_layers": depth}, "initial_loss": 5.0, "spikes": 0, "tables": ["t"]}
        arms += [arm("span", arm="span none", evaluation={"local": task}, stage="choice", **more),
                 arm("span", seed=1, arm="span none", stage="confirmation", **more),
                 arm("pre", arm="pre none", stage="choice", tolerated=rates if depth else None,
                     collapse={"effective_rank": [1.0, 2.0], "skip_cost": [0.1], "spectrum": [1.0, 0.1]}, **more),
                 failed("post", "none", "non-finite", arm="post none", stage="choice", **more)]  # fmt: skip
    for index, row in enumerate(arms):
        row |= {"job": f"job{index}", "steps": 3, "steps_done": min(row["steps_done"], 3)}
    comparison(folder, arms)
    path = folder / "results.json"
    results = json.loads(path.read_text())
    results["recipe"]["train"]["learning_rate"] = 0.05
    results["recipe"]["compare"] = {"protocol": {"seeds": [1], "pairs": [["span", "pre"]]}}
    path.write_text(json.dumps(results))


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Every place in nested JSON, keys included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


strange = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 99), st.floats(), st.sampled_from(HOSTILE),
        st.sampled_from([10**40, -(10**400), 1e308, -1e308, 1e-320, 10**12, 2**63]), st.text(max_size=5),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(HOSTILE), inner, max_size=2)),
    max_leaves=3,
)  # fmt: skip
changes = st.lists(
    st.tuples(st.floats(0, 0.999), st.one_of(strange, st.just("drop"), st.sampled_from([("key", h) for h in HOSTILE]))),
    min_size=1, max_size=3,
)  # fmt: skip


def changed(value: Any, where: float, new: Any) -> Any:
    """The value with one place replaced, dropped, or its key renamed."""
    every = places(value)
    *path, last = every[int(where * len(every))] or [None]
    if last is None:
        return new
    holder = value
    for key in path:
        holder = holder[key]
    if new == "drop":
        del holder[last]
    elif isinstance(new, tuple) and isinstance(holder, dict):
        holder[new[1]] = holder.pop(last)
    else:
        holder[last] = new if not isinstance(new, tuple) else new[1]
    return value


def draws_or_refuses(where: str, edits: list, draw: bool = True) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        files(folder)
        path = folder / where
        if where.endswith(".jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            lines = [json.loads(path.read_text())]
        for at, new in edits:
            index = int(at * 1000) % len(lines)
            lines[index] = changed(lines[index], at, new)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            draw_report(folder) if draw else read_results(folder / "results.json")
        except InputError as error:
            assert str(error).strip() and where.endswith("results.json")
            assert not (folder / "report.html").exists()
            return
        if draw:
            is_safe(folder)


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG costs most of the time, and no text can break it."""
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, to, format, **more: save(self, to, format=format, **(more | {"dpi": 8}))
    )


kinds = st.sampled_from(["results.json", "jobs/job0/records.jsonl", "jobs/job0/probes.jsonl"])


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(changes)
def test_edited_results_are_read_or_refused(edits: list) -> None:
    draws_or_refuses("results.json", edits, draw=False)


@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(kinds, changes)
def test_edited_files_are_drawn_or_refused(small_pictures: None, where: str, edits: list) -> None:
    draws_or_refuses(where, edits)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
def test_many_edited_files_are_drawn_or_refused(small_pictures: None, fresh: bool) -> None:
    run = given(kinds, changes)(lambda where, edits: draws_or_refuses(where, edits))  # it takes no defaults
    run = settings(max_examples=200, suppress_health_check=list(HealthCheck), derandomize=not fresh)(run)
    seed(secrets.randbits(32) if fresh else 0)(run)()


def test_hostile_words_in_every_field_stay_words(tmp_path: Path, small_pictures: None) -> None:
    files(tmp_path)
    path, evil = tmp_path / "results.json", HOSTILE[0] + "\x1b[31m{x}"
    results = json.loads(path.read_text())
    results["name"] = evil
    for section in ("recipe", "versions", "machine", "data"):
        results[section][evil] = {evil: evil}
    for row in results["jobs"]:
        row["condition"][evil], row["overrides"][evil], row["tables"] = (
            1 + row["condition"]["model.num_hidden_layers"],
            evil,
            [evil],
        )
        row |= {"placement": evil + row["placement"], "arm": f"{evil}{row['placement']} {evil}", "reason": evil}
        row["evaluation"] = row.get("evaluation") and {evil: {**row["evaluation"]["local"], "metrics": {
            evil: {"value": 0.5, "stderr": 0.1, "higher_is_better": True}}}}  # fmt: skip
    path.write_text(json.dumps(results))
    draw_report(tmp_path)
    is_safe(tmp_path)
    assert HOSTILE[0] in Strict(without_our_scripts((tmp_path / "report.html").read_text(encoding="utf-8"))).text


def test_before_anything_has_finished_there_is_a_report(tmp_path: Path, small_pictures: None) -> None:
    for status in ("waiting", "running", "failed"):
        rows = [arm("span", condition={"model.num_hidden_layers": depth}, status=status, steps_done=0, val_loss=None,
                    test_loss=None, job=f"j{depth}") for depth in (4, 8)]  # fmt: skip
        comparison(tmp_path / status, rows)
        draw_report(tmp_path / status)
        is_safe(tmp_path / status)


@pytest.mark.parametrize(("values", "scale"), [((1, 8), "log"), ((0, 8), "linear"), ((-1, 0), "linear")])
def test_an_axis_shows_every_value(values: tuple[int, int], scale: str) -> None:
    figure = _drawn(values)
    for ax in figure.axes:
        assert ax.get_xscale() == scale and [*ax.get_xticks()] == [*values]
        low, high = ax.get_xlim()
        assert low <= min(values) and max(values) <= high


def test_true_and_false_are_no_numbers() -> None:
    assert draw_conditions([({"model.qk_norm": value}, [LINE]) for value in (False, True)]) == []


def _drawn(values: tuple[int, int]) -> Figure:
    (drawing,) = draw_conditions([({"train.clip_norm": value}, [LINE]) for value in values])
    return drawing.figure


_NOTHING = Series(np.empty(0), np.empty(0))
_RUN = Run(0, "ok", None, 1.9, 1.9, _NOTHING, _NOTHING, _NOTHING)
LINE = Arm("span", "none", Look("#d55e00", ()), [Rate(0.01, [1.9], [])], 0.01, [_RUN])
