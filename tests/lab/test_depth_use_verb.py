"""`spannorm depth-use` on a folder: the files that it writes, and what it refuses; and the report's two figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from lab_files import LAYERS, arm, comparison, failed
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import spannorm
from spannorm.cli import app
from spannorm.errors import InputError
from spannorm.lab.depth.use import use_of_folder
from spannorm.lab.report.page import draw_report
from spannorm.train.data import TokenData

DEPTH = 2


@pytest.fixture(params=["plain", "rewired"])
def folder(request: pytest.FixtureRequest, tokens: TokenData, tmp_path: Path) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, max_position_embeddings=48, **sizes))
    if request.param == "rewired":
        spannorm.rewire(model, "span")
    model.save_pretrained(tmp_path / "model")
    tokens.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_writes_json_and_a_picture_of_any_model(folder: Path, tokens: TokenData) -> None:
    ran = CliRunner().invoke(
        app,
        [
            "depth-use",
            str(folder),
            "--data",
            str(tokens.directory),
            "--sequences",
            "4",
            "--json",
            str(folder / "a.json"),
        ],
    )
    assert ran.exit_code == 0, ran.output
    found = json.loads((folder / "depth-use" / "results.json").read_text())
    assert json.loads((folder / "a.json").read_text()) == found
    assert found["sequences"] == 4 and found["sequence_length"] == 48
    assert len(found["angular_distance"]) == len(found["usefulness"]) == len(found["causal"]) == DEPTH
    assert len(found["logit_lens"]) == len(found["jacobian"]) == len(found["token_cosine"]) == DEPTH + 1
    assert found["logit_lens"][-1] == found["loss"] == pytest.approx(math.log(257), rel=0.2)
    assert all(math.isfinite(value) for value in found["usefulness"])
    assert (folder / "depth-use" / "depth_use.png").read_bytes().startswith(b"\x89PNG")
    assert "made linear" in ran.output and f"{found['skip_cost'][1]:.4f}" in ran.output


def test_text_goes_through_the_models_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text("x = 1\n" * 200)  # 1,200 bytes, 25 sequences of 48
    found = use_of_folder(folder, text=tmp_path / "text.py", out=tmp_path / "out", sequences=3, batch_size=2, reach=0)
    assert found["sequences"] == 2, "whole batches"
    assert found["permutation"] == [[0.0, None], [None, 0.0]]


def test_bad_input_is_one_clear_message(folder: Path, tokens: TokenData, tmp_path: Path) -> None:
    def refused(match: str, where: Path = folder, **given: object) -> None:
        with pytest.raises(InputError, match=match):
            use_of_folder(where, **given)

    refused("neither a run nor a model", tmp_path)
    refused("give tokens with --data")
    refused("cannot be read", text=tmp_path / "none")
    refused("at least twice as many", data=tokens.directory, sequences=10**6)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path / "few")
    refused("none of the model's 50", tmp_path / "few", data=tokens.directory)
    (tmp_path / "few" / "config.json").write_text('{"model_type": "vit"}')
    refused("no causal language model", tmp_path / "few", data=tokens.directory)


def test_the_report_draws_the_use_of_depth_where_it_was_measured(tmp_path: Path) -> None:
    blocks, points = [0.1] * LAYERS, [1.0] * (LAYERS + 1)
    old = {"effective_rank": points, "skip_cost": blocks, "spectrum": points}
    new = {**old, "angular_distance": blocks, "usefulness": [*blocks[1:], None], "causal": [*blocks[1:], None]}
    new |= {"permutation": blocks[1:], "logit_lens": points, "jacobian": points}
    page = draw_report(
        comparison(tmp_path / "new", [arm("pre", collapse=new), arm("span"), failed("post", "none", "non-finite")])
    ).read_text()
    assert 'title-use_of_depth"' in page and 'title-use_of_depth_together"' in page and "made linear" in page
    page = draw_report(comparison(tmp_path / "old", [arm("pre", collapse=old)])).read_text()  # of an older version
    assert 'title-collapse"' in page and "use_of_depth" not in page
