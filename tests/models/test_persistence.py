"""Saving and loading: exact, safetensors only, and found by the Auto classes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from arms import TIED_ARMS
from transformers import AutoModel, AutoModelForCausalLM

from spannorm.errors import InputError
from spannorm.models import SpanNormForCausalLM, SpanNormModel

IDS = torch.arange(8).unsqueeze(0)


def trained(config) -> SpanNormForCausalLM:
    """A model whose parameters are not those of a fresh one."""
    model = SpanNormForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("placement", "rule", "tied"), TIED_ARMS)
def test_a_saved_model_comes_back_exactly_through_the_auto_class(tiny_config, tmp_path, placement, rule, tied):
    config = tiny_config(placement=placement, depth_rule=rule, tie_word_embeddings=tied, qk_norm=True)
    model = trained(config)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is SpanNormForCausalLM
    assert not any(info.values()), info
    assert again.config.depth_rule == rule
    state, back = model.state_dict(), again.state_dict()
    assert state.keys() == back.keys()
    assert all(torch.equal(state[name], back[name]) for name in state)
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


def test_only_safetensors_is_written(tiny_config, tmp_path):
    trained(tiny_config()).save_pretrained(tmp_path)
    ours = {"config.json", "generation_config.json", "modeling_spannorm.py", "model.safetensors"}
    assert {p.name for p in tmp_path.iterdir()} == ours
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["SpanNormForCausalLM"]
    assert written["depth_rule"] == "1/sqrt(L)"


def test_the_body_of_a_saved_causal_lm_loads_alone(tiny_config, tmp_path):
    model = trained(tiny_config())
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is SpanNormModel
    wanted = model.model.state_dict()
    assert wanted.keys() == body.state_dict().keys()
    assert all(torch.equal(wanted[name], value) for name, value in body.state_dict().items())


def test_a_model_of_another_seed_loads_what_was_saved_and_draws_nothing(tiny_config, tmp_path):
    model = trained(tiny_config(init_seed=9))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, init_seed=10)
    assert all(torch.equal(p, again.get_parameter(n)) for n, p in model.named_parameters())


def test_importing_the_models_is_all_that_the_auto_classes_need(tiny_config, tmp_path):
    model = trained(tiny_config())
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, spannorm.models\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model(torch.arange(8).unsqueeze(0)).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(model.eval()(IDS).logits.double().sum().item(), abs=1e-4)


def test_a_pickle_is_refused(tiny_config, tmp_path):
    model = SpanNormForCausalLM(tiny_config())
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    for cls in (SpanNormForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            cls.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="pickle"):
        SpanNormForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
