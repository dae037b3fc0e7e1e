"""`SpanNormConfig`: a Llama configuration that also says where the norms go and how the weights are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, Qwen3MoeConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spannorm.auto_code import AUTO_CODE, write_auto_code
from spannorm.errors import InputError, shown
from spannorm.model_keys import MODEL_KEYS, checked_key
from spannorm.named_code import check_configuration
from spannorm.placements import Stack
from spannorm.values import NONE, Limits, checked

_AUTO = {
    "AutoConfig": "SpanNormConfig",
    "AutoModel": "SpanNormModel",
    "AutoModelForCausalLM": "SpanNormForCausalLM",
    "AutoModelForSequenceClassification": "SpanNormForSequenceClassification",
    "AutoModelForTokenClassification": "SpanNormForTokenClassification",
}
_SHARED_GAIN = Qwen3MoeConfig.base_model_tp_plan["layers.*.self_attn.q_norm"]


def _of_mixtures(value: Any) -> Any:
    """A key that only mixtures of experts have. The class has no default, so that a dense configuration lacks it."""
    return field(default_factory=lambda: value, metadata={"mixtures": True})


_DTYPES = tuple(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))
_GENERAL: dict[str, tuple[Any, Limits]] = {
    "dtype": (str | torch.dtype | None, Limits(known=_DTYPES)),
    "torch_dtype": (str | torch.dtype | None, Limits(known=_DTYPES)),
    "architectures": (list[str] | None, NONE),
    "output_hidden_states": (bool | None, NONE),
    "output_attentions": (bool | None, NONE),
    "return_dict": (bool | None, NONE),
    "num_labels": (int | None, Limits(least=0, most=1 << 24)),
    "id2label": (Mapping[Any, Any] | None, NONE),
    "label2id": (Mapping[Any, Any] | None, NONE),
}
"""Keys of every configuration. Transformers does not check them, or fails with a traceback."""


def _held_to_its_keys(cls: Any) -> Any:
    """Check every value before the class gets it, and raise Transformers' own refusals as `InputError`."""
    make = cls.__init__

    @wraps(make)
    def checked_first(self: Any, *args: Any, **values: Any) -> None:
        for key, value in values.items():
            if key in MODEL_KEYS:
                values[key] = checked_key(key, value)
            elif key in _GENERAL:
                kind, limits = _GENERAL[key]
                checked(kind, value, f"`{key}`", limits)
        try:
            make(self, *args, **values)
        except InputError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # its validators raise all of these
            reason = getattr(error, "__cause__", None) or error
            raise InputError(f"this configuration cannot be: {' '.join(str(reason).split())[:400]}") from error

    cls.__init__ = checked_first
    return cls


@_held_to_its_keys
@strict
class SpanNormConfig(LlamaConfig):
    """Configuration of `SpanNormModel`. All keys of `LlamaConfig`, and:

    Args:
        placement: a name of `spannorm.PLACEMENTS`.
        depth_rule: a name of `spannorm.depth_rule`. None becomes the name of the placement's default, which saved files
            then record.
        placement_options: the placement's own options, such as `{"initial_norm": "embedding"}` for `span`.
        norm: `rmsnorm`, `layernorm`, or `dyt` (placements that normalize only what a sublayer reads).
        qk_norm: a norm on each head's queries and keys, before RoPE. A placement with its own norms on queries and keys
            ignores this setting.
        base_init: a name of `spannorm.scaling.BASE_INITS`: `fan_in` (body N(0, 1/fan_in), embedding std 1, head
            d^-1/2), `xavier`, `normal` (`initializer_range`), `normal_cut` (the same, cut at 3σ), `megatron`
            (N(0, 1/(2.5 d)) cut at 3σ), `small`, `tiny` (N(0, 1/(2 d L)), embedding as in `fan_in`).
        init_seed: seeds the draw of each parameter, together with its name. `torch.manual_seed` has no effect.
        embedding_multiplier: a factor on the embedding at the input. None becomes √d for tied embeddings under
            `fan_in`, `xavier` and `tiny` (whose std is then d^-1/2), and 1 otherwise.
        num_experts: experts of each sparse layer; 0 makes every layer dense. A dense configuration lacks the keys
            below, because other libraries recognize a mixture of experts by them.
        num_experts_per_tok: k, the number of experts that a token uses.
        moe_intermediate_size: channels inside an expert. k experts have as many as a dense feed-forward of k times it.
        norm_topk_prob: divide the k chosen probabilities by their sum.
        shared_expert_intermediate_size: channels of one more expert that every token uses; None means none.
        decoder_sparse_step: in each group of this many layers, the last one is sparse.
        router_aux_loss_coef: weight of the load-balancing loss, which every sparse layer adds in training.
        router_aux_scope: balance the load within each `sequence`, or within the whole `batch` of a forward pass. With
            `batch` the gradient depends on how a batch is split.
        router_z_loss_coef: weight of the router z-loss, which every sparse layer adds in training.
        output_router_logits: return the routers' logits, and with labels the auxiliary losses, unless a call overrides
            it. TRL reads this key and `router_aux_loss_coef` to add the load-balancing loss itself.

    Raises:
        InputError: sizes that do not divide, an unknown placement, rule, norm or base init, impossible experts.
    """

    model_type = "spannorm"

    placement: str = "span"
    depth_rule: str | None = None
    placement_options: dict[str, Any] | None = None
    norm: str = "rmsnorm"
    qk_norm: bool = False
    base_init: str = "fan_in"
    init_seed: int = 0
    embedding_multiplier: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = _of_mixtures(2)
    moe_intermediate_size: int = _of_mixtures(0)
    norm_topk_prob: bool = _of_mixtures(True)
    shared_expert_intermediate_size: int | None = _of_mixtures(None)
    decoder_sparse_step: int = _of_mixtures(1)
    router_aux_loss_coef: float = _of_mixtures(0.01)
    router_aux_scope: str = _of_mixtures("sequence")
    router_z_loss_coef: float = _of_mixtures(0.0)
    output_router_logits: bool = _of_mixtures(False)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.num_experts:
            self._check_experts()
        self.depth_rule = self.stack.depth_rule
        if self.embedding_multiplier is None:
            scaled = self.tie_word_embeddings and self.base_init in ("fan_in", "xavier", "tiny")
            self.embedding_multiplier = self.hidden_size**0.5 if scaled else 1.0
        super().__post_init__(**kwargs)
        self._check_rope()
        if not self.num_experts:
            for key in MIXTURE_KEYS:
                delattr(self, key)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Transformers' own. It also writes the file with which the Auto classes open the folder."""
        self.auto_map = {auto: f"{AUTO_CODE}.{cls}" for auto, cls in _AUTO.items()}
        super().save_pretrained(save_directory, **kwargs)
        write_auto_code(Path(save_directory))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Transformers' own, except that a dense configuration also accepts the keys of mixtures of experts."""
        check_configuration(config_dict, config_dict.get("_name_or_path") or "config.json")
        given = {key: kwargs.pop(key) for key in ("num_experts", *MIXTURE_KEYS) if key in kwargs}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def __eq__(self, other: object) -> bool:
        keys = self.__dataclass_fields__
        return type(self) is type(other) and all(getattr(self, k, None) == getattr(other, k, None) for k in keys)

    def _check_sizes(self) -> None:
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if width % heads:
            # an even number of channels per head, because RoPE rotates pairs of channels
            near = max(1, round(width / (2 * heads))) * 2 * heads
            raise InputError(
                f"`hidden_size` ({width}) must be divisible by `num_attention_heads` ({heads}); try {near}."
            )
        if kv_heads is not None and heads % kv_heads:
            near = max(n for n in range(1, min(kv_heads, heads) + 1) if heads % n == 0)
            raise InputError(
                f"`num_attention_heads` ({heads}) must be divisible by `num_key_value_heads` ({kv_heads}); try {near}."
            )
        if self.head_dim is not None and self.head_dim % 2:
            raise InputError(f"`head_dim` ({self.head_dim}) must be even for RoPE; try {self.head_dim + 1}.")
        if self.head_dim is None and width // heads % 2:
            raise InputError(
                f"the head size ({width // heads} = `hidden_size` {width} / `num_attention_heads` {heads}) must be "
                "even for RoPE: change one of the two."
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise InputError(f"`pad_token_id` ({self.pad_token_id}) must be below `vocab_size` ({self.vocab_size}).")

    def _check_rope(self) -> None:
        if self.rope_parameters == {"rope_theta": self.default_theta, "rope_type": "default"}:
            return
        try:
            with torch.device("cpu"):  # some releases have no argument for the device
                turns = LlamaRotaryEmbedding(config=self).inv_freq
        except Exception as error:  # the kinds of RoPE raise many kinds of errors
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InputError(f"`rope_parameters` ({shown(self.rope_parameters)}) cannot be used: {reason}.") from None
        if not (turns.isfinite() & (turns > 0)).all():
            raise InputError(
                f"`rope_parameters` ({shown(self.rope_parameters)}) must give every pair of channels a positive, "
                "finite frequency: choose another rope_theta or factor."
            )

    def _check_experts(self) -> None:
        experts, k, size = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        if not 1 <= k <= experts:
            raise InputError(f"`num_experts_per_tok` ({k}) must lie in 1 … `num_experts` ({experts}).")
        if size < 1:
            raise InputError(
                f"`moe_intermediate_size` must be at least 1 for experts; got {size}. As many active parameters as the "
                f"dense model: {max(1, self.intermediate_size // k)}."
            )
        step = self.decoder_sparse_step
        if not 1 <= step <= self.num_hidden_layers:
            raise InputError(
                f"`decoder_sparse_step` ({step}) must lie in 1 … `num_hidden_layers` ({self.num_hidden_layers}), or no "
                "layer is sparse."
            )
        if k == 1 < experts and self.norm_topk_prob:
            raise InputError(
                "`norm_topk_prob` makes the weight of a single expert 1 whatever the router says, so that the router "
                "would never learn: with `num_experts_per_tok` 1, set it to false."
            )
        if self.mlp_bias and step == 1:
            raise InputError("`mlp_bias` is for dense feed-forwards, and every layer's is a mixture: leave it out.")

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a block's feed-forward is a mixture of experts."""
        return self.num_experts > 0 and (layer_idx + 1) % self.decoder_sparse_step == 0

    @property
    def num_hidden_states(self) -> int:
        """The number of hidden states that `output_hidden_states` returns."""
        return self.num_hidden_layers + 1

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """How tensor parallelism splits the body. The input of a norm over the whole width is gathered first."""
        inner, mlp = dict(self.stack.inner_norms), "layers.*.mlp"
        if self.qk_norm:
            inner = {"q": "head", "k": "head", **inner}
        wide = any(over == "width" or role == "head_scale" for role, over in inner.items() if role != "ffn_down")
        columns, rows = ("colwise_gather_output", "rowwise_split_input") if wide else ("colwise", "rowwise")
        plan = {f"layers.*.self_attn.{p}_proj": columns for p in "qkv"} | {"layers.*.self_attn.o_proj": rows}
        if not wide:  # each process has its own heads, and a gain that all heads share
            plan |= {f"layers.*.self_attn.{role}_norm": _SHARED_GAIN for role in inner if role in "qkv"}
        gathered = "ffn_down" in inner
        columns, rows = ("colwise_gather_output", "rowwise_split_input") if gathered else ("colwise", "rowwise")
        ffns = [mlp] if not all(map(self.is_sparse, range(self.num_hidden_layers))) else []
        if self.num_experts and self.shared_expert_intermediate_size is not None:
            ffns.append(f"{mlp}.shared_expert")
        for ffn in ffns:
            plan |= {f"{ffn}.gate_proj": columns, f"{ffn}.up_proj": columns, f"{ffn}.down_proj": rows}
        if self.num_experts and not gathered:
            plan |= {key: how for key, how in Qwen3MoeConfig.base_model_tp_plan.items() if ".experts" in key}
        return plan | self.__dict__.get("base_model_tp_plan", {})

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        # Transformers 5.17 adds the embedding of a tied model here, and leaves this name out of saved files
        self.__dict__["base_model_tp_plan"] = {key: how for key, how in plan.items() if not key.startswith("layers.")}

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """How expert parallelism gives each process its experts. Experts with norms inside have no plan."""
        return (
            Qwen3MoeConfig.base_model_ep_plan if self.num_experts and "ffn_down" not in self.stack.inner_norms else None
        )

    @property
    def stack(self) -> Stack:
        """The blocks' placements in this configuration."""
        options = self.placement_options or {}
        return Stack(self.placement, self.num_hidden_layers, self.depth_rule, options, self.norm, self.rms_norm_eps)


MIXTURE_KEYS = tuple(key for key, f in SpanNormConfig.__dataclass_fields__.items() if f.metadata.get("mixtures"))
"""Keys that a dense configuration lacks."""
