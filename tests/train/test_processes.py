"""Several processes: equal to one, and of one voice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes_fixtures import torchrun, train_together, write_recipe
from safetensors.torch import load_file

from spannorm.errors import InputError
from spannorm.placements import PLACEMENTS
from spannorm.train.data import TokenData
from spannorm.train.engine import passes
from spannorm.train.recipe import Recipe, TrainRecipe
from spannorm.train.run import train

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_z_loss_coef": 1e-3}
ARMS = {f"{p}-{kind}": (p, experts) for p in PLACEMENTS for kind, experts in (("dense", {}), ("moe", EXPERTS))}
FAST = ("pre-dense", "post-dense", "span-dense", "span-moe", "siamese-dense")

EXACT = {"placement", "depth_rule", "seed", "status", "reason", "spikes", "parameters", "tokens", "steps_done"}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def short(recipe: Recipe, arm: str, **changes: object) -> Recipe:
    """Six steps. Adam's ε lies above the gradients' rounding: below it, a gradient that is rounding alone moves its
    weight by a share of a whole step."""
    placement, experts = ARMS[arm]
    t = {"steps": 6, "learning_rate": 1e-3, "checkpoint_every": 3, "probe_every": 3, "adam_epsilon": 1e-6, **changes}
    model = {**recipe.model, **experts, "placement": placement}
    return replace(recipe, model=model, train=replace(recipe.train, **t))


def assert_equal_runs(one: Path, many: Path, tolerance: float = 1e-6) -> str:
    """Losses within a relative tolerance, weights within an absolute one (they are of order one). Says how near."""
    furthest = 0.0
    for name in ("records.jsonl", "probes.jsonl"):
        ours, theirs = lines(many / name), lines(one / name)
        assert [r["step"] for r in ours] == [r["step"] for r in theirs], "each step and each probe once"
        for our, their in zip(ours, theirs, strict=True):
            assert our.keys() == their.keys()
            for key in {"loss", "grad_norm", "router_aux_loss", "signal_rms", "gradient_rms"} & our.keys():
                assert our[key] == pytest.approx(their[key], rel=tolerance), key
            if name == "records.jsonl":
                furthest = max(furthest, *(abs(our[key] / their[key] - 1) for key in ("loss", "grad_norm")))
    left, right = (load_file(run / "model" / "model.safetensors") for run in (one, many))
    assert left.keys() == right.keys()
    weights = max(float((left[name] - right[name]).abs().max()) for name in left)
    assert weights <= tolerance
    ours, theirs = (json.loads((run / "result.json").read_text()) for run in (many, one))
    assert {key: ours[key] for key in EXACT} == {key: theirs[key] for key in EXACT}
    for key in ("val_loss", "test_loss"):
        assert ours[key] == pytest.approx(theirs[key], rel=tolerance)
    return f"losses and gradient norms {furthest:.0e}, weights {weights:.0e}"


@pytest.mark.parametrize(
    ("processes", "arms"),
    [(2, FAST), *(pytest.param(n, tuple(ARMS), marks=pytest.mark.slow) for n in (2, 4))],
    ids=["2-fast", "2-all", "4-all"],
)
def test_processes_give_the_losses_and_weights_of_one(
    recipe: Recipe, tokens: TokenData, tmp_path: Path, processes: int, arms: tuple[str, ...]
) -> None:
    # 7 sequences are no multiple of the processes, and accumulation is shared out too
    t = {"evaluation_sequences": 7, "batch_size": 4, "accumulation": 2}
    parallel = {(arm, how): short(recipe, arm, parallel=how, **t) for arm in arms for how in ("ddp", "fsdp")}
    train_together(processes, {tmp_path / how / arm: run for (arm, how), run in parallel.items()}, tokens)
    for arm in arms:
        train(short(recipe, arm, **t), tmp_path / "one" / arm, data=tokens.directory)
        for how in ("ddp", "fsdp"):
            # Adam makes steps of gradients that are hardly more than rounding: hc's dynamic weights start at 0 behind a
            # gain of 0.01, and a norm undoes the scale that mhc's first weights and gpas's last gate give the stream
            tolerance = 1e-5 if arm.startswith(("hc-", "mhc-", "gpas-")) else 1e-6
            near = assert_equal_runs(tmp_path / "one" / arm, tmp_path / how / arm, tolerance)
            print(f"{processes} {how:4} {arm:19}", near)


@pytest.mark.slow
def test_shards_in_bf16_recomputed_and_tied_train_as_well(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    """Tied weights and recomputed activations change nothing; bf16 keeps the loss to its three digits."""
    tied = {"tie_word_embeddings": True}
    plain = short(recipe, "span-dense", activation_checkpointing=True)
    changed = {
        "tied": replace(plain, model={**plain.model, **tied}),
        "bf16": short(recipe, "span-moe", precision="bf16"),
    }
    sharded = {name: replace(run, train=replace(run.train, parallel="fsdp")) for name, run in changed.items()}
    train_together(2, {tmp_path / "many" / name: run for name, run in sharded.items()}, tokens)
    halfway(tmp_path / "many" / "tied")
    train_together(2, {tmp_path / "many" / "tied": sharded["tied"]}, tokens)
    for (name, run), tolerance in zip(changed.items(), (1e-6, 0.01), strict=True):
        train(replace(run, train=replace(run.train, precision="fp32")), tmp_path / "one" / name, data=tokens.directory)
        ours, theirs = (lines(tmp_path / which / name / "records.jsonl") for which in ("many", "one"))
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=tolerance)
        weights = load_file(tmp_path / "many" / name / "model" / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float32}


def halfway(run: Path) -> None:
    """Set a finished run back to its checkpoint of step 3, as if it had been killed there."""
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoint-6")


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(2, 4, marks=pytest.mark.slow)],
)
def test_a_run_goes_on_at_another_number_of_processes(
    recipe: Recipe, tokens: TokenData, tmp_path: Path, before: int, after: int
) -> None:
    runs = {arm: short(recipe, arm) for arm in ("span-dense", "pre-moe")}
    for arm, run in runs.items():
        train(run, tmp_path / "one" / arm, data=tokens.directory)
    if before > 1:
        runs["post-dense"] = short(recipe, "post-dense", parallel="fsdp")
        train(short(recipe, "post-dense"), tmp_path / "one" / "post-dense", data=tokens.directory)
    moved = {tmp_path / "moved" / arm: run for arm, run in runs.items()}
    for processes in (before, after):
        train_together(processes, moved, tokens)
        if processes == before:
            for out in moved:
                halfway(out)
    for arm in runs:
        assert_equal_runs(tmp_path / "one" / arm, tmp_path / "moved" / arm)


def test_processes_speak_with_one_voice(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    path = write_recipe(recipe, tmp_path / "tiny.yaml")
    program = ["-m", "spannorm", "train", path, "--out", tmp_path / "run", "--data", tokens.directory]
    done = torchrun(2, *program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1 and done.stdout.count("step 40/40") == 1
    assert done.stderr == ""
    refused = torchrun(2, *program, "--set", "train.seed=5")
    assert refused.returncode != 0 and refused.stderr.count("error: ") == 1
    assert "train.seed is 0 there and 5 here" in refused.stderr


@pytest.mark.parametrize(
    ("batch", "accumulation", "processes", "expected"),
    [(8, 1, 1, (8, 1)), (8, 1, 2, (4, 1)), (4, 4, 2, (4, 2)), (6, 2, 4, (3, 1)), (6, 2, 3, (4, 1)), (5, 4, 2, (5, 2))],
)
def test_a_step_sees_as_many_sequences_in_any_number_of_processes(
    batch: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    t = TrainRecipe(batch_size=batch, accumulation=accumulation)
    assert passes(t, processes) == expected
    assert expected[0] * expected[1] * processes == batch * accumulation


def test_a_step_that_cannot_be_shared_out_is_refused() -> None:
    with pytest.raises(InputError, match=r"8 sequences .* must divide evenly among 3 processes"):
        passes(TrainRecipe(batch_size=8), 3)
