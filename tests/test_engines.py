"""The pages for Megatron-Core and OLMo-core run, and compute what the library computes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import spannorm

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, LAYERS = 32, 3


def pasted(page: str) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": page}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries say when they are imported without a GPU
        exec(compile(code, page, "exec"), names)
    return names


def span(x: Tensor, attentions: list[Callable], ffns: list[Callable], norms: dict[str, nn.Parameter]) -> Tensor:
    """Our placement around somebody else's sublayers, with their gains."""
    placements = spannorm.Stack("span", LAYERS, eps=1e-6).blocks(WIDTH)
    for b, placement in enumerate(placements):
        for name in placement.norms():
            getattr(placement, name).weight = norms[f"{b}.{name}"]
        x = placement(x, attentions[b], ffns[b])
    return x


def assert_equal(theirs: Tensor, ours: Tensor, parameters: list[nn.Parameter]) -> None:
    assert torch.allclose(theirs, ours, atol=2e-6)
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    left, right = (torch.autograd.grad((y * weights).sum(), parameters) for y in (theirs, ours))
    for a, b in zip(left, right, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-6


@pytest.fixture
def one_gloo_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_megatron_cores_page_is_span(one_gloo_process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))  # where its buffers are made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core")
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import GPTModel
        from megatron.core.transformer import TransformerConfig
    page = pasted("megatron.md")
    no_rng = SimpleNamespace(fork=nullcontext)  # CUDA's, for a dropout that is 0
    monkeypatch.setattr(tensor_parallel, "get_cuda_rng_tracker", lambda: no_rng)
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=WIDTH, num_attention_heads=4, ffn_hidden_size=64, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=nn.functional.silu, add_bias_linear=False, layernorm_epsilon=1e-6,
        use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, **page["scale_init"](LAYERS),
    )  # fmt: skip
    model = GPTModel(
        config, page["span_spec"](LAYERS), vocab_size=257, max_sequence_length=16,
        position_embedding_type="learned_absolute", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    layers, mask = list(model.decoder.layers), torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    x = torch.randn(16, 2, WIDTH)
    norms = {"0.initial_norm": layers[0].input_layernorm.weight}
    for b, layer in enumerate(layers):
        for name in ("attn_norm", "ffn_norm"):
            norms[f"{b}.{name}"] = nn.init.uniform_(getattr(layer, name).weight, 0.5, 2.0)
    attentions = [lambda y, a=layer.self_attention: a(y, attention_mask=mask)[0] for layer in layers]
    theirs = model.decoder(hidden_states=x, attention_mask=mask)
    ours = span(x, attentions, [lambda y, f=layer.mlp: f(y)[0] for layer in layers], norms)
    assert_equal(theirs, ours, list(model.decoder.parameters()))
    down = layers[1].mlp.linear_fc2.weight
    assert down.std().item() == pytest.approx((LAYERS * 64) ** -0.5, rel=0.1)
    parallel_state.destroy_model_parallel()


@pytest.mark.filterwarnings("ignore")
def test_olmo_cores_page_is_span() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("olmo_core")
        from olmo_core.nn.transformer import TransformerConfig
    page = pasted("olmo_core.md")
    plain = TransformerConfig.llama_like(d_model=WIDTH, vocab_size=257, n_layers=LAYERS, n_heads=4, layer_norm_eps=1e-6)
    model = page["with_span"](plain).build()
    model.init_weights(device=torch.device("cpu"), max_seq_len=16)
    page["init_"](model)
    blocks = [model.blocks[str(b)] for b in range(LAYERS)]
    ids = torch.randint(0, 257, (2, 16))
    norms = {"0.initial_norm": blocks[0].initial_norm.weight}
    for b, block in enumerate(blocks):
        for ours, theirs in (("attn_norm", "attention_norm"), ("ffn_norm", "feed_forward_norm")):
            norms[f"{b}.{ours}"] = nn.init.uniform_(getattr(block, theirs).weight, 0.5, 2.0)
    y = span(model.embeddings(ids), [b.attention for b in blocks], [b.feed_forward for b in blocks], norms)
    assert_equal(model(ids), model.lm_head.w_out(y), list(model.parameters()))
    assert not isinstance(blocks[1].initial_norm, type(blocks[0].initial_norm))
    out = blocks[1].feed_forward.w2
    assert out.weight.std().item() == pytest.approx((LAYERS * out.in_features) ** -0.5, rel=0.1)
