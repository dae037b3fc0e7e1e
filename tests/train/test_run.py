"""Real runs, tiny: what they write, that they go on bit for bit, and how they fail."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spannorm import kernels
from spannorm.errors import InputError, Stopped
from spannorm.models import SpanNormForCausalLM
from spannorm.train.checkpoints import last_complete, seal
from spannorm.train.data import TokenData
from spannorm.train.engine import Engine, arguments
from spannorm.train.recipe import Recipe
from spannorm.train.run import model_config, train
from spannorm.train.schedule import share_of_peak

RESULT_KEYS = {"placement", "depth_rule", "seed", "learning_rate", "status", "reason", "val_loss", "bits_per_byte"}
RESULT_KEYS |= {"unigram_loss", "spike_score", "max_grad_norm", "tokens_per_second", "parameters", "test_loss"}


def records(folder: Path) -> list[dict]:
    """A run's records without its timings."""
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    assert (a / "probes.jsonl").read_text() == (b / "probes.jsonl").read_text()
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tokens: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's run, uninterrupted: what every interrupted one must equal."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(recipe, out, data=tokens.directory)
    return out


def test_a_chunked_loss_trains_the_same_model(recipe, tokens, tmp_path):
    chunked = replace(recipe, train=replace(recipe.train, loss_chunk=50, steps=10))
    whole = replace(recipe, train=replace(recipe.train, steps=10))
    results = [train(r, tmp_path / str(i), data=tokens.directory) for i, r in enumerate((chunked, whole))]
    for key in ("val_loss", "test_loss", "max_grad_norm"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4)


def test_a_run_writes_what_it_promises(finished: Path, tokens: TokenData) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result.keys() >= RESULT_KEYS
    reached = result["tokens_per_second"] * result["flops_per_token"]
    assert result["matrix_share"] * result["matrix_rate"] == pytest.approx(reached)
    assert 1e8 < result["matrix_rate"] < 1e13 and 0 < result["matrix_share"] < 1, "so small a model is far below it"
    assert (result["status"], result["reason"], result["depth_rule"]) == ("ok", None, "1/sqrt(L)")
    assert result["val_loss"] < math.log(257), "it has learned something"
    bits = result["val_loss"] / math.log(2) * tokens.splits["validation"].tokens / tokens.splits["validation"].bytes
    assert result["bits_per_byte"] == pytest.approx(bits)
    assert [r["step"] for r in records(finished)] == list(range(1, 41))
    probes = [json.loads(line) for line in (finished / "probes.jsonl").read_text().splitlines()]
    assert [p["step"] for p in probes] == [0, 20, 40]
    assert all(len(p["signal_rms"]) == len(p["gradient_rms"]) == len(p["similarity"]) == 3 for p in probes)
    run = json.loads((finished / "run.json").read_text())
    assert run["data"]["sha256"] == tokens.sha256 and run["versions"]["torch"] == torch.__version__
    assert list((finished / "tensorboard").glob("events*"))
    pickles = [p for p in (finished / "model").iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not pickles, "a trained model is safetensors and JSON"


def test_the_trained_model_loads_and_generates_from_text(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    prompt = tokenizer("def ", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert tokenizer.decode(out[0]).startswith("def ")


def test_the_final_loss_is_the_mean_cross_entropy_of_the_held_out_windows(finished: Path, tokens: TokenData) -> None:
    model = SpanNormForCausalLM.from_pretrained(finished / "model").double().eval()
    stream = torch.from_numpy(tokens.tokens("validation").astype("int64"))
    windows = len(stream) // 32
    losses = []
    for i in range(8):
        start = (i * windows // 8) * 32
        ids = stream[start : start + 32][None]
        log_p = model(ids).logits.log_softmax(-1)[0, :-1]
        losses.append(-log_p.gather(1, ids[0, 1:, None]).mean().item())
    result = json.loads((finished / "result.json").read_text())
    assert result["val_loss"] == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_every_step_has_the_rate_of_the_schedules_equation(recipe: Recipe, finished: Path) -> None:
    rates = [r["learning_rate"] for r in records(finished)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01]), "step 1 moves too"
    assert rates[21] == pytest.approx(0.0055), "halfway from step 4 to step 40"
    assert rates[-1] == pytest.approx(0.001)
    t = replace(recipe.train, steps=20, warmup_steps=4, decay_fraction=0.25, final_learning_rate=0.1)
    steps = {
        name: [share_of_peak(replace(t, schedule=name), k) for k in range(1, 21)] for name in ("cosine", "wsd", "ramp")
    }
    assert steps["cosine"][:4] == steps["wsd"][:4] == [0.25, 0.5, 0.75, 1.0]
    assert steps["wsd"][4:15] == [1.0] * 11
    assert steps["wsd"][15:] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])
    assert steps["cosine"][11] == pytest.approx(0.55) and steps["cosine"][-1] == pytest.approx(0.1)
    assert steps["ramp"] == pytest.approx([k / 20 for k in range(1, 21)])
    constant = replace(t, schedule="wsd", warmup_steps=0, decay_fraction=0.0)
    assert [share_of_peak(constant, k) for k in (1, 19)] == [1.0, 1.0]


def test_probes_leave_training_untouched(recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path) -> None:
    often = replace(recipe, train=replace(recipe.train, probe_every=1))
    train(often, tmp_path / "run", data=tokens.directory)
    assert records(tmp_path / "run") == records(finished)


def test_accumulation_gives_the_step_of_the_whole_batch(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    t = replace(recipe.train, steps=10, probe_every=99)
    train(replace(recipe, train=replace(t, batch_size=4)), tmp_path / "whole", data=tokens.directory)
    train(replace(recipe, train=replace(t, batch_size=2, accumulation=2)), tmp_path / "parts", data=tokens.directory)
    for whole, parts in zip(records(tmp_path / "whole"), records(tmp_path / "parts"), strict=True):
        assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [({"activation_checkpointing": True}, 1e-6), ({"precision": "bf16"}, 0.05), ({"kernels": "triton"}, 1e-4)],
    ids=lambda c: next(iter(c)) if isinstance(c, dict) else "",
)
def test_checkpointing_bf16_and_other_kernels_train(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path, change: dict, tolerance: float
) -> None:
    train(replace(recipe, train=replace(recipe.train, **change)), tmp_path / "run", data=tokens.directory)
    kernels.use("auto")
    for ours, reference in zip(records(tmp_path / "run"), records(finished), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=tolerance)


def test_decay_and_learning_rate_go_by_role(recipe: Recipe, tmp_path: Path) -> None:
    rule = replace(recipe, model={**recipe.model, "depth_rule": "1/L:init+lr", "vocab_size": 257})
    model = SpanNormForCausalLM(model_config(rule))
    engine, plan = Engine(model, arguments(rule.train, tmp_path), recipe=rule.train), model.init_plan()
    names = {id(p): n for n, p in model.named_parameters()}
    seen = {}
    for group in engine.create_optimizer().param_groups:
        seen |= {names[id(p)]: (group["lr"], group["weight_decay"]) for p in group["params"]}
    assert seen.keys() == set(names.values())
    for name, (rate, decay) in seen.items():
        role = plan[name].role
        c = 0.5 if role in ("attn_out", "ffn_down") else 1.0
        assert rate == pytest.approx(0.01 * c), name
        assert decay == pytest.approx(0.0 if role in ("norm", "embedding") else 0.1 / c), name


def start(recipe: Recipe, tokens: TokenData, out: Path) -> subprocess.Popen:
    out.parent.mkdir(exist_ok=True)
    path = out.parent / f"{out.name}.yaml"
    raw = recipe.to_dict()
    del raw["compare"]
    path.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "spannorm", "train", str(path), "--out", str(out), "--data", str(tokens.directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while not (out / "records.jsonl").is_file() or len((out / "records.jsonl").read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "the run did not get going"
        time.sleep(0.005)


def test_killed_and_resumed_equals_uninterrupted(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(recipe, tokens, out)
    wait_for_steps(out, 14, process)
    process.kill()
    process.communicate()
    assert not (out / "result.json").exists(), "killed before its end"
    assert last_complete(out) is not None
    train(recipe, out, data=tokens.directory)
    assert_same_run(out, finished)


def test_ctrl_c_saves_says_how_to_go_on_and_the_resumed_run_equals(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(recipe, tokens, out)
    wait_for_steps(out, 5, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "saved" in output and f"Go on with: spannorm train {out}.yaml" in output and "Traceback" not in output
    assert last_complete(out) is not None, "what was done is not lost"
    train(recipe, out, data=tokens.directory)
    assert_same_run(out, finished)


def test_a_second_process_on_the_same_folder_is_refused(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(recipe, tokens, out)
    try:
        wait_for_steps(out, 1, process)
        with pytest.raises(InputError, match="another process is working"):
            train(recipe, out, data=tokens.directory)
    finally:
        process.kill()
        process.communicate()


def test_a_finished_run_is_read_and_not_run_again(recipe: Recipe, tokens: TokenData, finished: Path) -> None:
    before = (finished / "records.jsonl").stat().st_mtime_ns
    assert train(recipe, finished, data=tokens.directory)["status"] == "ok"
    assert (finished / "records.jsonl").stat().st_mtime_ns == before


def test_another_recipe_in_the_folder_is_refused_and_nothing_changes(
    recipe: Recipe, tokens: TokenData, finished: Path
) -> None:
    other = replace(recipe, train=replace(recipe.train, learning_rate=0.02))
    with pytest.raises(InputError, match=r"train.learning_rate is 0.01 there and 0.02 here"):
        train(other, finished, data=tokens.directory)
    assert len(records(finished)) == 40


def half_done(finished: Path, out: Path) -> Path:
    """A copy of the finished run as a kill after its last checkpoint would have left it."""
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "model")
    return out


def test_a_truncated_checkpoint_is_passed_over(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = half_done(finished, tmp_path / "run")
    checkpoint = out / "checkpoint-40" / "optimizer.pt"
    os.truncate(checkpoint, checkpoint.stat().st_size - 7)
    assert last_complete(out) == out / "checkpoint-30"
    train(recipe, out, data=tokens.directory)
    assert_same_run(out, finished)


def test_a_run_killed_after_its_last_step_is_only_evaluated(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = half_done(finished, tmp_path / "run")
    result = train(recipe, out, data=tokens.directory)
    assert_same_run(out, finished)
    assert result["val_loss"] == json.loads((finished / "result.json").read_text())["val_loss"]


def test_a_run_does_not_go_on_on_other_tokens(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = half_done(finished, tmp_path / "run")
    run = json.loads((out / "run.json").read_text())
    run["data"]["sha256"] = "0" * 64
    (out / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="begun on other tokens"):
        train(recipe, out, data=tokens.directory)


def test_a_checkpoint_of_another_model_is_refused(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = half_done(finished, tmp_path / "run")
    path = out / "checkpoint-40" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "placement": "post"}))
    seal(out / "checkpoint-40")
    with pytest.raises(InputError, match="placement is 'post' there and 'span' in the recipe"):
        train(recipe, out, data=tokens.directory)


def test_a_loss_that_is_not_finite_stops_the_run_with_its_reason(
    recipe: Recipe, tokens: TokenData, tmp_path: Path
) -> None:
    t = replace(recipe.train, learning_rate=1e30, clip_norm=0.0, warmup_steps=1)
    wild = replace(recipe, model={**recipe.model, "placement": "pre", "depth_rule": "none"}, train=t)
    result = train(wild, tmp_path / "run", data=tokens.directory)
    assert (result["status"], result["reason"], result["val_loss"]) == ("failed", "non-finite", None)
    assert result["steps_done"] < 40
    assert json.loads((tmp_path / "run" / "records.jsonl").read_text().splitlines()[-1])["loss"] is None
    assert "NaN" not in (tmp_path / "run" / "result.json").read_text()


def test_a_model_that_learns_nothing_has_failed(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    idle = replace(recipe, train=replace(recipe.train, learning_rate=1e-12))
    assert train(idle, tmp_path / "run", data=tokens.directory)["reason"] == "unigram"


@pytest.mark.parametrize(("have", "word"), [(100, "must be at least the tokenizer's vocabulary"), (300, "")])
def test_the_vocabulary_must_hold_the_tokenizer(recipe: Recipe, tokens: TokenData, have: int, word: str) -> None:
    sized = replace(recipe, model={**recipe.model, "vocab_size": have})
    if word:
        with pytest.raises(InputError, match=word):
            model_config(sized, tokens)
    else:
        assert model_config(sized, tokens).vocab_size == have


def test_a_stop_is_not_an_error_of_the_input() -> None:
    assert not issubclass(Stopped, InputError)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_the_eager_one(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(replace(recipe, train=replace(recipe.train, compile=True)), tokens, out)
    assert "validation loss" in process.communicate(timeout=300)[0]
    for ours, reference in zip(records(out), records(finished), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-3)
    assert load_file(out / "model" / "model.safetensors").keys() == weights(finished).keys()


@pytest.mark.slow
def test_killed_again_and_again_it_still_equals(
    recipe: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    """A kill every few steps, so that some fall into a checkpoint's writing."""
    out = tmp_path / "run"
    often = replace(recipe, train=replace(recipe.train, checkpoint_every=2))
    for kill in range(5):
        process = start(often, tokens, out)
        wait_for_steps(out, 6 * (kill + 1), process)
        time.sleep(0.007 * kill)
        process.kill()
        process.communicate()
        assert not (out / "result.json").exists()
    train(often, out, data=tokens.directory)
    assert_same_run(out, finished)
