"""The configuration: what it resolves, what it records, what it refuses."""

from __future__ import annotations

import json
import math

import pytest
from arms import ARMS, DEFAULT_RULE
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from spannorm.errors import InputError
from spannorm.model_keys import ACTIVATIONS, MODEL_KEYS
from spannorm.models import SpanNormConfig


@pytest.mark.parametrize(("placement", "rule"), DEFAULT_RULE.items())
def test_the_depth_rule_resolves_to_the_placements_own(tiny_config, placement, rule):
    assert tiny_config(placement=placement).depth_rule == rule


def test_the_default_is_spannorm_as_we_read_the_paper(tiny_config):
    config = tiny_config()
    assert (config.placement, config.depth_rule, config.norm) == ("span", "1/sqrt(L)", "rmsnorm")
    assert (config.base_init, config.init_seed, config.qk_norm) == ("fan_in", 0, False)
    assert config.rms_norm_eps == 1e-6
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize(
    ("tied", "base_init", "multiplier"),
    [
        *((tied, base, 4.0 if tied else 1.0) for tied in (True, False) for base in ("fan_in", "xavier", "tiny")),
        *((tied, base, 1.0) for tied in (True, False) for base in ("normal", "normal_cut", "megatron")),
    ],
)
def test_a_tied_embedding_is_multiplied_to_unit_variance(tiny_config, tied, base_init, multiplier):
    config = tiny_config(tie_word_embeddings=tied, base_init=base_init)
    assert math.isclose(config.embedding_multiplier, multiplier)
    assert tiny_config(tie_word_embeddings=tied, embedding_multiplier=3.0).embedding_multiplier == 3.0


@pytest.mark.parametrize(("placement", "rule"), ARMS)
def test_a_configuration_comes_back_from_its_file_as_it_was(tiny_config, tmp_path, placement, rule):
    config = tiny_config(placement=placement, depth_rule=rule, tie_word_embeddings=True, qk_norm=True, norm="layernorm")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SpanNormConfig
    # where it was loaded from is not what it says
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_the_file_records_what_was_resolved(tiny_config, tmp_path):
    tiny_config(placement_options={"initial_norm": "embedding"}, tie_word_embeddings=True).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "spannorm"
    assert written["depth_rule"] == "1/sqrt(L)"
    assert written["embedding_multiplier"] == 4.0
    assert written["placement_options"] == {"initial_norm": "embedding"}


def test_the_configuration_builds_the_placement_it_describes(tiny_config):
    config = tiny_config(depth_rule="1/L:forward", norm="layernorm", rms_norm_eps=1e-3)
    placement = config.stack.block(2, config.hidden_size)
    assert (placement.layer_idx, placement.num_layers, placement.hidden_size) == (2, 3, 16)
    assert (placement.norm_name, placement.eps, placement.rule.name) == ("layernorm", 1e-3, "1/L:forward")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"hidden_size": 250, "num_attention_heads": 16, "num_key_value_heads": None},
            r"`hidden_size` \(250\) must be divisible by `num_attention_heads` \(16\); try 256",
        ),
        (
            {"num_key_value_heads": 3},
            r"`num_attention_heads` \(4\) must be divisible by `num_key_value_heads` \(3\); try",
        ),
        ({"num_key_value_heads": 8}, r"`num_attention_heads` \(4\) must be .* `num_key_value_heads` \(8\); try"),
        ({"num_key_value_heads": 0}, r"`num_key_value_heads`.*at least 1.*0"),
        ({"hidden_size": 20}, r"head size \(5 = `hidden_size` 20 / `num_attention_heads` 4\) must be even for RoPE"),
        # Transformers refuses this too, whatever the head size, but in words of its own
        ({"hidden_size": 18, "head_dim": 6}, r"`hidden_size` \(18\) must be divisible by `num_attention_heads` \(4\)"),
        ({"head_dim": 7}, r"`head_dim`.*7.*even"),
        ({"head_dim": 0}, r"`head_dim`.*at least.*0"),
        ({"num_hidden_layers": 0}, r"`num_hidden_layers` must be at least 1; got 0"),
        ({"vocab_size": 0}, r"`vocab_size` must be at least 1; got 0"),
        ({"intermediate_size": 0}, r"`intermediate_size` must be at least 1; got 0"),
        ({"num_attention_heads": 0}, r"`num_attention_heads` must be at least 1; got 0"),
        ({"hidden_size": -16}, r"`hidden_size` must be at least 1; got -16"),
        ({"placement": "spam"}, r"unknown placement 'spam': did you mean 'span'\? Known: pre, post, span"),
        ({"depth_rule": "1/sqrt(2l)"}, r"unknown depth rule '1/sqrt\(2l\)': did you mean '1/sqrt\(2L\)'"),
        ({"depth_rule": ""}, r"unknown depth rule ''"),
        ({"norm": "rms"}, r"unknown norm 'rms': did you mean 'rmsnorm'\? Known: rmsnorm, layernorm"),
        ({"base_init": "fanin"}, r"unknown base_init 'fanin': did you mean 'fan_in'\? Known: fan_in, normal"),
        ({"placement_options": {"initial": "none"}}, r"'span' has no option 'initial': it takes initial_norm"),
        ({"placement_options": {"initial_norm": "all"}}, r"unknown initial_norm 'all'.*Known: attention, embedding"),
    ],
)
def test_what_cannot_work_is_refused_with_the_rule_the_value_and_the_way_out(tiny_config, given, message):
    with pytest.raises(InputError, match=message):
        tiny_config(**given)


@pytest.mark.parametrize(("hidden", "heads"), [(250, 16), (50, 16), (7, 4), (100, 12), (1, 4)])
def test_the_width_that_a_refusal_tries_to_offer_is_accepted(tiny_config, hidden, heads):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": heads}
    with pytest.raises(InputError) as caught:
        tiny_config(hidden_size=hidden, **sizes)
    offered = int(str(caught.value).split("try ")[1].rstrip("."))
    assert tiny_config(hidden_size=offered, **sizes).hidden_size == offered


def test_the_head_size_may_be_chosen_apart_from_the_width(tiny_config):
    config = tiny_config(hidden_size=16, head_dim=6)
    assert (config.hidden_size, config.head_dim) == (16, 6)


def test_every_key_of_the_architecture_has_a_kind_and_limits():
    own = set(SpanNormConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    assert own == set(MODEL_KEYS)
    for key in ACTIVATIONS:
        assert not list(ACT2FN[key].parameters())


def test_llamas_scaled_rope_is_taken_whatever_the_release_of_transformers():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = SpanNormConfig(vocab_size=17, rope_parameters={**rope, "original_max_position_embeddings": 8192})
    assert config.rope_parameters["rope_type"] == "llama3"
