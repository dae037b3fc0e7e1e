"""A factor in the forward pass and the same factor on init and learning rate are one function under Adam.

With the effective output matrix E = c·W: under the forward rule Adam moves W by η·u, u free of the gradient's scale,
so E moves by c·η·u; the twin holds E itself, drawn c times smaller, and moves it with the rate c·η. Decay takes
η·λ of each: (c·η)·(λ/c). This needs ε → 0 and no clipping.
"""

from __future__ import annotations

import pytest
import torch
from arms import FULL
from facts import FACTS
from torch import Tensor, nn

from spannorm.init import parameter_groups
from spannorm.models import SpanNormForCausalLM
from spannorm.placements import PLACEMENTS

STEPS, RATE, DECAY, DEPTH = 6, 3e-3, 0.1, 4
FACTOR = {"1/sqrt(L)": 0.5, "1/sqrt(L):ffn": 0.5, "1/sqrt(2L)": 8**-0.5, "1/L": 0.25, "1/L:ffn": 0.25}


def train(model: SpanNormForCausalLM, grouped: bool = True) -> tuple[Tensor, Tensor]:
    """The losses of a few steps of AdamW in float64, and the logits after them."""
    if grouped:
        groups = parameter_groups(model, learning_rate=RATE, weight_decay=DECAY)
    else:
        groups = [{"params": list(model.parameters()), "lr": RATE, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-40)
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randint(37, (4, 12), generator=data)
        logits = model(x).logits
        # taken here, because the model's own loss is computed in fp32
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return torch.stack(losses), model(torch.arange(12).unsqueeze(0)).logits


# A norm between the output matrix and the skip undoes a factor on the matrix: there, and only there, it is no twin.
NORMED_OUTPUT = [name for name, fact in FACTS.items() if fact.output_norms]
TWINS = [(p, rule) for p in PLACEMENTS for rule in (FACTOR if p in FULL else ["1/sqrt(2L)"])]


@pytest.mark.filterwarnings("ignore:LayerNormScaling with depth rule '1/sqrt")
@pytest.mark.parametrize(
    ("placement", "rule"),
    [*(t for t in TWINS if t[0] not in NORMED_OUTPUT), ("normformer", "1/sqrt(L):ffn")],
)
def test_forward_and_init_with_learning_rate_are_the_same_function(tiny_config, placement, rule):
    forward, twin = (
        SpanNormForCausalLM(tiny_config(placement=placement, num_hidden_layers=DEPTH, depth_rule=rule + where)).double()
        for where in (":forward", ":init+lr")
    )

    def c(name: str) -> float:
        outputs = ("down_proj.weight",) if ":ffn" in rule else ("down_proj.weight", "o_proj.weight")
        return FACTOR[rule] if name.endswith(outputs) else 1.0

    for name, weight in forward.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name), c(name) * weight, rtol=1e-6, atol=0)
        # draws are fp32, so a factor that is no power of two is rounded: start from the same numbers
        twin.get_parameter(name).data.copy_(c(name) * weight)
    losses, logits = train(forward)
    twin_losses, twin_logits = train(twin)

    assert (losses[0] - losses[-1]).abs() > 1e-2, "the model must have moved for the equality to say something"
    torch.testing.assert_close(twin_losses, losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(twin_logits, logits, rtol=1e-9, atol=1e-9)
    for name, weight in forward.named_parameters():
        torch.testing.assert_close(twin.get_parameter(name), c(name) * weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", NORMED_OUTPUT)
def test_a_norm_on_the_branchs_output_undoes_the_init_factor_and_keeps_the_forward_one(tiny_config, placement):
    tokens, stream = torch.arange(12).unsqueeze(0), torch.randn(1, 12, 16, dtype=torch.float64)
    moved = {}
    for rule in ("none", "1/L", "1/L:forward"):
        model = SpanNormForCausalLM(tiny_config(placement=placement, depth_rule=rule)).double().eval().model
        layer, rope = model.layers[1], model.rotary_emb(stream, tokens)
        for module in layer.placement.children():
            module.eps = 0.0  # so that the factor is undone to the last digit
        if placement != "normformer":  # silence the FFN's branch: here by its gain, there by what it returns
            nn.init.zeros_(getattr(layer.placement, "ffn_output_norm", layer.placement.ffn_norm).weight)

        def attn(y: Tensor, layer=layer, rope=rope) -> Tensor:
            return layer.self_attn(hidden_states=y, position_embeddings=rope, attention_mask=None)[0]

        with torch.no_grad():
            moved[rule] = layer.placement(stream, attn, torch.zeros_like if placement == "normformer" else torch.tanh)
            # block 1's two sums are the third and the fourth: √(3/4)·√(4/5)
            moved[rule] -= 0.6**0.5 * stream if placement == "averaged" else stream
    torch.testing.assert_close(moved["1/L"], moved["none"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved["1/L:forward"], moved["none"] / 3, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", FACTOR)
def test_an_init_factor_alone_is_the_same_function_before_the_first_step_and_not_after(tiny_config, rule):
    forward, plain = (
        train(SpanNormForCausalLM(tiny_config(num_hidden_layers=DEPTH, depth_rule=name)).double())
        for name in (f"{rule}:forward", rule)
    )
    torch.testing.assert_close(plain[0][0], forward[0][0], rtol=1e-7, atol=1e-7)
    assert (plain[0][1] - forward[0][1]).abs() > 1e-4
    assert (plain[1] - forward[1]).abs().max() > 1e-2


def test_the_twin_needs_its_groups(tiny_config):
    # One rate and one decay for all is the plain-init run under another name.
    config = tiny_config(num_hidden_layers=DEPTH, depth_rule="1/L:init+lr")
    grouped, ungrouped = (train(SpanNormForCausalLM(config).double(), grouped=g)[0] for g in (True, False))
    assert (grouped - ungrouped).abs().max() > 1e-3
