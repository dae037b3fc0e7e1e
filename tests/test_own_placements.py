"""A placement of one's own has everything that the package's have: parameters, streams, probes, theory, rewiring."""

from __future__ import annotations

import math
from inspect import unwrap

import pytest
import torch
from facts import WIDTH
from own_placements import STREAMS, Gated, Hyper, Mixed
from torch import nn

import spannorm
from spannorm import InputError, Placement, Stack, probes, theory
from spannorm.placements import PLACEMENTS, Owned

OWN = {"hyper": Hyper, "gated_pre": Gated, "mixed": Mixed}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in OWN.items():
        monkeypatch.setitem(PLACEMENTS, name, kind)


def model_of(tiny_config, name: str, **more):
    from spannorm.models import SpanNormForCausalLM

    return SpanNormForCausalLM(tiny_config(placement=name, **more))


def own_values(model: nn.Module) -> dict[str, torch.Tensor]:
    owners = {n: m for n, m in model.named_modules() if isinstance(m, (Placement, Owned))}
    return {f"{n}.{k}": p for n, m in owners.items() for k, p in m.named_parameters(recurse=False)}


def test_four_static_streams_at_their_start_are_prenorm_to_the_last_bit():
    torch.manual_seed(1)
    layers = [nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(6)]
    blocks = {
        name: [Stack(name, 3, "1/sqrt(2L):forward").block(b, WIDTH).double() for b in range(3)]
        for name in ("hyper", "pre")
    }
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    outputs = []
    for stack in blocks.values():
        y = x
        for b, block in enumerate(stack):
            y = block(y, lambda n, b=b: torch.tanh(layers[2 * b](n)), lambda n, b=b: torch.tanh(layers[2 * b + 1](n)))
        outputs.append(y)
    assert torch.equal(outputs[0], STREAMS * outputs[1])  # the readout adds four equal streams


@pytest.mark.parametrize("name", OWN)
def test_own_parameters_are_drawn_held_decayed_saved_and_loaded(tiny_config, tmp_path, name):
    model = model_of(tiny_config, name)
    with torch.device("meta"):
        late = model_of(tiny_config, name)
    late.to_empty(device="cpu").init_weights_()
    model.save_pretrained(tmp_path)
    reloaded = spannorm.load(tmp_path)
    assert own_values(model)
    for other in (model, late, reloaded):
        assert not other.init_receipt().mismatches, other.init_receipt()
        for key, value in own_values(model).items():
            assert torch.equal(other.get_parameter(key), value), key
    decay = {id(p): g["weight_decay"] for g in spannorm.parameter_groups(model, learning_rate=1.0, weight_decay=0.5)
             for p in g["params"]}  # fmt: skip
    for key, value in own_values(model).items():
        projected = key.rpartition(".")[2] in ("attn_dynamic", "ffn_dynamic", "own")
        assert decay[id(model.get_parameter(key))] == (0.5 if projected else 0.0), key
        assert value.ndim > 0, "FSDP2 shards no parameter of no dimension"


def test_the_values_are_those_the_method_says(tiny_config):
    block = model_of(tiny_config, "hyper").model.layers[1].placement
    assert block.attn_read.tolist() == [0, 0, 1, 0] and block.ffn_read.tolist() == [0, 0, 0, 1]
    assert torch.equal(block.attn_mix, torch.eye(4)) and not block.ffn_dynamic.any()
    own = model_of(tiny_config, "mixed", hidden_size=64).model.layers[0].placement.own
    assert own.std().item() == pytest.approx(0.5 / 8, rel=0.05)
    other = model_of(tiny_config, "mixed", hidden_size=64, init_seed=1).model.layers[0].placement.own
    assert not torch.equal(own, other)


@pytest.mark.parametrize("wrong", ["gains_norm.attn_mix", "matrices.ffn_dynamic", "gains_norm.dynamic_gain"])
def test_the_receipt_finds_an_own_parameter_that_is_not_what_it_should_be(tiny_config, wrong):
    model = model_of(tiny_config, "hyper")
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.placement.{wrong}").view(-1)[0] += 1e-3
    assert [row.name for row in model.init_receipt().mismatches] == [f"model.layers.1.placement.{wrong}"]


@pytest.mark.parametrize("name", OWN)
def test_gradients_reach_every_own_parameter_and_cached_is_uncached(tiny_config, name):
    model = model_of(tiny_config, name).double()
    with torch.no_grad():
        for parameter in own_values(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(37, (2, 9))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values if "past_key_values" in first else first.cache)
    torch.testing.assert_close(rest.logits, whole[:, 5:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OWN)
def test_rewired_into_a_llama_they_are_drawn_and_saved_too(name, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def fresh():
        sizes = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))

    model = fresh()
    assert "no longer what llama computes" in str(spannorm.rewire(model, name, init="redraw"))
    receipt = spannorm.init_receipt(model, spannorm.init_plan(model))
    assert not receipt.mismatches, receipt
    ids = torch.randint(37, (2, 9))
    model.save_pretrained(tmp_path)
    assert torch.equal(spannorm.load(tmp_path)(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *(("hyper", None), ("mixed", None), ("pre", "rezero"), ("peri", "layerscale")),
        *((name, None) for name in ("channel", "mixed_input", "hc", "mhc", "gated", "attnres_block")),
    ],
)
def test_in_shards_they_are_drawn_as_in_one_piece(tiny_config, name, rule):
    from spannorm.train.sharding import sharded_model

    whole = model_of(tiny_config, name, depth_rule=rule)
    ids = torch.randint(37, (2, 9))
    whole(ids, labels=ids).loss.backward()
    try:
        shards = sharded_model(whole.config, bf16=False)
        shards(ids, labels=ids).loss.backward()
        for (key, a), (other, b) in zip(whole.named_parameters(), shards.named_parameters(), strict=True):
            assert key == other
            assert torch.equal(a, b.full_tensor()), key
            torch.testing.assert_close(b.grad.full_tensor(), a.grad, msg=key)
        record = probes.measure(shards, lambda: shards(ids, labels=ids, use_cache=False).loss)
    finally:
        torch.distributed.destroy_process_group()
    expected = probes.measure(whole, lambda: whole(ids, labels=ids, use_cache=False).loss)
    assert record.signal_rms == pytest.approx(expected.signal_rms)


def test_a_number_saved_without_a_dimension_is_read():
    one, other = (Stack("pre", 2, "rezero").block(0, WIDTH) for _ in range(2))
    nn.init.constant_(one.attn_scale, 0.3)
    old = {key.removeprefix("gains_norm."): value for key, value in one.state_dict().items()}
    old |= {key: value.reshape(()) for key, value in old.items() if key.endswith("_scale")}
    other.load_state_dict(old)
    assert torch.equal(other.attn_scale, one.attn_scale)


def test_the_theory_follows_streams_whose_dynamic_part_starts_at_zero():
    p, pre = (theory.predict(name, 12, depth_rule="1/sqrt(2L)") for name in ("hyper", "pre"))
    assert p.log_total_gain - math.log(STREAMS) == pytest.approx(pre.log_total_gain, abs=1e-12)  # a sum of four
    assert p.variance["attn_norm"] == pytest.approx(pre.variance["attn_norm"], rel=1e-12)


def test_the_theory_follows_gates_channels_and_a_detached_stream():
    # for one token, v = 1 for attention: forward h = (x + ½a)·¾, backward the stream is not scaled
    body = theory.Body(sequence_length=1, eps=0.0)
    p = theory.predict("gated_pre", 1, body=body)
    assert p.variance["ffn_norm"][0] == pytest.approx(1.25 * 0.75**2)
    v_f = 0.35578
    assert p.variance["output"][0] == pytest.approx(1.25 * 0.75**2 + 4 * v_f, rel=1e-4)
    assert p.log_skip_gain == pytest.approx(0.0, abs=1e-12)


def test_the_theory_names_the_operation_that_it_cannot_follow_and_the_placement():
    with pytest.raises(theory.NoRule, match=r"placement 'mixed': .*'linear'"):
        theory.predict("mixed", 3)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: x * x, "mul"),
        (lambda x: x + 1.0, "add"),
        (lambda x: x.mean(-1, keepdim=True), "mean"),
        (lambda x: x.sum(1), "sum"),
        (lambda x: torch.tanh(x), "tanh"),
        (lambda x: x.transpose(0, 1), "transpose"),
        (lambda x: 1.0 / x, "__rdiv__"),
        (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=x.dtype) @ x, "matmul"),
        (lambda x: x[:, 1:], "__getitem__"),
        (lambda x: x[:, torch.arange(x.shape[1]).flip(0)], "__getitem__"),
        (lambda x: torch.einsum("bsd,st->btd", x, torch.ones(x.shape[1], x.shape[1], dtype=x.dtype)), "einsum"),
        (lambda x: torch.einsum("bsd,de->bse", x, torch.ones(1, 1, dtype=x.dtype)), "einsum"),
        (lambda x: x * torch.arange(1.0, 1 + x.shape[1])[:, None], "mul"),
        (lambda x: x / torch.arange(1.0, 1 + x.shape[1])[:, None], "div"),
    ],
)
def test_what_is_not_linear_or_mixes_tokens_or_channels_is_refused(monkeypatch, operation, name):
    class Odd(Placement):
        final_norm = True

        def block(self, x, attn, ffn):
            return self.add(operation(x), ffn(attn(self.attn_norm(x))))

    monkeypatch.setitem(PLACEMENTS, "odd", Odd)
    with pytest.raises(theory.NoRule, match=rf"placement 'odd': .*{name}"):
        theory.predict("odd", 2)


@pytest.mark.parametrize("name", OWN)
def test_probes_measure_gated_branches_and_any_number_of_streams(tiny_config, name):
    model = model_of(tiny_config, name).double()
    ids = torch.randint(37, (2, 9))
    record = probes.measure(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    assert not record.unmatched
    assert len(record.signal_rms_by_stream) == (STREAMS if name == "hyper" else 0)
    paths = probes.gradient_paths(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    assert all(math.isfinite(g) for g in paths.log_gain["total"])
    if name == "gated_pre":
        assert record.added_rms["attn"] == pytest.approx([0.5 * v for v in record.branch_rms["attn"]])
        assert record.added_rms["ffn"] == pytest.approx([2.0 * v for v in record.branch_rms["ffn"]])
    if name == "mixed":
        assert set(record.rho) == {"attn+ffn"}
    if name == "hyper":
        pre = model_of(tiny_config, "pre").double()
        other = probes.measure(pre, lambda: pre(ids, labels=ids, use_cache=False).loss)
        inside = [STREAMS * v for v in other.signal_rms[1:]]
        assert record.signal_rms == pytest.approx([other.signal_rms[0], *inside])
        assert record.branch_rms["ffn"] == pytest.approx(other.branch_rms["ffn"])
        assert record.rho["attn"][0] == pytest.approx(other.rho["attn"][0])
        assert record.token_cosine[1:] == pytest.approx(other.token_cosine[1:])


def test_a_branch_that_no_sum_adds_is_reported(tiny_config, monkeypatch, caplog):
    class Product(Placement):
        final_norm = True

        def block(self, x, attn, ffn):
            return self.add(x * (1 + 0.1 * torch.tanh(attn(self.attn_norm(x)))), ffn(self.ffn_norm(x)))

    monkeypatch.setitem(PLACEMENTS, "product", Product)
    model = model_of(tiny_config, "product")
    ids = torch.randint(37, (2, 9))
    record = probes.measure(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    assert record.unmatched == {"attn": [0, 1, 2]} and "attn" not in record.rho
    assert record.to_dict()["unmatched"] == {"attn": [0, 1, 2]}
    assert "attn branch's output was found in no sum in blocks [0, 1, 2]" in caplog.text


def test_what_is_no_placement_is_refused():
    with pytest.raises(InputError, match="takes a subclass of Placement"):
        unwrap(spannorm.register_placement)("function", lambda **sizes: None)  # unwrapped: the tests check types first


def test_one_stream_that_is_opened_is_a_stream_to_the_theory_and_to_the_probe(tiny_config, monkeypatch):
    class One(Placement):
        """PreNorm on a state of one stream."""

        default_depth_rule = "1/sqrt(2L)"
        final_norm = True

        def enter(self, x):
            return x.unsqueeze(-2)

        def exit(self, x):
            return x.squeeze(-2)

        def block(self, x, attn, ffn):
            x = x + self.attn_scale * attn(self.attn_norm(x.squeeze(-2))).unsqueeze(-2)
            return x + self.ffn_scale * ffn(self.ffn_norm(x.sum(-2))).unsqueeze(-2)

    monkeypatch.setitem(PLACEMENTS, "one", One)
    one, pre = (theory.predict(name, 5, depth_rule="1/sqrt(2L)") for name in ("one", "pre"))
    assert one.log_total_gain == pytest.approx(pre.log_total_gain, abs=1e-12)
    ids, records = torch.randint(37, (2, 9)), []
    for name in ("one", "pre"):
        model = model_of(tiny_config, name).double()
        records.append(probes.measure(model, lambda m=model: m(ids, labels=ids, use_cache=False).loss))
    assert not records[0].unmatched and len(records[0].signal_rms_by_stream) == 1
    for key in ("signal_rms", "gradient_rms", "effective_rank", "token_cosine"):
        assert getattr(records[0], key) == pytest.approx(getattr(records[1], key)), key
    assert records[0].rho["attn"] == pytest.approx(records[1].rho["attn"])


def test_a_state_that_grows_from_block_to_block_is_followed(tiny_config, monkeypatch):
    class Growing(Placement):
        """Every sublayer reads the mean of all that was written before it; the state keeps each block's outputs."""

        final_norm = True

        def enter(self, x):
            return x.unsqueeze(-2)

        def exit(self, x):
            return x.mean(-2)

        def block(self, x, attn, ffn):
            x = torch.cat([x, attn(self.attn_norm(x.mean(-2))).unsqueeze(-2)], dim=-2)
            return torch.cat([x, ffn(self.ffn_norm(x.mean(-2))).unsqueeze(-2)], dim=-2)

    monkeypatch.setitem(PLACEMENTS, "growing", Growing)
    body = theory.Body(sequence_length=1, eps=0.0)
    p = theory.predict("growing", 3, body=body)  # variances 1, v_a = 1 and v_f of independent sources
    v_f, sources = 0.35578, [1.0]
    for b in range(3):
        assert p.variance["attn_norm"][b] == pytest.approx(sum(sources) / len(sources) ** 2, rel=1e-4)
        sources.append(1.0)
        assert p.variance["ffn_norm"][b] == pytest.approx(sum(sources) / len(sources) ** 2, rel=1e-4)
        sources.append(v_f)
    assert p.variance["output"][-1] == pytest.approx(sum(sources) / len(sources) ** 2, rel=1e-4)
    model, ids = model_of(tiny_config, "growing").double(), torch.randint(37, (2, 9))
    record = probes.measure(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    assert len(record.signal_rms_by_stream) == 5  # of two blocks: the last one reads out
    assert record.unmatched == {"attn": [0, 1, 2], "ffn": [0, 1, 2]}
    assert all(math.isfinite(v) for v in record.signal_rms + record.gradient_rms + record.effective_rank)


def test_a_placement_must_say_whether_a_norm_follows_the_stack():
    class Silent(Placement):
        def block(self, x, attn, ffn):
            return x

    with pytest.raises(InputError, match=r"Silent must say `final_norm`: whether a norm follows"):
        spannorm.register_placement("silent", Silent)
    assert "silent" not in PLACEMENTS
