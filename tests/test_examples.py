"""The examples run, at tiny size, and are as short as they say."""

import math
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spannorm import InputError, build_placement, init_plan, probes, theory
from spannorm.placements import PLACEMENTS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_a_llama_is_trained_saved_loaded_and_writes(tmp_path: Path) -> None:
    script = EXAMPLES / "train_llama.py"
    assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    command = [sys.executable, str(script), "--steps", "2", "--blocks", "2", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "2 llama layers rewired to span, depth rule 1/sqrt(L):init+lr" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("def ") or "\ndef " in ran.stdout
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("placement", ["span", "pre"])
def test_a_plain_gpt_is_drawn_measured_predicted_and_trained(placement: str, capsys: pytest.CaptureFixture) -> None:
    example = runpy.run_path(str(EXAMPLES / "plain_gpt.py"))
    predicted, paths, record = example["main"](placement)
    out = capsys.readouterr().out
    assert "no mismatches" in out
    assert predicted.log_total_gain == pytest.approx(paths.log_gain["total"][0], abs=0.15)
    for site in ("attn_norm", "ffn_norm"):  # one narrow model: a mean over blocks
        assert np.mean(record.variance[site]) == pytest.approx(np.mean(predicted.variance[site]), rel=0.08)
    first, last = map(float, re.findall(r"loss ([\d.]+) → ([\d.]+)", out)[0])
    assert last < first - 2


@pytest.mark.parametrize("placement", ["span", "peri"])
def test_two_vision_towers_are_drawn_and_measured_a_stack_at_a_time(placement: str, capsys) -> None:
    example = runpy.run_path(str(EXAMPLES / "vision.py"))
    predicted, records = example["main"](placement)
    assert "no mismatches" in capsys.readouterr().out
    for record in records.values():
        assert not record.unmatched
        for site in ("attn_norm", "ffn_norm"):
            assert np.mean(record.variance[site]) == pytest.approx(np.mean(predicted.variance[site]), rel=0.1)
    assert records["color"].signal_rms != records["depth"].signal_rms
    model = example["TwoTowers"](placement)
    with pytest.raises(InputError, match=r"TwoTowers has several stacks, in color.blocks, depth.blocks: .*model.color"):
        probes.Probe(model)
    with pytest.raises(InputError, match=r"no role is known for the parameter 'color.cls_token'.*roles=\{'color.cls"):
        init_plan(model)
    assert init_plan(model, roles=example["ROLES"])["color.patches.weight"].std == pytest.approx((3 * 8 * 8) ** -0.5)


def test_spannorm_on_streams_is_spannorm_or_four_shallow_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/theory.md says. Written to all streams it starts as SpanNorm; in turn, as SpanNorm four times less deep,
    four times over, whose mean leaves."""
    example = runpy.run_path(str(EXAMPLES / "span_streams.py"))
    for name in ("span_all", "span_turns"):
        monkeypatch.setitem(PLACEMENTS, name, PLACEMENTS.pop(name))  # gone again after the test
    shallow, deep = (theory.predict("span", depth, depth_rule="none", initial_norm="embedding") for depth in (8, 32))
    same, turns = (theory.predict(name, 32, depth_rule="none") for name in ("span_all", "span_turns"))
    assert same.log_total_gain == pytest.approx(deep.log_total_gain, abs=1e-4)
    assert turns.log_skip_gain == pytest.approx(shallow.log_skip_gain, abs=1e-4)
    assert turns.log_total_gain == pytest.approx(shallow.log_total_gain - math.log(example["STREAMS"]) / 2, abs=0.05)

    x = y = torch.nn.functional.rms_norm(torch.randn(2, 3, 8), (8,))
    for b in range(4):
        sizes = {"hidden_size": 8, "layer_idx": b, "num_layers": 4, "depth_rule": "none"}
        sublayers = [lambda n, k=k: torch.tanh(n.roll(k, -1)).cumsum(1) for k in (b + 1, b + 2)]
        x = build_placement("span", initial_norm="none", **sizes)(x, *sublayers)
        y = build_placement("span_all", **sizes)(y, *sublayers)
    torch.testing.assert_close(x, y)
