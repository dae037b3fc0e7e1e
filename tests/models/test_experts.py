"""Mixtures of experts: what they compute, against a loop over tokens, the dense model and Transformers' Qwen3-MoE."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from arms import FULL_RULES, init_factor, rate_factor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from spannorm.errors import InputError
from spannorm.init import parameter_groups
from spannorm.models import SpanNormForCausalLM
from spannorm.models.experts import MixtureOfExperts
from spannorm.placements import PLACEMENTS
from spannorm.scaling import depth_rule

EXACT = {"rtol": 1e-10, "atol": 1e-10}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
placements = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture
def moe_config(tiny_config):
    return lambda **overrides: tiny_config(**{**EXPERTS, **overrides})


def ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(37, (batch, length))


def randomized(model: nn.Module) -> nn.Module:
    """Norms that are not what they start as."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


def exact(model: SpanNormForCausalLM) -> SpanNormForCausalLM:
    model.set_experts_implementation("eager")  # PyTorch's grouped_mm has no float64
    return model.double()


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, norm=lambda z: z) -> Tensor:
    return down @ norm(F.silu(gate @ x) * (up @ x))


def by_token(moe: MixtureOfExperts, x: Tensor, *, k: int, renormalized: bool, norm: str) -> Tensor:
    """The definition, one token and one expert at a time."""
    w = dict(moe.named_parameters())
    inner = "experts.down_norm.weight" in w

    def inside(e: int):
        def apply(z: Tensor) -> Tensor:
            gain = w["experts.down_norm.weight"][e]
            if norm == "rmsnorm":
                return z / (z.square().mean() + 1e-6).sqrt() * gain
            z = z - z.mean()
            return z / (z.square().mean() + 1e-6).sqrt() * gain + w["experts.down_norm.bias"][e]

        return apply if inner else lambda z: z

    outputs = []
    for token in x.flatten(0, 1):
        p = (w["gate.weight"] @ token).exp()
        p = p / p.sum()
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[:k]
        total = sum(p[e] for e in chosen) if renormalized else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            gate, up = w["experts.gate_up_proj"][e].chunk(2)
            y = y + p[e] / total * swiglu(token, gate, up, w["experts.down_proj"][e], inside(e))
        if "shared_expert.gate_proj.weight" in w:
            y = y + moe.shared_expert(token[None, None])[0, 0]
        outputs.append(y)
    return torch.stack(outputs).view_as(x)


@pytest.mark.parametrize(("k", "renormalized"), [(1, False), (2, False), (2, True), (5, False), (5, True)])
@pytest.mark.parametrize(("placement", "norm"), [("span", "rmsnorm"), ("subln", "rmsnorm"), ("subln", "layernorm")])
def test_a_mixture_is_the_loop_over_tokens_in_outputs_and_gradients(moe_config, k, renormalized, placement, norm):
    config = moe_config(
        num_experts_per_tok=k,
        norm_topk_prob=renormalized,
        placement=placement,
        norm=norm,
        shared_expert_intermediate_size=10,
    )
    model = exact(randomized(SpanNormForCausalLM(config)))
    moe, x = model.model.layers[1].mlp, torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    assert isinstance(moe, MixtureOfExperts)
    inputs = [x, *moe.parameters()]
    probe = torch.randn_like(x)
    results = []
    for y in (moe(x), by_token(moe, x, k=k, renormalized=renormalized, norm=norm)):
        results.append([y, *torch.autograd.grad((y * probe).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def mean_square_weight(experts: int) -> float:
    """E[w₁² + w₂²] of the two highest of E independent N(0, 1) logits, renormalized: they are σ(±Δ), Δ their gap, of
    density E(E−1)·∫φ(x)φ(x+Δ)Φ(x)^(E−2) dx."""
    x, gap = torch.linspace(-8, 8, 801).double(), torch.linspace(0, 10, 501).double()

    def phi(t: Tensor) -> Tensor:
        return (-t * t / 2).exp() / math.sqrt(2 * math.pi)

    below = (0.5 * (1 + torch.erf(x / math.sqrt(2)))) ** (experts - 2)
    density = experts * (experts - 1) * torch.trapezoid(phi(x) * phi(x + gap[:, None]) * below, x, dim=1)
    assert torch.trapezoid(density, gap).item() == pytest.approx(1.0, abs=1e-3)
    return 0.5 * (1 + torch.trapezoid(density * (gap / 2).tanh() ** 2, gap).item())


@torch.no_grad()
@pytest.mark.parametrize("experts", [8, 32])
def test_at_init_a_mixtures_variance_is_the_mean_square_weight_times_an_experts(moe_config, experts):
    # v_f = E[silu(z)²] = 0.35578 of a SwiGLU with fan-in init; experts are uncorrelated
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": experts, "num_hidden_layers": 1}
    variances = []
    for seed in range(4):
        model = SpanNormForCausalLM(moe_config(**sizes, depth_rule="none", init_seed=seed))
        x = F.rms_norm(torch.randn(1, 1024, 128), (128,))
        variances.append(model.model.layers[0].mlp(x).square().mean().item())
    assert sum(variances) / 4 == pytest.approx(0.35578 * mean_square_weight(experts), rel=0.03)


@pytest.mark.parametrize("shared", [None, 10])
@pytest.mark.parametrize("placement", ["span", "subln"])
def test_implementations_of_experts_agree_in_outputs_and_gradients(moe_config, placement, shared):
    config = moe_config(placement=placement, shared_expert_intermediate_size=shared)
    model, x = randomized(SpanNormForCausalLM(config)), ids()
    assert model.config._experts_implementation == "grouped_mm", "the default"
    results = []
    for how in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(how)
        assert {m.config._experts_implementation for m in model.modules() if hasattr(m, "config")} == {how}
        model.zero_grad()
        out = model(x, labels=x)
        out.loss.backward()
        results.append([out.logits, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)


def test_an_implementation_that_does_not_know_the_norm_inside_is_refused(moe_config):
    model = SpanNormForCausalLM(moe_config(placement="subln"))
    model.config._experts_implementation = "deepgemm"
    with pytest.raises(InputError, match=r"norm inside run as 'eager', 'grouped_mm' or 'batched_mm'; got 'deepgemm'"):
        model(ids())


@placements
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_one_expert_is_the_dense_model(tiny_config, placement, norm):
    options = {"placement": placement, "norm": norm, "qk_norm": True}
    dense = randomized(SpanNormForCausalLM(tiny_config(**options))).double()
    one = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "router_aux_loss_coef": 0.0}
    moe = exact(SpanNormForCausalLM(tiny_config(**options, **one)))
    state = {}
    for name, value in dense.state_dict().items():
        if name.endswith("gate_proj.weight"):
            up = dense.state_dict()[name.replace("gate_proj", "up_proj")]
            name, value = name.replace("gate_proj.weight", "experts.gate_up_proj"), torch.cat([value, up])[None]
        elif name.endswith("down_proj.weight"):
            name, value = name.replace("down_proj.weight", "experts.down_proj"), value[None]
        elif "ffn_down_norm" in name:
            name, value = name.replace("ffn_down_norm", "experts.down_norm"), value[None]
        if not name.endswith("up_proj.weight"):
            state[name] = value
    missing, unexpected = moe.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("mlp.gate.weight") for name in missing)
    x = ids()
    a, b = dense.train()(x, labels=x), moe.train()(x, labels=x)
    torch.testing.assert_close(a.logits, b.logits, **EXACT)
    a.loss.backward()
    b.loss.backward()
    for name in state:
        if "mlp" not in name:
            torch.testing.assert_close(dense.get_parameter(name).grad, moe.get_parameter(name).grad, **EXACT)
    # which experts a token goes to is no choice
    assert b.aux_loss.item() == pytest.approx(3.0, abs=1e-6), "1 from each of three layers"


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("renormalized", [False, True])
def test_prenorm_computes_what_transformers_qwen_3_moe_computes(moe_config, step, renormalized):
    config = moe_config(placement="pre", qk_norm=True, norm_topk_prob=renormalized, decoder_sparse_step=step)
    ours = randomized(SpanNormForCausalLM(config)).eval()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "norm_topk_prob", "decoder_sparse_step", *EXPERTS)
    sizes = {name: getattr(config, name) for name in names}
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=4, rms_norm_eps=1e-6, tie_word_embeddings=False))
    renamed = {
        "placement.attn_norm": "input_layernorm",
        "placement.ffn_norm": "post_attention_layernorm",
    }
    state = ours.state_dict()
    for a, b in renamed.items():
        state = {name.replace(a, b): value for name, value in state.items()}
    theirs.load_state_dict(state)
    x = ids()
    a, b = ours(x, labels=x, output_router_logits=True), theirs.eval()(x, labels=x, output_router_logits=True)
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-4, atol=1e-5)
    assert len(a.router_logits) == len(b.router_logits) == (3 if step == 1 else 1)
    torch.testing.assert_close(a.router_logits, b.router_logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@placements
def test_cached_and_uncached_generation_give_the_same_tokens(moe_config, placement):
    config = moe_config(placement=placement, shared_expert_intermediate_size=10, decoder_sparse_step=2)
    model = exact(SpanNormForCausalLM(config)).eval()
    x = ids()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(x), "pad_token_id": 0}
    cached, full = (model.generate(x, use_cache=cache, output_logits=True, return_dict_in_generate=True, **options)
                    for cache in (True, False))  # fmt: skip
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(cached.logits, full.logits, **EXACT)
    # router logits may be asked for, and no labels are needed
    assert model.generate(x, output_router_logits=True, **options).shape == (2, 17)


@placements
def test_a_saved_mixture_comes_back_exactly_with_a_clean_receipt(moe_config, tmp_path, placement):
    base = "xavier" if placement in ("subln", "deepnorm") else "fan_in"
    config = moe_config(placement=placement, base_init=base, shared_expert_intermediate_size=10, norm="layernorm")
    built = SpanNormForCausalLM(config)
    with torch.device("meta"):
        late = SpanNormForCausalLM(config)
    late.to_empty(device="cpu").init_weights_()
    built.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    for model in (built, late, again):
        assert not model.init_receipt().mismatches, model.init_receipt()
        for name, parameter in built.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name
    x = ids()
    assert torch.equal(again(x).logits, built.eval()(x).logits)


@pytest.mark.parametrize("rule", FULL_RULES)
@pytest.mark.parametrize("base_init", ["fan_in", "xavier", "normal"])
def test_a_depth_rule_reaches_every_expert_and_the_shared_one_and_leaves_the_router(moe_config, rule, base_init):
    depth = 27
    with torch.device("meta"):
        model = SpanNormForCausalLM(
            moe_config(
                depth_rule=rule, base_init=base_init, shared_expert_intermediate_size=10, num_hidden_layers=depth
            )
        )
    plan, b = model.init_plan(), 3

    def std(leaf: str, fan_in: int, fan_out: int) -> float:
        base = {"fan_in": fan_in**-0.5, "xavier": (2 / (fan_in + fan_out)) ** 0.5, "normal": 0.02}[base_init]
        return init_factor(rule, leaf, b, depth) * base

    at = f"model.layers.{b}.mlp"
    gate_up = plan[f"{at}.experts.gate_up_proj"]
    assert gate_up.fused[1] == pytest.approx((std("gate_proj", 16, 12), std("up_proj", 16, 12)))
    assert plan[f"{at}.experts.down_proj"].std == pytest.approx(std("down_proj", 12, 16))
    assert plan[f"{at}.shared_expert.gate_proj.weight"].std == pytest.approx(std("gate_proj", 16, 10))
    assert plan[f"{at}.shared_expert.up_proj.weight"].std == pytest.approx(std("up_proj", 16, 10))
    assert plan[f"{at}.shared_expert.down_proj.weight"].std == pytest.approx(std("down_proj", 10, 16))
    assert plan[f"{at}.gate.weight"].std == pytest.approx(std("router", 16, 5))
    worked = depth_rule(rule, depth, b)  # one parameter has one rate: no rule may tell gate from up
    for factors in (worked.learning_rate, worked.weight_decay, worked.eps):
        assert factors.get("ffn_gate", 1.0) == factors.get("ffn_up", 1.0)

    rates = {
        id(p): (g["lr"], g["weight_decay"])
        for g in parameter_groups(model, learning_rate=0.01, weight_decay=0.1)
        for p in g["params"]
    }
    leaves = {"experts.down_proj": "down_proj", "experts.gate_up_proj": "up_proj", "gate.weight": "gate"}
    for name, leaf in leaves.items():
        factor = rate_factor(rule, leaf, b, depth)
        decay = 0.1 if rule == "depth-mup" else 0.1 / factor
        assert rates[id(model.get_parameter(f"{at}.{name}"))] == pytest.approx((0.01 * factor, decay)), name


@pytest.mark.parametrize("half", [0, 1])
def test_the_receipt_finds_the_one_expert_that_was_forgotten(moe_config, half):
    model = SpanNormForCausalLM(moe_config(placement="deepnorm", num_experts=32))
    assert not model.init_receipt().mismatches
    name = "model.layers.1.mlp.experts.gate_up_proj"
    with torch.no_grad():  # DeepNorm's β taken off one matrix of 64
        model.get_parameter(name)[7].chunk(2)[half].mul_(24**0.25)
    (row,) = model.init_receipt().mismatches
    assert row.name == name
    assert row.std == pytest.approx(0.25, rel=0.2), "the row shows the matrix that is off"


@placements
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_activation_checkpointing_gives_identical_gradients(moe_config, placement, implementation):
    model, x = SpanNormForCausalLM(moe_config(placement=placement, router_z_loss_coef=0.1)).train(), ids()
    model.set_experts_implementation(implementation)
    model(x, labels=x).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.abs().max() > 0 for name, g in plain.items() if "gate.weight" in name)
    model.zero_grad()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model(x, labels=x, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, plain[name]), name


def test_checkpointing_that_would_lose_the_auxiliary_losses_is_refused(moe_config):
    model, x = SpanNormForCausalLM(moe_config()).train(), ids()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    with pytest.raises(InputError, match="use_reentrant=False"):
        model(x, labels=x, use_cache=False)


@pytest.mark.parametrize("experts", [8, 32, 128])
def test_many_experts_run_forward_and_backward(moe_config, experts):
    model, x = SpanNormForCausalLM(moe_config(num_experts=experts, num_experts_per_tok=8)).train(), ids()
    model(x, labels=x).loss.backward()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            hit = parameter.grad.flatten(1).abs().amax(1) > 0
            assert 8 <= hit.sum() <= experts, name


def test_the_sparse_step_says_which_layers_are_mixtures(moe_config):
    for step, sparse in ((1, [0, 1, 2]), (2, [1]), (3, [2])):
        model = SpanNormForCausalLM(moe_config(decoder_sparse_step=step))
        found = [i for i, layer in enumerate(model.model.layers) if isinstance(layer.mlp, MixtureOfExperts)]
        assert found == sparse


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_experts_per_tok": 6}, r"`num_experts_per_tok` \(6\) must lie in 1 … `num_experts` \(5\)"),
        ({"num_experts_per_tok": 0}, r"`num_experts_per_tok` must be at least 1; got 0"),
        ({"num_experts": -1}, r"`num_experts` must not be negative; got -1"),
        ({"moe_intermediate_size": 0}, r"`moe_intermediate_size` must be at least 1.*got 0.*dense model: 12"),
        ({"shared_expert_intermediate_size": 0}, r"`shared_expert_intermediate_size` must be at least 1; got 0"),
        ({"decoder_sparse_step": 4}, r"`decoder_sparse_step` \(4\) must lie in 1 … `num_hidden_layers` \(3\)"),
        ({"decoder_sparse_step": 0}, r"`decoder_sparse_step` must be at least 1; got 0"),
        ({"num_experts_per_tok": 1}, r"`norm_topk_prob`.*router would never learn.*set it to false"),
        ({"router_aux_scope": "seq"}, r"unknown router_aux_scope 'seq'.*Known: sequence, batch"),
        ({"router_aux_loss_coef": -0.1}, r"`router_aux_loss_coef` must not be negative; got -0.1"),
        ({"router_z_loss_coef": -1.0}, r"`router_z_loss_coef` must not be negative; got -1.0"),
    ],
)
def test_experts_that_cannot_be_are_refused_with_the_way_out(moe_config, given, message):
    with pytest.raises(InputError, match=message):
        moe_config(**given)


def test_a_checkpoint_of_the_other_kind_is_refused(tiny_config, moe_config, tmp_path):
    SpanNormForCausalLM(tiny_config()).save_pretrained(tmp_path / "dense")
    SpanNormForCausalLM(moe_config()).save_pretrained(tmp_path / "moe")
    with pytest.raises(InputError, match=r"asks for mixtures of experts where the checkpoint has none"):
        SpanNormForCausalLM.from_pretrained(tmp_path / "dense", **EXPERTS)
    with pytest.raises(InputError, match=r"asks for dense feed-forwards where the checkpoint has none"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "moe", num_experts=0)


COMPILE = """
import torch
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
torch.set_num_threads(1)
x = torch.randint(37, (2, 9))
for placement in ("span", "subln"):
    torch._dynamo.reset()
    model = SpanNormForCausalLM(SpanNormConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_experts=5, moe_intermediate_size=12, shared_expert_intermediate_size=10, placement=placement)).train()
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        out = run(x, labels=x)
        out.loss.backward()
        results.append([out.loss, out.aux_loss, out.logits, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    print("same", placement)
"""


def test_a_mixture_compiles_to_one_graph_with_the_same_losses_and_gradients():
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["same", "span", "same", "subln"]


@pytest.mark.parametrize("placement", ["span", "normformer"])
def test_a_float64_mixture_runs_on_the_backend_it_has_by_default(tiny_config, placement):
    config = tiny_config(placement=placement, num_experts=4, moe_intermediate_size=8)
    model = SpanNormForCausalLM(config).double()
    ids = torch.randint(0, 37, (2, 9))
    asked = model(ids, labels=ids).loss
    model.set_experts_implementation("eager")
    assert asked.dtype == torch.float64 and torch.equal(asked, model(ids, labels=ids).loss)
    asked.backward()
