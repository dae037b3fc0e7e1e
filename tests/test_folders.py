"""A folder that is not ours is never written or emptied; a file that cannot be read or written is one message."""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from lab_files import arm, comparison

import spannorm
from spannorm.console import Grid, PlainConsole
from spannorm.errors import InputError
from spannorm.files import append_json, check_writable, checked, read_json, read_jsonl, read_text, write_jsonl
from spannorm.folders import COMPARISON, EVALUATION, RUN, claim, sweep
from spannorm.lab.compare import compare
from spannorm.lab.report.page import draw_report
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
from spannorm.named_code import check_configuration
from spannorm.text import csv_cell, file_name, plain
from spannorm.train.checkpoints import LIST, begin, check_way, last_complete, listed, rotate, seal
from spannorm.train.data import prepare_data
from spannorm.train.recipe import DataRecipe, recipe_from_dict
from spannorm.train.run import train


def tree(folder: Path) -> str:
    """A fingerprint of all names, contents, links and modes below a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        found.update(repr((path.relative_to(folder).as_posix(), path.lstat().st_mode, content)).encode())
    return found.hexdigest()


NAMES = ["checkpoint-500", "checkpoint-best-7", "model", "results.json", "report.html", "figures", "jobs",
         "run.json", "comparison.json", "result.json", "records.jsonl", "tensorboard", "notes.txt", ".git", "data",
         "checkpoints.json", ".lock", "eval", "log.txt", "checkpoint-\u0663"]  # fmt: skip
KINDS = ["file", "json", "folder", "link to file", "link to folder", "dangling", "fifo"]
things = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS), min_size=1, max_size=4)


def put(path: Path, kind: str, outside: Path) -> None:
    if kind in ("file", "json"):
        path.write_text("somebody's" if kind == "file" else '{"somebody": "s"}')
    elif kind == "folder":
        path.mkdir()
        (path / "weights.bin").write_bytes(b"somebody's")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"link to file": outside / "file", "link to folder": outside / "folder"}.get(kind, "nowhere"))


def begins(out: Path) -> list[Callable[[], object]]:
    recipe = recipe_from_dict({
        "model": {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        "data": {"corpus": "no-such-corpus"}, "compare": {"arms": [{"model.placement": "pre"}]},
    })  # fmt: skip
    return [lambda: train(recipe, out), lambda: compare(recipe, out), lambda: draw_report(out),
            lambda: prepare_data(recipe.data, out), lambda: claim(out, EVALUATION)]  # fmt: skip


def is_left_alone(what: dict[str, str]) -> None:
    with TemporaryDirectory() as name:
        folder, out = Path(name), Path(name, "out")
        (folder / "folder").mkdir()
        (folder / "file").write_text("outside")
        out.mkdir()
        for entry, kind in what.items():
            put(out / entry, kind, folder)
        ours = {".lock", "data", "log.txt"}  # what may be there before a run is, and is then no reason to refuse
        before = tree(folder)
        for begin_here in begins(out):
            with pytest.raises(InputError) as caught:
                begin_here()
            assert str(caught.value).strip()
            if set(what) <= ours:
                shutil.rmtree(out)
                return
            assert tree(folder) == before, (begin_here, what)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(things)
def test_a_folder_with_somebodys_work_is_left_as_it_was(what: dict[str, str]) -> None:
    is_left_alone(what)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
def test_many_folders_with_somebodys_work_are_left_as_they_were(fresh: bool) -> None:
    run = settings(max_examples=2000, suppress_health_check=list(HealthCheck), derandomize=not fresh)(
        given(things)(is_left_alone)
    )
    seed(secrets.randbits(32) if fresh else 0)(run)()


def checkpoint(folder: Path, step: int, ours: bool = True, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    if ours:
        begin(path)
    path.mkdir()
    (path / "weights").write_bytes(str(step).encode())
    if sealed:
        seal(path)
    return path


def test_only_what_a_run_sealed_and_lists_is_removed_and_by_its_step(tmp_path: Path) -> None:
    paths = [checkpoint(tmp_path, step) for step in (5, 10, 20)]
    shutil.copytree(paths[1], tmp_path / "checkpoint-10-keep")
    shutil.copytree(paths[1], tmp_path / "checkpoint-99")
    checkpoint(tmp_path, 500, ours=False, sealed=False)
    future = time.time() + 10**7
    os.utime(paths[0], (future, future))
    rotate(tmp_path)
    assert not paths[0].exists() and paths[1].exists() and paths[2].exists(), "by step, whatever the clock said"
    rotate(tmp_path, keep=0)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-10-keep", "checkpoint-99", "checkpoint-500"}
    assert listed(tmp_path) == [] and last_complete(tmp_path) is None


def test_a_copy_is_not_taken_for_a_checkpoint_and_one_from_before_the_list_is(tmp_path: Path) -> None:
    checkpoint(tmp_path, 10)
    shutil.copytree(tmp_path / "checkpoint-10", tmp_path / "checkpoint-99")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / LIST).unlink()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10" and (tmp_path / "checkpoint-99").exists()


def test_what_is_in_the_way_of_a_checkpoint_is_said_before_the_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, 30, ours=False)
    with pytest.raises(InputError, match="checkpoint-30 is in the way"):
        check_way(tmp_path, after=10, every=10, last=40)
    with pytest.raises(InputError, match="checkpoint-30 is in the way"):
        begin(tmp_path / "checkpoint-30")
    check_way(tmp_path, after=30, every=10, last=40)


def test_leftovers_of_killed_processes_are_swept_and_nothing_else(tmp_path: Path) -> None:
    ours = [".run.json.123.new", ".writable-77", f".data.{'0' * 32}.partial"]
    theirs = [".bashrc", "x.new", ".data.partial", ".x.y.new", "notes"]
    for name in (*ours[:2], *theirs):
        (tmp_path / name).write_text("x")
    (tmp_path / ours[2]).mkdir()
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(theirs)


def test_a_report_replaces_its_own_files_alone(tmp_path: Path) -> None:
    comparison(tmp_path / "a", [arm("span")])
    (tmp_path / "outside").mkdir()
    (tmp_path / "a" / "figures").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="figures"):
        draw_report(tmp_path / "a")
    (tmp_path / "a" / "figures").unlink()
    (tmp_path / "a" / "report.html").write_text("<p>mine</p>")
    with pytest.raises(InputError, match=r"report.html was not written"):
        draw_report(tmp_path / "a")
    assert not list((tmp_path / "outside").iterdir())


def test_files_that_never_end_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    (tmp_path / "deep").write_text("[" * 10**5)
    for name in ("pipe", "zero", "latin", "deep", "none", ".", "x" * 300):
        with pytest.raises(InputError):
            read_json(tmp_path / name)
    with pytest.raises(InputError, match="at most 3 are read"):
        read_text(tmp_path / "latin", most=3)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    os.mkfifo(corpus / "a.txt")
    with pytest.raises(InputError, match=r"a\.txt is not a regular file"):
        prepare_data(DataRecipe(corpus=str(corpus)), tmp_path / "data")


def test_a_run_may_write_more_lines_than_one_file_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": step, "loss": 1.5} for step in range(50)]
    write_jsonl(tmp_path / "probes.jsonl", rows)
    monkeypatch.setattr("spannorm.files.LARGEST", 100)
    assert read_jsonl(tmp_path / "probes.jsonl") == rows
    append_json(tmp_path / "probes.jsonl", {"text": "x" * 100})
    with pytest.raises(InputError, match="a line of more than 100 bytes"):
        read_jsonl(tmp_path / "probes.jsonl")


def test_a_shape_names_the_place_that_differs() -> None:
    shape = {"arms": [{"job": str, "loss?": float, "seeds": [(int, None)]}]}
    assert checked({"arms": [{"job": "a", "seeds": [1, None]}]}, shape, "f")
    for value, words in [([], "must be an object"), ({}, "`arms` must be there"),
                         ({"arms": [{"job": "a", "seeds": [True]}]}, r"`arms\[0\].seeds\[0\]` must be a whole number"),
                         ({"arms": [{"job": "a", "loss": "1", "seeds": []}]}, r"loss` must be a number")]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            checked(value, shape, "f")


def test_where_a_file_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    for bad in (tmp_path / "none" / "x.json", tmp_path, tmp_path / ("n" * 252), Path("/proc/x.json")):
        with pytest.raises(InputError):
            check_writable(bad)
    assert check_writable(tmp_path / "x.json") and not list(tmp_path.iterdir())


@given(st.text(max_size=60))
def test_names_of_any_text_are_names_of_files(text: str) -> None:
    name = file_name(text)
    assert len(name) <= 100 and not set(name) - set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.+-"
    )
    assert csv_cell(text)[:1] not in ("=", "+", "-", "@") and "\x1b" not in plain(text)


@settings(max_examples=60)
@given(
    st.integers(12, 200),
    st.lists(st.text(max_size=30), min_size=1, max_size=3),
    st.text("[]/b{}:smile\x1b", max_size=9),
)
def test_no_terminal_is_too_narrow_for_how_a_run_ended(width: int, names: list[str], title: str) -> None:
    grid = Grid(title)
    grid.column("placement")
    grid.column("loss", "number")
    grid.column("tokens/s", "spare")
    grid.column("", "note")
    for name in names:
        grid.row(name, "1.2345", "100", "failed: non-finite")
    console = PlainConsole(width=width)
    with console.capture() as shown:
        console.print(grid.fitted(console))
    packed = "".join(shown.get().split())
    assert packed.count("failed:non-finite") == packed.count("1.2345") >= len(names)
    assert "\x1b" not in packed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    SpanNormForCausalLM(SpanNormConfig(vocab_size=7, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_checkpoint_does_not_choose_code_from_the_hub(saved: Path, tmp_path: Path, key: str) -> None:
    shutil.copytree(saved, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: "kernels-community/evil:attention"}))
    with pytest.raises(InputError, match="may be code from the Hub"):
        spannorm.load(tmp_path / "m")
    with pytest.raises(InputError, match="may be code from the Hub"):
        SpanNormForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(InputError):
        check_configuration({"text_config": {"attn_implementation": {"": "a/b"}}}, "x")


def opens_or_refuses(saved: Path, name: str, harm: str, at: float, junk: bytes) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place, "model")
        shutil.copytree(saved, folder)
        path = folder / name
        content = path.read_bytes()
        cut = int(at * len(content))
        path.unlink()
        if harm == "fifo":
            os.mkfifo(path)
        elif harm != "gone":
            new = {"cut": content[:cut], "junk": content[:cut] + junk + content[cut + len(junk) :], "all": junk}[harm]
            path.write_bytes(new)
        try:
            model = spannorm.load(folder)
        except InputError as error:
            assert str(error).strip()
        else:
            assert isinstance(model, torch.nn.Module)


harms = (
    st.sampled_from(["config.json", "model.safetensors"]),
    st.sampled_from(["cut", "junk", "all", "gone", "fifo"]),
    st.floats(0, 0.999),
    st.one_of(st.binary(max_size=9), st.sampled_from([b"{}", b"[]", b'"x"', b"null", b"1e9"])),
)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*harms)
def test_a_damaged_model_is_refused_in_words(saved: Path, name: str, harm: str, at: float, junk: bytes) -> None:
    opens_or_refuses(saved, name, harm, at, junk)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
def test_many_damaged_models_are_refused_in_words(saved: Path, fresh: bool) -> None:
    run = settings(max_examples=2000, suppress_health_check=list(HealthCheck), derandomize=not fresh)(
        given(*harms)(lambda name, harm, at, junk: opens_or_refuses(saved, name, harm, at, junk))
    )
    seed(secrets.randbits(32) if fresh else 0)(run)()


def test_a_corpus_says_what_it_leaves_out_and_that_it_has_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for index in range(5):
        (corpus / f"{index}.txt").write_text(f"text number {index} " * 9)
    (corpus / "old.gz").write_bytes(b"x")
    (corpus / "more").symlink_to(tmp_path)
    recipe = DataRecipe(corpus=str(corpus), validation_fraction=0.2, test_fraction=0.2)
    data = prepare_data(recipe, tmp_path / "data")
    assert "1 symbolic links to folders, 1 .gz" in caplog.text
    assert prepare_data(recipe, tmp_path / "data", same_corpus=True) == data
    (corpus / "6.txt").write_text("another one")
    with pytest.raises(InputError, match="has changed since"):
        prepare_data(recipe, tmp_path / "data", same_corpus=True)
    content = bytearray((data.directory / "test.bin").read_bytes())
    content[0] ^= 1
    (data.directory / "test.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"test\.bin was altered"):
        prepare_data(recipe, tmp_path / "data")


def test_workers_import_nothing_from_the_current_directory(tmp_path: Path) -> None:
    for name in ("yaml", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file was run')")
    (tmp_path / "spannorm").mkdir()
    (tmp_path / "spannorm" / "__init__.py").write_text("raise SystemExit('the wrong package was run')")
    from spannorm.lab.jobs.runner import _python_path

    command = [sys.executable, "-P", "-m", "spannorm", "--help"]
    env = {**os.environ, "PYTHONPATH": _python_path()}
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "wrong" not in ran.stdout + ran.stderr, ran.stderr


def test_the_marks_of_our_folders_are_files_that_we_write(tmp_path: Path) -> None:
    for kind in (RUN, COMPARISON, EVALUATION):
        folder = tmp_path / kind.mark
        folder.mkdir()
        (folder / kind.mark).write_text("{}")
        with pytest.raises(InputError, match="must be there"):
            claim(folder, kind)
