"""lm-eval scores our models: held against log-likelihoods from the logits and against lm-eval's own model class."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import spannorm
from spannorm.errors import InputError
from spannorm.evaluate.questions import bracket_matching, identifier_cloze
from spannorm.evaluate.tasks import PAPER, LocalText, load_tasks, write_task_files
from spannorm.models import SpanNormForCausalLM
from spannorm.train.data import TokenData
from spannorm.train.recipe import DataRecipe
from spannorm.train.tokenizer import load_tokenizer

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'spannorm[eval]'")

from spannorm.evaluate.harness import Harness, evaluate

CONTEXT = 64


@pytest.fixture
def model(tiny_config) -> SpanNormForCausalLM:
    return SpanNormForCausalLM(tiny_config(vocab_size=257, eos_token_id=256, max_position_embeddings=CONTEXT)).eval()


@pytest.fixture
def tokenizer(tokens: TokenData):
    return tokens.tokenizer()


def asked(*pairs: tuple[str, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair, task_name="test") for pair in pairs]


def direct(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """log P(continuation | context), token by token, each given what stands before it as far as that fits."""
    logprob, greedy = 0.0, True
    whole = context + continuation
    for place in range(len(context), len(whole)):
        # a window is fixed by the continuation's piece: its last token is the window's last prediction
        piece = (place - len(context)) // CONTEXT
        end = min(len(whole), len(context) + (piece + 1) * CONTEXT)
        seen = whole[max(0, end - 1 - CONTEXT) : place]
        with torch.no_grad():
            logits = model(torch.tensor([seen])).logits[0, -1].double()
        logprob += logits.log_softmax(-1)[whole[place]].item()
        greedy &= int(logits.argmax()) == whole[place]
    return logprob, greedy


def test_a_byte_models_log_likelihoods_are_those_of_its_logits(model, tokenizer):
    pairs = [
        ("def f(x):", " return x"),
        ("a", "bc"),
        ("größe = ", "naïve"),  # the space goes over to the continuation, as lm-eval has it
        ("", "no context: the end-of-document token stands there"),
        ("x" * 100, "yz"),  # cut on the left
        ("short", "w" * 150),  # longer than the model's context: three pieces
        ("f(a", ")"), ("f(a", "]"), ("f(a", "}"),  # one forward pass serves the three
    ]  # fmt: skip
    harness = Harness(model, tokenizer, batch_size=4)
    found = harness.loglikelihood(asked(*pairs))
    assert harness.cut == 2
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        trailing = context[len(context.rstrip()) :]
        before = list(context.rstrip().encode()) or [256]
        want, best = direct(model, before, list((trailing + continuation).encode()))
        assert logprob == pytest.approx(want, abs=2e-4, rel=1e-5) and greedy == best


def test_what_a_model_would_write_itself_is_greedy(model, tokenizer):
    ids = torch.tensor([list(b"def f(x")])
    written = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
    harness = Harness(model, tokenizer, batch_size=4)
    scored = harness._loglikelihood_tokens([(None, ids[0].tolist(), written), (None, ids[0].tolist(), [7, 8, 9])])
    assert [greedy for _, greedy in scored] == [True, False]


def test_a_rolling_log_likelihood_predicts_every_byte_once(model, tokenizer):
    text = "".join(random.Random(0).choices("abc (){}\n", k=150))
    ids = list(text.encode())
    want = 0.0
    for start in range(0, len(ids), CONTEXT):
        piece = ids[start : start + CONTEXT]
        end = start + len(piece)
        whole = [256, *ids][max(0, end - CONTEXT) : end + 1]  # as much before it as the context holds
        with torch.no_grad():
            logits = model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        want += sum(logits[-len(piece) + i, token].item() for i, token in enumerate(piece))
    harness = Harness(model, tokenizer, batch_size=2)
    (found,) = harness.loglikelihood_rolling(asked((text,)), disable_tqdm=True)
    assert found == pytest.approx(want, rel=1e-5) and harness.cut == 0


def test_a_hugging_face_model_and_tokenizer_score_as_lm_eval_loads_them(corpus, tmp_path):
    from lm_eval.models.huggingface import HFLM

    recipe = DataRecipe(tokenizer="bpe", vocab_size=400)
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())[:3]]
    load_tokenizer(recipe, lambda: iter(texts)).save_pretrained(tmp_path)
    config = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=CONTEXT)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    theirs = HFLM(pretrained=str(tmp_path), device="cpu", batch_size=4)
    ours = Harness(LlamaForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path), batch_size=4)
    cuts = [t.index(" ", at) for t in texts for at in (60, 300)]
    pairs = [(t[max(0, at - n) : at], t[at : at + n]) for t in texts for at in cuts for n in (5, 40) if t[at] == " "]
    found, want = (lm.loglikelihood(asked(*pairs), disable_tqdm=True) for lm in (ours, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in want]
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in want], rel=1e-5)
    rolled, should = (lm.loglikelihood_rolling(asked((texts[0][:700],)), disable_tqdm=True) for lm in (ours, theirs))
    assert rolled == pytest.approx(should, rel=1e-5)


@pytest.fixture(scope="module")
def text(corpus: Path) -> LocalText:
    texts = [path.read_text(encoding="utf-8") for path in sorted(corpus.iterdir())]
    return LocalText(texts, CONTEXT, 60)


class Oracle(torch.nn.Module):
    """Knows a text by heart: after any part of it that it sees, it puts its certainty on the byte that follows."""

    def __init__(self, known: str) -> None:
        super().__init__()
        self.known, self.weight = known.encode(), torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=CONTEXT, model_type="oracle")
        self.device = torch.device("cpu")

    def tie_weights(self) -> None: ...

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*ids.shape, 257)
        for row, sequence in enumerate(ids.tolist()):
            for place in range(1, len(sequence) + 1):
                seen = bytes(min(i, 255) for i in sequence[:place])
                at = self.known.find(seen) + len(seen)
                if len(seen) > 12 and at >= len(seen) and at < len(self.known):
                    logits[row, place - 1, self.known[at]] = 9.0
        return SimpleNamespace(logits=logits)


def test_who_knows_the_text_answers_right_and_who_knows_nothing_guesses(text, model, tokenizer):
    tasks = load_tasks(["local"], text)
    right = evaluate(Oracle("\n".join(text.documents)), tokenizer, tasks)
    for name in ("identifier_cloze", "bracket_matching"):
        assert right[name]["metrics"]["acc"]["value"] > 0.9, name  # what stands twice in the text may go on otherwise
    scores = evaluate(model, tokenizer, load_tasks(["local"], text))
    for name, chance in (("identifier_cloze", 1 / 4), ("bracket_matching", 1 / 3)):
        score = scores[name]
        acc, n = score["metrics"]["acc"], score["questions"]
        assert score["chance"] == pytest.approx(chance) and score["cut"] == 0
        assert acc["value"] == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / n))
        # the standard error of a mean of n zeros and ones (n − 1), by hand
        assert acc["stderr"] == pytest.approx(math.sqrt(acc["value"] * (1 - acc["value"]) / (n - 1)))


def test_a_limit_takes_so_many_questions_and_training_mode_is_left_as_it_was(text, model, tokenizer):
    model.train()
    scores = evaluate(model, tokenizer, load_tasks(["identifier_cloze"], text), limit=5)
    assert scores["identifier_cloze"]["questions"] == 5 and model.training


def test_the_task_files_ask_lm_eval_the_same_questions(text, model, tokenizer, tmp_path, monkeypatch):
    import datasets
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ours = load_tasks(["local"], text)
    for name, make in (("identifier_cloze", identifier_cloze), ("bracket_matching", bracket_matching)):
        write_task_files(tmp_path, name, make(text.documents, text.questions, text.characters))
        (theirs,) = TaskManager(include_defaults=False).load([str(tmp_path / f"{name}.yaml")])["tasks"].values()
        assert list(theirs.test_docs()) == list(ours[name].test_docs())
        assert (
            evaluate(model, tokenizer, {name: theirs})[name]["metrics"]
            == (evaluate(model, tokenizer, {name: ours[name]})[name]["metrics"])
        )


def test_no_token_of_any_tokenizer_reaches_over_the_end_of_a_context(text):
    """Else lm-eval would split the answer's tokens off at the wrong place, or have none left to score."""
    bpe = load_tokenizer(DataRecipe(tokenizer="bpe", vocab_size=2000), lambda: iter(text.documents))
    tasks = load_tasks(["local"], LocalText(text.documents, CONTEXT, 200))
    pairs = [(q["context"], choice) for t in tasks.values() for q in t.test_docs() for choice in q["choices"]]
    joined = 0
    for context, choice in pairs:
        whole, before = bpe.encode(context + choice), bpe.encode(context)
        assert whole[: len(before)] == before and len(whole) > len(before)
        joined += len(bpe.encode(choice[:-1])) + 1 != len(bpe.encode(choice))
    assert joined  # a split right before the answer would fall into a token


def test_what_cannot_be_loaded_is_one_clear_error(text):
    for name in PAPER:
        with pytest.raises(InputError, match=rf"the data of the task {name} is neither .* Hub"):
            load_tasks([name], None)
    with pytest.raises(InputError, match=r"no task is named: give local, paper"):
        load_tasks([], None)


@pytest.mark.slow  # reads every definition that lm-eval has
def test_unknown_tasks_name_the_nearest(text):
    with pytest.raises(InputError, match=r"'bracket_machting': did you mean 'bracket_matching'\? Known: local, paper"):
        load_tasks(["bracket_machting"], text)
    with pytest.raises(InputError, match=r"unknown task 'mmlu_anatmy': did you mean 'mmlu_anatomy'\?"):
        load_tasks(["mmlu_anatmy"], None)


def test_a_task_of_lm_eval_runs_on_data_that_is_on_the_machine(model, tokenizer, tmp_path, monkeypatch):
    """SciQ by lm-eval's own definition; its data set of three questions lies where `datasets` looks first."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    os.makedirs("allenai/sciq")
    for split in ("train", "validation", "test"):
        rows = [
            {"question": f"What is {i}?", "distractor1": "a stone", "distractor2": "a tree", "distractor3": "a cloud",
             "correct_answer": f"number {i}", "support": "Long ago. " * 9}
            for i in range(3)
        ]  # fmt: skip
        Path(f"allenai/sciq/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = evaluate(model, tokenizer, load_tasks(["sciq"], None))["sciq"]
    assert scores["questions"] == 3 and scores["chance"] == 0.25 and set(scores["metrics"]) == {"acc", "acc_norm"}
    assert scores["cut"] == 12 and "questions_sha256" not in scores  # each of twelve requests is above 64 bytes


def test_a_rewired_model_is_scored_like_any_other(tokenizer, text):
    config = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=CONTEXT)  # fmt: skip
    rewired = LlamaForCausalLM(config).eval()
    spannorm.rewire(rewired, "span")
    (found,) = Harness(rewired, tokenizer, batch_size=1).loglikelihood(asked(("def f", "(x):")))
    assert found[0] == pytest.approx(direct(rewired, list(b"def f"), list(b"(x):"))[0], rel=1e-5)
