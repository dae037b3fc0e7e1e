"""Whatever is given, it works or is refused in one clear message with exit code 2, and nothing is half-written."""

import contextlib
import io
import math
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spannorm import cli
from spannorm.errors import InputError
from spannorm.models import SpanNormConfig
from spannorm.placements import PLACEMENTS
from spannorm.scaling import depth_rule_names
from spannorm.train.checkpoints import SEAL, damage, last_complete, seal
from spannorm.train.recipe import CompareRecipe, DataRecipe, TrainRecipe, recipe_from_dict
from spannorm.train.run import model_config

FAST = settings(max_examples=40)
SLOW = settings(max_examples=800, suppress_health_check=[HealthCheck.too_slow])

words = st.one_of(
    st.sampled_from([*PLACEMENTS, *depth_rule_names()]),
    st.sampled_from(["", "..", "cosine", "wsd", "fsdp", "skip", "bf16", "6e-3", "nan"]),
    st.text(max_size=8),
)
numbers = st.one_of(st.integers(-3, 70), st.sampled_from([10**9, 10**30, -(10**30), math.inf]), st.floats())
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=4,
)


def section(cls: type) -> st.SearchStrategy:
    """Some keys of a section, seldom one that it has not, with any values."""
    keys = st.one_of(st.sampled_from([f.name for f in fields(cls)]), words)
    return st.one_of(st.dictionaries(keys, values, max_size=4), values)


recipes = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            "name": values,
            "model": section(SpanNormConfig),
            "data": section(DataRecipe),
            "train": section(TrainRecipe),
            "compare": section(CompareRecipe),
        },
    ),
)


def reads_or_refuses(raw: object) -> None:
    try:
        model_config(recipe_from_dict(raw))  # type: ignore[arg-type]
    except InputError as error:
        assert str(error).strip()


@FAST
@given(recipes)
def test_a_recipe_is_read_or_refused(raw: object) -> None:
    reads_or_refuses(raw)


@pytest.mark.slow
@SLOW
@given(recipes)
def test_many_recipes_are_read_or_refused(raw: object) -> None:
    reads_or_refuses(raw)


options = st.one_of(
    st.tuples(st.just("--set"), words.map(lambda w: f"train.steps={w}")),
    st.tuples(st.just("--set"), st.tuples(words, words).map("=".join)),
    st.tuples(st.sampled_from(["--data", "--import", "--out", "--seeds", "--nonsense"]), words),
    st.tuples(words),
)
lines = st.tuples(st.sampled_from(["train", "compare", "data", "report", "trian", ""]), st.lists(options, max_size=3))


def runs_or_refuses(verb: str, given_options: list[tuple[str, ...]], raw: object) -> None:
    """A corpus that is not there: every line is refused, and none may leave anything behind."""
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        rest = [word for option in given_options for word in option]
        argv, out, err = sys.argv, io.StringIO(), io.StringIO()
        sys.argv = ["spannorm", *([verb] if verb else []), "recipe.yaml", *rest, "--set", "data.corpus=none"]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            sys.argv = argv
        left = [p for p in Path(folder).rglob("*") if p.is_file() and p.name not in ("recipe.yaml", ".lock")]
    if "--help" in rest:
        return
    assert ended.value.code == 2, (sys.argv, out.getvalue(), err.getvalue())
    assert err.getvalue().strip() and "Traceback" not in err.getvalue()
    assert not left


@FAST
@given(lines, recipes)
def test_a_command_line_is_refused_in_one_message(line: tuple, raw: object) -> None:
    runs_or_refuses(*line, raw)


@pytest.mark.slow
@SLOW
@given(lines, recipes)
def test_many_command_lines_are_refused_in_one_message(line: tuple, raw: object) -> None:
    runs_or_refuses(*line, raw)


SEALS = [b"{}", b"[]", b'{"files": 3}', b'{"files": {"a.bin": 1}}', b'{"files": {}}']

harms = st.tuples(
    st.sampled_from(["1", "2", "x"]),
    st.sampled_from(["a.bin", "deep/b.bin", SEAL, "new"]),
    st.one_of(st.none(), st.binary(max_size=40), st.sampled_from(SEALS)),
)


def is_sound_or_refused(done: list[tuple[str, str, bytes | None]]) -> None:
    """Two sealed checkpoints, then harm: content replaced, or a file deleted."""
    with TemporaryDirectory() as folder:
        for step in ("1", "2"):
            checkpoint = Path(folder, f"checkpoint-{step}")
            (checkpoint / "deep").mkdir(parents=True)
            (checkpoint / "a.bin").write_bytes(b"weights" + step.encode())
            (checkpoint / "deep" / "b.bin").write_bytes(b"moments" + step.encode())
            seal(checkpoint)
        sound = Path(folder, "sound")
        shutil.copytree(folder, sound)
        for step, name, content in done:
            path = Path(folder, f"checkpoint-{step}", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        try:
            chosen = last_complete(Path(folder))
        except InputError as error:
            assert "checkpoint-" in str(error)
            return
        if chosen is not None:
            assert damage(chosen) is None
            for name in ("a.bin", "deep/b.bin"):
                assert (chosen / name).read_bytes() == (sound / chosen.name / name).read_bytes()


@FAST
@given(st.lists(harms, max_size=3))
def test_only_a_sound_checkpoint_is_used(done: list) -> None:
    is_sound_or_refused(done)


@pytest.mark.slow
@SLOW
@given(st.lists(harms, max_size=3))
def test_only_a_sound_checkpoint_is_used_of_many(done: list) -> None:
    is_sound_or_refused(done)
