"""Runs of a mixture of experts: what they record, that they resume bit for bit, and that a split changes nothing."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from spannorm.errors import Stopped
from spannorm.models import SpanNormForCausalLM
from spannorm.train.data import TokenData
from spannorm.train.display import Board, Row
from spannorm.train.engine import Engine, arguments
from spannorm.train.health import ROUTING
from spannorm.train.recipe import Recipe, TrainRecipe
from spannorm.train.run import model_config, train

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "router_z_loss_coef": 1e-3}


@pytest.fixture(scope="module")
def mixture(recipe: Recipe) -> Recipe:
    t = replace(recipe.train, steps=20, probe_every=10)
    return replace(recipe, model={**recipe.model, **EXPERTS}, train=t)


@pytest.fixture(scope="module")
def finished(mixture: Recipe, tokens: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    train(mixture, out, data=tokens.directory)
    return out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_records_the_routers_health(finished: Path) -> None:
    for record in lines(finished / "records.jsonl"):
        assert record.keys() >= set(ROUTING)
        assert 2.0 <= record["router_aux_loss"] <= 4.0, "two layers, 1 each where even, E/k at worst"
        assert 0 < record["router_entropy"] <= math.log(4)
        assert 0 <= record["max_violation"] <= 1 and 0 <= record["dead_experts"] <= 4
    for probe in lines(finished / "probes.jsonl"):
        load = torch.tensor(probe["routing"]["load"])
        assert load.shape == (2, 4)
        torch.testing.assert_close(load.sum(1), torch.ones(2), rtol=0, atol=1e-5)
    result = json.loads((finished / "result.json").read_text())
    assert result["routing"]["max_violation"] == max(probe["routing"]["max_violation"])
    # 2 of 4 experts of 3·32·32 parameters rest, in two layers
    assert result["parameters"] - result["active_parameters"] == 2 * 2 * 3 * 32 * 32
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert {f"train/{name}" for name in ROUTING} <= set(board.Tags()["scalars"])


def test_the_live_table_has_the_routers_health_beside_dense_runs(
    mixture: Recipe, recipe: Recipe, finished: Path
) -> None:
    rows = [Row.of(r, model_config(r)) for r in (mixture, recipe)]

    def table() -> str:
        console = Console(width=200)
        with console.capture() as captured:
            console.print(Board("title", rows, console).render())
        return captured.get()

    assert "dead experts" not in table(), "no mixture has a record yet"
    records = lines(finished / "records.jsonl")
    rows[0].add(records)
    head, sparse, dense = (line for line in table().splitlines() if "placement" in line or "span" in line)
    assert "max violation" in head and "dead experts" in head
    assert f" {records[-1]['max_violation']:.3f} " in sparse
    assert sparse.split()[-2:] == [str(records[-1]["dead_experts"]), "waiting"]
    assert dense.split()[-3:] == ["–", "–", "waiting"]


def test_the_recorded_loss_is_the_cross_entropy_alone(mixture: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    # with the same weights and tokens, the first step's loss does not know the coefficients
    firsts = []
    for coefficient in (0.0, 1.0):
        model = {**mixture.model, "router_aux_loss_coef": coefficient, "router_z_loss_coef": coefficient}
        out = tmp_path / str(coefficient)
        train(replace(mixture, model=model, train=replace(mixture.train, steps=5)), out, data=tokens.directory)
        firsts.append(lines(out / "records.jsonl")[0]["loss"])
    assert firsts[0] == pytest.approx(firsts[1], rel=1e-5)


@pytest.mark.parametrize("change", [{"batch_size": 2, "accumulation": 4}, {"activation_checkpointing": True}], ids=str)
def test_accumulation_and_checkpointing_give_the_same_steps(
    mixture: Recipe, tokens: TokenData, finished: Path, tmp_path: Path, change: dict
) -> None:
    train(replace(mixture, train=replace(mixture.train, **change)), tmp_path / "run", data=tokens.directory)
    for ours, theirs in zip(lines(tmp_path / "run/records.jsonl")[:3], lines(finished / "records.jsonl"), strict=False):
        for key in ("loss", "router_aux_loss", "router_z_loss", "router_entropy", "router_logit_rms"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_an_interrupted_run_goes_on_bit_for_bit(
    mixture: Recipe, tokens: TokenData, finished: Path, tmp_path: Path
) -> None:
    def stop(record: dict) -> None:
        if record["step"] == 13:
            os.kill(os.getpid(), 15)

    with pytest.raises(Stopped):
        train(mixture, tmp_path / "run", data=tokens.directory, on_step=stop)
    train(mixture, tmp_path / "run", data=tokens.directory)
    for name in ("records.jsonl", "probes.jsonl"):
        ours, theirs = lines(tmp_path / "run" / name), lines(finished / name)
        assert [{**r, "seconds": 0} for r in ours] == [{**r, "seconds": 0} for r in theirs]
    left, right = (load_file(folder / "model/model.safetensors") for folder in (tmp_path / "run", finished))
    assert all(torch.equal(left[name], right[name]) for name in right)


class Keep(TrainerCallback):
    """The gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.gradients = {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters()}


def step_gradients(config, folder: Path, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    """Of one step over 32 sequences under the engine, in float64."""
    torch.manual_seed(5)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 200, (32, 12))]
    model = SpanNormForCausalLM(config).double()
    model.set_experts_implementation("eager")
    recipe = TrainRecipe(steps=1, batch_size=batch_size, accumulation=accumulation, warmup_steps=0, clip_norm=0.0)
    args = arguments(recipe, folder)
    args.save_strategy = "no"
    keep = Keep()
    Engine(model, args, recipe=recipe, train_dataset=data, callbacks=[keep]).train()
    return keep.gradients


def test_under_the_trainer_accumulation_gives_the_gradient_of_the_whole_batch(
    mixture: Recipe, tokens: TokenData, tmp_path: Path
) -> None:
    model = {**mixture.model, "router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.5}
    config = model_config(replace(mixture, model=model), tokens)
    whole, parts = step_gradients(config, tmp_path, 32, 1), step_gradients(config, tmp_path, 8, 4)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-11, atol=1e-12)


PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from train.test_mixture_runs import step_gradients
from spannorm.models import SpanNormConfig
torch.set_num_threads(1)
gradients = step_gradients(SpanNormConfig.from_pretrained(sys.argv[2]), Path(sys.argv[2]) / "run", 16, 1)
torch.save(gradients, Path(sys.argv[2]) / "gradients.pt") if torch.distributed.get_rank() == 0 else None
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(mixture: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    model = {**mixture.model, "router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.5}
    config = model_config(replace(mixture, model=model), tokens)
    config.save_pretrained(tmp_path)
    (tmp_path / "process.py").write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29613"]
    command += [str(tmp_path / "process.py"), str(Path(__file__).parents[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "gradients.pt")
    for name, gradient in step_gradients(config, tmp_path, 32, 1).items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-11, atol=1e-12)
