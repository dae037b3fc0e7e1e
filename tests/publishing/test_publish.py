"""A published folder, opened where there is no spannorm: its own file computes what ours computes, to the bit."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import spannorm
from spannorm.errors import InputError
from spannorm.kernels import add_norm, plain
from spannorm.models import (
    SpanNormForCausalLM,
    SpanNormForSequenceClassification,
    SpanNormForTokenClassification,
    SpanNormModel,
)
from spannorm.placements import PLACEMENTS
from spannorm.publishing import publish as publishing
from spannorm.publishing.bundle import model_file
from spannorm.publishing.publish import publish
from spannorm.train.data import TokenData
from spannorm.train.recipe import Recipe
from spannorm.train.run import train

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LAYERNORM = {"norm": "layernorm", "tie_word_embeddings": True}
X = torch.arange(18).reshape(2, 9) % 37

# sys.argv[1] is a folder of folders, each with what ours computed beside it.
BARE = """
import sys, torch
from pathlib import Path

class Hidden:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "spannorm":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Hidden())
"""

# What a client does with a folder.
CLIENT = """
from transformers import AutoModelForCausalLM

def everything(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        logits = model(x).logits
        assert torch.equal(model.generate(x, **long), model.generate(x, use_cache=False, **long))
    return model, logits

x, long = torch.arange(18).reshape(2, 9) % 37, dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
for expected in sorted(Path(sys.argv[1]).glob("*.pt")):
    name, wanted = expected.stem, torch.load(expected)
    model, logits = everything(expected.with_suffix(""))
    assert torch.equal(logits, wanted["logits"]), name
    model.train()
    out = model(x, labels=x)
    out.loss.backward()
    assert torch.equal(out.loss.detach(), wanted["loss"]), name
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert grads.keys() == wanted["grads"].keys(), name
    assert all(torch.equal(grads[n], g) for n, g in wanted["grads"].items()), name
    drawn = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True).state_dict()
    assert all(torch.equal(drawn[n], p) for n, p in wanted["drawn"].items()), name
    again = Path(sys.argv[1]) / "again" / name
    model.save_pretrained(again)
    assert torch.equal(everything(again)[1], logits), name
    print(name)
assert "spannorm" not in sys.modules
"""


HEADS = """
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

x = torch.arange(18).reshape(2, 9) % 37
for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
    name = auto.__name__.removeprefix("AutoModelFor")
    model = auto.from_pretrained(Path(sys.argv[1]) / name, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(model(x).logits, torch.load(f"{sys.argv[1]}/{name}.pt")), name
    print(name)
"""


def hold(root: Path, client: str = CLIENT) -> list[str]:
    """Run the client on all that `published` made below `root`."""
    run = subprocess.run(
        [sys.executable, "-c", BARE + client, str(root)], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def published(root: Path, name: str, config: Any) -> None:
    """A model unlike at birth, published, and what it computes."""
    model = SpanNormForCausalLM(config).eval()
    drawn = {n: p.clone() for n, p in model.state_dict().items()}
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.save_pretrained(root / "saved" / name)
    publish(root / "saved" / name, str(root / name))
    # loaded as the client loads it: a matrix that lies elsewhere in memory may be multiplied in another order
    model = spannorm.load(root / name).eval()
    with torch.no_grad():
        logits = model(X).logits
    loss = model.train()(X, labels=X).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    torch.save({"logits": logits, "loss": loss.detach(), "grads": grads, "drawn": drawn}, root / f"{name}.pt")


def test_a_published_folder_computes_the_same_where_there_is_no_spannorm(tiny_config: Any, tmp_path: Path) -> None:
    published(tmp_path, "span", tiny_config())
    published(tmp_path, "hybrid", tiny_config(placement="hybrid", qk_norm=True, **LAYERNORM))
    published(tmp_path, "siamese", tiny_config(placement="siamese", **EXPERTS))
    assert hold(tmp_path) == ["hybrid", "siamese", "span"]
    text = (tmp_path / "span" / "modeling_spannorm.py").read_text(encoding="utf-8")
    assert "SiameseNorm" not in text and "triton" not in text.lower().replace("triton's", "")
    assert not re.search(r"^\s*(import|from) spannorm", text, re.MULTILINE)
    assert max(map(len, text.splitlines())) <= 120


def test_published_classification_heads_open_where_there_is_no_spannorm(tiny_config: Any, tmp_path: Path) -> None:
    kinds = {"SequenceClassification": SpanNormForSequenceClassification,
             "TokenClassification": SpanNormForTokenClassification}  # fmt: skip
    for name, kind in kinds.items():
        model: Any = kind(tiny_config(placement="siamese", num_labels=3, pad_token_id=0))
        model.save_pretrained(tmp_path / "saved" / name)
        publish(tmp_path / "saved" / name, str(tmp_path / name))
        with torch.no_grad():
            torch.save(kind.from_pretrained(tmp_path / name).eval()(X).logits, tmp_path / f"{name}.pt")
        modes = {file.stat().st_mode & 0o777 for file in (tmp_path / name).iterdir()}
        assert modes == {(tmp_path / f"{name}.pt").stat().st_mode & 0o777}, "whoever may read one file may read all"
    assert hold(tmp_path, HEADS) == list(kinds)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*with depth rule")
@pytest.mark.parametrize("experts", [False, True])
def test_every_placement_published(tiny_config: Any, tmp_path: Path, experts: bool) -> None:
    for name in PLACEMENTS:
        published(tmp_path, name, tiny_config(placement=name, **(EXPERTS if experts else LAYERNORM)))
    assert hold(tmp_path) == sorted(PLACEMENTS)


def test_a_placement_of_ones_own_is_published_from_its_file(tiny_config: Any, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "add_a_placement.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "ffn_first.py").write_text(code)
    try:
        runpy.run_path(str(tmp_path / "ffn_first.py"))
        published(tmp_path, "own", tiny_config(placement="ffn_first"))
    finally:
        PLACEMENTS.pop("ffn_first", None)
    assert hold(tmp_path) == ["own"]
    text = (tmp_path / "own" / "modeling_spannorm.py").read_text(encoding="utf-8")
    assert "class FFNFirst(Placement)" in text and "register_placement" not in text


def test_a_placement_without_a_file_is_refused(tiny_config: Any, tmp_path: Path, monkeypatch: Any) -> None:
    scope: dict[str, Any] = {"Placement": spannorm.Placement, "__name__": "elsewhere"}
    exec("class Typed(Placement):\n final_norm = True\n def block(self, x, attn, ffn):\n  return x", scope)
    monkeypatch.setitem(PLACEMENTS, "typed", scope["Typed"])
    SpanNormForCausalLM(tiny_config(placement="typed")).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"source of the placement Typed is not to be found.*--import"):
        publish(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and not (tmp_path / "model" / "published").exists()


@pytest.mark.parametrize(
    ("helper", "refused"),
    [
        ("import torch.nn.functional as F\ndef _mean(x):\n    return F.relu(x)", ""),  # our own `_mean` is another
        ("import yaml\ndef _mean(x):\n    return yaml and x", "imports yaml"),
        ("from own_helper import _mean", "imports own_helper"),
        ("def _mean(x):\n    from spannorm.norms import Add\n    return x", "imports spannorm.norms inside"),
    ],
)
def test_a_file_of_ones_own_brings_what_it_uses_or_is_refused(
    tmp_path: Path, monkeypatch: Any, helper: str, refused: str
) -> None:
    own = "class Own(spannorm.Placement):\n    final_norm = True\n\n    def block(self, x, attn, ffn):"
    own = f"import spannorm\n{helper}\n{own}\n        return x + ffn(_mean(attn(x)))\n"
    (tmp_path / "my-own.py").write_text(own)
    (tmp_path / "own_helper.py").write_text("def _mean(x):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PLACEMENTS, "own", runpy.run_path(str(tmp_path / "my-own.py"))["Own"])
    if refused:
        with pytest.raises(InputError, match=f"cannot write my-own.py into one file: .*{refused}"):
            model_file("own")
        return
    monkeypatch.setitem(sys.modules, "published", types.ModuleType("published"))
    there = sys.modules["published"].__dict__
    exec(model_file("own"), there)
    assert "routing_mean" in there and there["PLACEMENTS"]["own"].__bases__ == (there["Placement"],)
    x = torch.randn(1, 2, 4)
    placement = there["Stack"]("own", 1).block(0, 4)
    assert torch.equal(placement(x, torch.tanh, torch.sin), x + torch.sin(torch.relu(torch.tanh(x))))


def test_with_spannorm_imported_its_own_classes_open_the_folder(tiny_config: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    SpanNormForCausalLM(tiny_config()).save_pretrained(tmp_path)
    folder = publish(tmp_path)
    assert folder == str(tmp_path / "published")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is SpanNormForCausalLM
    assert publish(tmp_path) == folder  # ours may be written again
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_what_cannot_be_published_is_refused_and_nothing_is_overwritten(tiny_config: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**sizes))
    llama.save_pretrained(tmp_path / "llama")
    spannorm.rewire(llama, "span")
    llama.save_pretrained(tmp_path / "rewired")
    SpanNormModel(tiny_config()).save_pretrained(tmp_path / "body")
    (tmp_path / "empty").mkdir()
    for folder, words in (("llama", "type 'llama'"), ("rewired", "a rewired model"), ("empty", "neither a run nor a")):
        with pytest.raises(InputError, match=words):
            publish(tmp_path / folder)
        assert not (tmp_path / folder / "published").exists()
    for taken in (tmp_path / "llama", tmp_path / "body"):
        before = {p.name: p.read_bytes() for p in taken.iterdir()}
        with pytest.raises(InputError, match="holds something else than a published model"):
            publish(tmp_path / "body", str(taken))
        assert {p.name: p.read_bytes() for p in taken.iterdir()} == before
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else than a published model"):
        publish(tmp_path / "body", str(tmp_path / "note.txt"))
    assert (tmp_path / "note.txt").read_text() == "mine"
    assert "AutoModel.from_pretrained" in (Path(publish(tmp_path / "body")) / "README.md").read_text()


def test_a_runs_card_says_what_made_it(recipe: Recipe, tokens: TokenData, tmp_path: Path) -> None:
    result = train(recipe, tmp_path / "run", data=tokens.directory)
    ran = subprocess.run(
        [sys.executable, "-m", "spannorm", "publish", str(tmp_path / "run"), "--to", str(tmp_path / "tiny-model")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{tmp_path / 'tiny-model'}\n", "")
    names = {p.name for p in (tmp_path / "tiny-model").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "modeling_spannorm.py",
                     "tokenizer.json", "README.md", "curves.png", "init_receipt.txt", "published.json"}  # fmt: skip
    card = (tmp_path / "tiny-model" / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "transformers" and "spannorm" in front["tags"]
    assert f"| validation loss (nats per token) | {result['val_loss']:.4f} |" in card
    assert tokens.sha256 in card and "no mismatches" in card and "# tiny-model" in card
    assert str(tmp_path) not in card and str(tokens.recipe.corpus) not in card
    (shown,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert yaml.safe_load(shown)["train"]["learning_rate"] == recipe.train.learning_rate
    for target in re.findall(r"\]\(([^)]+)\)", card):
        assert (tmp_path / "tiny-model" / target).is_file(), target
    # the snippet runs as printed, on the folder
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(snippet.replace("FOLDER_OR_NAME", str(tmp_path / "tiny-model")), {})
    assert json.loads((tmp_path / "tiny-model" / "published.json").read_text())["data_sha256"] == tokens.sha256


class Hub:
    """What HfApi does, in memory."""

    def __init__(self, repositories: dict[str, set[str]]) -> None:
        self.repositories, self.private = repositories, {}

    def repo_exists(self, name: str) -> bool:
        return name in self.repositories

    def file_exists(self, name: str, file: str) -> bool:
        return file in self.repositories[name]

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private[name] = private
        self.repositories.setdefault(name, set())

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.repositories[repo_id] |= {p.name for p in Path(folder_path).iterdir()}


def test_it_uploads_when_it_is_told_to_and_never_over_somebody_elses(
    tiny_config: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    SpanNormForCausalLM(tiny_config()).save_pretrained(tmp_path)
    hub = Hub({"me/other": {"README.md"}})
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    publish(tmp_path)
    assert hub.private == {}
    assert publish(tmp_path, "hub:me/model") == "https://huggingface.co/me/model"
    publish(tmp_path, "hub:me/model", private=False)
    publish(tmp_path, "hub:me/open", private=False)
    assert hub.private == {"me/model": False, "me/open": False}
    assert hub.repositories["me/model"] == {p.name for p in (tmp_path / "published").iterdir()}
    with pytest.raises(InputError, match=r"me/other on the Hub holds something else"):
        publish(tmp_path, "hub:me/other")
    assert hub.repositories["me/other"] == {"README.md"}


def test_without_a_network_one_message_says_so(tiny_config: Any, tmp_path: Path) -> None:
    SpanNormForCausalLM(tiny_config()).save_pretrained(tmp_path)  # the tests run with HF_HUB_OFFLINE=1
    with pytest.raises(InputError, match=r"cannot upload to me/model on the Hub .*--to FOLDER"):
        publish(tmp_path, "hub:me/model")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("branch", [False, True])
def test_the_published_dispatch_is_the_packages_without_triton(bias: bool, branch: bool) -> None:
    x, f, w, b = torch.randn(3, 5), torch.randn(3, 5), torch.randn(5), torch.randn(5)
    for inference in (False, True):
        given = (x, f if branch else None, w, b if bias else None)
        both = [each(*given, eps=1e-6, skip=0.5, branch=2.0, return_sum=True, inference=inference)
                for each in (add_norm, plain.add_norm)]  # fmt: skip
        assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
    with pytest.raises(InputError, match="one shape"):
        plain.add_norm(x, f[:2], w, eps=1e-6)
