"""Whatever a recipe, a YAML text or a command line holds: it works, or is refused in one message with exit code 2.

The fast tests try a sample, the slow ones every key with every value and some ten thousand cases besides, with seeds
that are the same every time and with fresh ones. Each case has limits of time and memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from fuzz_inputs import KEYS, NASTY, WORDS, bounded, is_one_message, put, small, works_or_is_refused
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from spannorm import cli
from spannorm.errors import InputError
from spannorm.models import SpanNormConfig
from spannorm.train.recipe import load_recipe
from spannorm.train.yaml_reader import read_yaml

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def many(cases: int, fresh: bool) -> settings:
    return settings(max_examples=cases, derandomize=not fresh, suppress_health_check=QUIET)


def outcomes(cases: list[tuple[str, Any]]) -> dict[str, int]:
    """What became of each; all that went wrong is shown at once."""
    found: dict[str, int] = {}
    wrong = []
    for key, value in cases:
        raw = small()
        put(raw, key, value)
        try:
            outcome = works_or_is_refused(raw)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong.append(f"{key}: {repr_of(value)}: {type(error).__name__}: {str(error)[:150]}")
            continue
        found[outcome] = found.get(outcome, 0) + 1
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong)
    return found


def repr_of(value: Any) -> str:
    try:
        return repr(value)[:60]
    except ValueError:
        return "a very large integer"


EVERY = [(key, value) for key in KEYS for value in NASTY]


def test_a_sample_of_keys_with_values_that_they_should_not_have() -> None:
    chosen = [c for c in EVERY if hashlib.sha256(f"{c[0]}{NASTY.index(c[1])}".encode()).digest()[0] < 12]
    assert len(chosen) > 100
    assert set(outcomes(chosen)) <= {"refused", "works", "too large to build here"}


@pytest.mark.slow
@pytest.mark.parametrize("section", sorted({key.partition(".")[0] for key in KEYS}))
def test_every_key_with_every_value_that_it_should_not_have(section: str) -> None:
    found = outcomes([case for case in EVERY if case[0].partition(".")[0] == section])
    assert found["refused"] > 10


nasty = st.one_of(st.sampled_from(NASTY), st.sampled_from(WORDS), st.integers(), st.floats(), st.text(max_size=12))
names = st.one_of(st.sampled_from([*KEYS, *WORDS]), st.text(max_size=4))
values = st.recursive(
    nasty,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=3)),
    max_leaves=4,
)
likely = st.one_of(st.integers(-2, 70), st.floats(0, 1), st.booleans(), st.sampled_from(WORDS), values)
changes = st.lists(st.tuples(st.sampled_from(KEYS), likely), min_size=1, max_size=4)
arms = st.lists(st.dictionaries(st.sampled_from([*KEYS, "table"]), likely, max_size=3), max_size=3)
grids = st.dictionaries(st.sampled_from([*KEYS, "size"]), st.lists(likely, max_size=3), max_size=2)


def changed(change: list[tuple[str, Any]], given_arms: Any, given_grid: Any) -> dict[str, Any]:
    raw = small()
    if given_arms is not None:
        put(raw, "compare.arms", given_arms)
        put(raw, "compare.grid", given_grid)
    for key, value in change:
        put(raw, key, value)
    return raw


recipes = st.builds(changed, changes, st.one_of(st.none(), arms), grids)


def ends_well(raw: Any) -> None:
    assert works_or_is_refused(raw) in ("refused", "works", "too large to build here")


@settings(max_examples=60, suppress_health_check=QUIET)
@given(recipes)
def test_a_recipe_works_or_is_refused(raw: Any) -> None:
    ends_well(raw)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["fixed", "fresh"])
def test_many_recipes_work_or_are_refused(fresh: bool) -> None:
    many(2500, fresh)(given(recipes)(ends_well))()


general = [
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "num_labels",
    "return_dict",
    "output_attentions",
    "use_cache",
]
configurations = st.dictionaries(
    st.one_of(st.sampled_from([k.partition(".")[2] for k in KEYS if k.startswith("model.")]), st.sampled_from(general)),
    likely, min_size=1, max_size=4,
)  # fmt: skip


def is_built_or_refused(keys: dict[str, Any]) -> None:
    with bounded():
        try:
            SpanNormConfig(**{**small()["model"], **keys}).to_dict()
        except InputError as error:
            is_one_message(error)


@settings(max_examples=60, suppress_health_check=QUIET)
@given(configurations)
def test_a_configuration_is_built_or_refused(keys: dict[str, Any]) -> None:
    is_built_or_refused(keys)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["fixed", "fresh"])
def test_many_configurations_are_built_or_refused(fresh: bool) -> None:
    many(1500, fresh)(given(configurations)(is_built_or_refused))()


pieces = st.sampled_from([
    *("a: ", "b: ", "&x ", "*x", "<<: ", "<<: *x", "- ", "? ", "[", "]", "{", "}", ",", ":", "\n", "\n  ", "|"),
    *(">", "#"),
    *("!!int ", "!!python/object/apply:os.system ", "!!set ", "!!binary ", "!!timestamp ", "!x ", "%YAML 1.3\n"),
    *("---\n", "...\n", "1", "0x" + "f" * 300, "9" * 5000, "1:" * 200 + "1", ".inf", "1e999", "2020-01-02", "no", "~"),
    *('"\\ud800"', "'", '"', "\t", "\x07", "\n    ", "[" * 2000, "- " * 600),
    *("train: ", "steps: ", "model", "name: ", "\ufeff", "é"),
])  # fmt: skip
LETTERS = zip("abcdefgh", "bcdefghi", strict=True)
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in LETTERS)
yamls = st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=14).map("".join)


def is_read_or_refused(text: str) -> None:
    with bounded(20.0, 1.0):
        try:
            read_yaml(text, "the text")
        except InputError as error:
            is_one_message(error)


@settings(max_examples=200, suppress_health_check=QUIET)
@given(yamls)
@example(BOMB)
@example("a: &x {b: *x}")
@example("<<: &x {<<: *x}")
@example("[" * 100_000)
@example("a: 1\n" * 2)
@example("9" * 1_000_000)
@example("a: " + "1:" * 400_000 + "1")
def test_a_text_is_read_or_refused(text: str) -> None:
    is_read_or_refused(text)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["fixed", "fresh"])
def test_many_texts_are_read_or_refused(fresh: bool) -> None:
    many(3000, fresh)(given(yamls)(is_read_or_refused))()


odd = ["", ".", "..", "-", "--", "0", "-1", "1" * 30, "nan", "1e9", "x.json", "x.png", "/no/where/x.json"]
words = st.one_of(st.sampled_from([*odd, *WORDS]), st.text(max_size=8))
OPTIONS = [
    *("--data", "--import", "--out", "--out=", "--seeds", "--jobs", "--depths", "--placements", "--depth-rules"),
    *("--steps", "--json", "--plot", "--peak", "--tasks", "--questions", "--batch-size", "--to", "--nonsense"),
]
options = st.one_of(
    st.tuples(st.just("--set"), st.tuples(st.sampled_from(KEYS), st.one_of(words, values.map(repr_of))).map("=".join)),
    st.tuples(st.sampled_from(OPTIONS), words),
    st.tuples(words),
)
VERBS = ["train", "compare", "max-lr", "data", "report", "eval", "placements", "theory", "depth-check", "trian"]
lines = st.tuples(st.sampled_from(VERBS), st.lists(options, max_size=3))


def runs_or_refuses(line: tuple[str, list[tuple[str, ...]]], raw: Any) -> None:
    """A corpus that is not there: whatever trains is refused, and leaves nothing behind."""
    verb, given_options = line
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.suppress(ValueError, UnicodeError, yaml.YAMLError):
            Path("recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        rest = [word for option in given_options for word in option]
        corpus = ["--set", "data.corpus=none"] if verb in ("train", "compare", "max-lr", "data", "depth-check") else []
        before, out, err = sys.argv, io.StringIO(), io.StringIO()
        sys.argv = ["spannorm", verb, *([] if verb == "placements" else ["recipe.yaml"]), *rest, *corpus]
        code: Any = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), bounded(180.0):
                cli.main()
        except SystemExit as ended:
            code = ended.code
        finally:
            argv, sys.argv = sys.argv, before
        left = {p.name for p in Path(folder).rglob("*") if p.is_file()} - {"recipe.yaml", ".lock"}
    assert code in (None, 0, 2), (argv, code, err.getvalue())
    assert "Traceback" not in err.getvalue() + out.getvalue()
    if code == 2:
        assert err.getvalue().strip() and not left, (argv, left)
    else:
        assert verb in ("placements", "theory") or {"--help", "-h"} & set(rest), argv


@settings(max_examples=25, suppress_health_check=QUIET)
@given(lines, recipes)
def test_a_command_line_works_or_is_refused(line: Any, raw: Any) -> None:
    runs_or_refuses(line, raw)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["fixed", "fresh"])
def test_many_command_lines_work_or_are_refused(fresh: bool) -> None:
    many(1000, fresh)(given(lines, recipes)(runs_or_refuses))()


def test_what_yaml_reads_otherwise_than_it_is_meant_is_said(tmp_path: Path) -> None:
    def refusal(text: str, *overrides: str) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            load_recipe(path, overrides)
        return str(caught.value)

    assert "put it in quotes" in refusal("model: {depth_rule: no}")
    assert "'train' stands twice" in refusal("train: {steps: 3}\nname: x\ntrain: {steps: 4}")
    assert "'steps' stands twice" in refusal("train: {steps: 3, steps: 3}")
    assert "stands inside" in refusal("train: &x {steps: *x}")
    assert "unfolds" in refusal(BOMB)
    assert "64 bits" in refusal(f"train: {{steps: {'9' * 4000}}}")
    assert "64 bits" in refusal("name: x", f"train.steps=0x{'f' * 100}")
    assert "model.qk_norm must be true or false; got 'false'" in refusal('model: {qk_norm: "false"}')
    assert "nearest" not in refusal("model: {return_dict: false}") and "key in model" in refusal("model: {dtype: abc}")
    (tmp_path / "d.yaml").write_text("name: 2020-01-02\ntrain: &t {steps: 30}\n")
    assert load_recipe(tmp_path / "d.yaml").name == "2020-01-02"


def test_a_value_that_an_alias_shares_is_changed_in_one_place(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("compare: {arms: [&a {model.placement: pre, model.rope_parameters: {}}, *a]}")
    assert load_recipe(path).compare.arms == ({"model.placement": "pre", "model.rope_parameters": {}},) * 2
    path.write_text("model: &m {placement: pre}\ncompare: {arms: [*m]}")
    loaded = load_recipe(path, ["model.placement=post"])
    assert loaded.model["placement"] == "post" and loaded.compare.arms == ({"placement": "pre"},)
