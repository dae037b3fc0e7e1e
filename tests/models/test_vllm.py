"""Our models under what vLLM's Transformers backend does to them, against what they compute themselves."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_emulation
from facts import FACTS
from torch import nn
from vllm_emulation import served

from spannorm.models import SpanNormForCausalLM
from spannorm.vllm import register

ONE_STREAM = [name for name, fact in FACTS.items() if fact.streams == 1]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", vllm_emulation)
    register()


def test_the_package_offers_vllm_its_entry_point() -> None:
    path = Path(__file__).parents[2] / "pyproject.toml"
    offered = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["entry-points"]["vllm.general_plugins"]
    (value,) = offered.values()
    assert EntryPoint("spannorm", value, "vllm.general_plugins").load() is register


def save(config: Any, folder: Path) -> SpanNormForCausalLM:
    """A model whose norms are not all 1, saved and read back in float64."""
    model = SpanNormForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    return SpanNormForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


def check(model: Any, folder: Path, stages: int = 1) -> None:
    ids = torch.randint(37, (9,))
    with torch.no_grad():
        logits = torch.cat(list(served(folder, ids, prompt=5, stages=stages)))
        torch.testing.assert_close(logits, model(ids[None]).logits[0], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "qk_norm", "layernorm", "tied", "experts"])
@pytest.mark.parametrize("placement", FACTS)
def test_a_prompt_and_the_tokens_after_it(tiny_config: Any, tmp_path: Path, placement: str, kind: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "qk_norm": {"qk_norm": True},
        "layernorm": {"norm": "layernorm"},
        "tied": {"tie_word_embeddings": True},
        "experts": {"num_experts": 4, "moe_intermediate_size": 12},
    }
    check(save(tiny_config(placement=placement, **options[kind]), tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("placement", ONE_STREAM)
def test_a_pipeline_of_two_stages(tiny_config: Any, tmp_path: Path, placement: str, tied: bool) -> None:
    check(save(tiny_config(placement=placement, tie_word_embeddings=tied), tmp_path), tmp_path, stages=2)


@pytest.mark.slow
def test_a_pipeline_normalizes_the_embedding_once(tiny_config: Any, tmp_path: Path) -> None:
    config = tiny_config(placement="peri", placement_options={"embedding_norm": True})
    check(save(config, tmp_path), tmp_path, stages=2)
