"""The command line as a user meets it: exit codes, one clear message, nothing half-written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from spannorm.cli import app
from spannorm.errors import InputError
from spannorm.train.data import TokenData
from spannorm.train.recipe import Recipe
from spannorm.train.run import train


def spannorm(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "spannorm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.fixture
def path(recipe: Recipe, tmp_path: Path) -> Path:
    raw = recipe.to_dict()
    del raw["compare"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "tiny.yaml"


def assert_refused(ran: subprocess.CompletedProcess, *words: str) -> None:
    assert ran.returncode == 2, ran.stdout + ran.stderr
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert "Traceback" not in ran.stderr + ran.stdout
    for word in words:
        assert word in ran.stderr


def test_the_verbs_are_listed() -> None:
    ran = spannorm("--help")
    assert ran.returncode == 0 and all(verb in ran.stdout for verb in ("train", "compare", "report", "data"))


def test_train_ends_in_its_loss_and_exit_code(path: Path, tokens: TokenData, tmp_path: Path) -> None:
    ran = spannorm("train", path, "--out", tmp_path / "run", "--data", tokens.directory)
    assert ran.returncode == 0, ran.stderr
    loss = json.loads((tmp_path / "run" / "result.json").read_text())["val_loss"]
    assert f"validation loss {loss:.4f}" in ran.stdout and ran.stderr == ""


def test_a_failed_training_exits_with_1(path: Path, tokens: TokenData, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = spannorm("train", path, "--out", out, "--data", tokens.directory, "--set", "train.learning_rate=1e-12")
    assert ran.returncode == 1 and "unigram" in ran.stdout


def test_data_prepares_what_train_takes(path: Path, tmp_path: Path, tokens: TokenData) -> None:
    ran = spannorm("data", path, "--out", tmp_path / "tokens", "--json", tmp_path / "data.json")
    assert ran.returncode == 0 and tokens.sha256[:16] in ran.stdout
    written = json.loads((tmp_path / "data.json").read_text())
    assert written["sha256"] == tokens.sha256 and written["splits"]["test"]["tokens"] == tokens.split("test").tokens


def test_bad_input_is_one_line_and_exit_code_2(path: Path, tmp_path: Path, tokens: TokenData) -> None:
    out = ["--out", tmp_path / "run"]
    assert_refused(spannorm("train", tmp_path / "none.yaml", *out), "no recipe at")
    assert_refused(spannorm("train", path, *out, "--set", "train.stepps=3"), "'steps'")
    assert_refused(spannorm("train", path, *out, "--set", "model.hidden_size=33"), "33")
    assert_refused(spannorm("train", path, *out, "--set", "data.corpus=/nowhere"), "no corpus at", "/nowhere")
    other = ["--set", "data.test_fraction=0.1", "--data", tokens.directory]
    assert_refused(spannorm("train", path, *out, *other), "data of another recipe", "data.test_fraction")
    assert_refused(spannorm("report", tmp_path / "none"), "results.json")
    (tmp_path / "empty").mkdir()
    assert_refused(spannorm("train", path, *out, "--set", f"data.corpus={tmp_path / 'empty'}"), "no file")


def test_a_corpus_shorter_than_one_sequence_is_refused(path: Path, tmp_path: Path, tokens: TokenData) -> None:
    ran = spannorm(
        "train", path, "--out", tmp_path / "r", "--data", tokens.directory, "--set", "train.sequence_length=100000"
    )
    assert_refused(ran, "fewer than one sequence of 100000")


def test_a_truncated_token_file_is_refused(path: Path, tmp_path: Path) -> None:
    assert spannorm("data", path, "--out", tmp_path / "tokens").returncode == 0
    tokens = tmp_path / "tokens" / "train.bin"
    os.truncate(tokens, tokens.stat().st_size - 100)
    assert_refused(
        spannorm("train", path, "--out", tmp_path / "run", "--data", tmp_path / "tokens"), "truncated by 100"
    )


def test_a_folder_that_cannot_be_written_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(spannorm("train", path, "--out", tmp_path / "file" / "run"), "cannot write to")
    assert_refused(spannorm("train", path, "--out", "/proc/spannorm"), "cannot make the folder /proc/spannorm")


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "read-only"), (errno.EACCES, "may not write")])
def test_a_read_only_folder_is_refused_before_any_time_is_spent(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def refuse(*_: object) -> None:  # by hand, since root may write where the mode says no
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(InputError, match=words):
        train(recipe, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_no_room_for_a_checkpoint_is_one_clear_error_and_the_run_goes_on_with_room(
    path: Path, tokens: TokenData, tmp_path: Path
) -> None:
    """The kernel refuses any file above 64 KiB, as a full disk would refuse the checkpoint's weights."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY)); "
    run = ["train", str(path), "--out", str(tmp_path / "run"), "--data", str(tokens.directory)]
    script = f"{limit}sys.argv[1:] = {run!r}; from spannorm.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert_refused(ran, "cannot write to", "run the same command again")
    assert not (tmp_path / "run" / "result.json").exists()
    ran = spannorm(*run)
    assert ran.returncode == 0, ran.stderr


def test_a_comma_in_brackets_belongs_to_its_depth_rule() -> None:
    from spannorm.cli.options import listed

    rules = "1/sqrt(L):gain(0.283,0.432), none,completep(4)"
    assert listed(rules) == ["1/sqrt(L):gain(0.283,0.432)", "none", "completep(4)"]


def test_a_json_file_that_cannot_be_written_or_would_stay_empty_is_refused_before_the_work(
    path: Path, tmp_path: Path
) -> None:
    nowhere = tmp_path / "none" / "a.json"
    for verb in ("data", "compare", "ladder", "max-lr"):
        assert_refused(spannorm(verb, path, "--json", nowhere), "there is no folder")
    assert_refused(spannorm("compare", path, "--print-commands", "--json", tmp_path / "a.json"), "--print-commands")
    assert not (tmp_path / "a.json").exists()


def test_a_shell_completes_placements_and_depth_rules_between_commas() -> None:
    from spannorm.cli.options import complete_rules

    words = {"COMP_WORDS": "spannorm theory --placements pre,s", "COMP_CWORD": "3"}
    script = "import sys; sys.argv = ['spannorm']; from spannorm.cli import main; main()"
    asked = {**os.environ, **words, "_SPANNORM_COMPLETE": "complete_bash"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=asked)
    assert ran.stdout.split() == ["pre,span", "pre,subln", "pre,siamese"], ran.stderr
    assert complete_rules("none,deepn") == ["none,deepnorm"]


@pytest.mark.parametrize("verb", ["compare", "max-lr"])
def test_json_of_a_comparison_is_what_its_folder_holds(
    verb: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {"complete": False, "jobs": [], "name": "tiny", "recipe": {"compare": {"protocol": {"seeds": []}}}}
    monkeypatch.setattr("spannorm.lab.compare.compare", lambda recipe, folder, **_: {**results, "folder": str(folder)})
    options = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "a.json")]
    ran = CliRunner().invoke(app, [verb, str(path), *options])
    assert ran.exit_code == 1, "not complete"
    assert json.loads((tmp_path / "a.json").read_text()) == {**results, "folder": str(tmp_path / "out")}


def test_a_stop_while_a_module_is_loading_ends_the_process_there(tmp_path):
    # an exception that went through a compiled module aborted it, core dump and all
    (tmp_path / "own.py").write_text("import loaded\n")
    (tmp_path / "loaded.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    pass\n"
        "print('went on')\n"
    )
    ran = spannorm("theory", "--import", "own.py", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (ran.returncode, ran.stdout) == (75, "")
    assert ran.stderr == "stopped; what was complete is kept. Go on with: spannorm theory --import own.py\n"
