"""`SpanNormConfig`: a Llama configuration that also says where the norms go and how the weights are drawn."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from spannorm.errors import InputError, unknown
from spannorm.placements import Stack
from spannorm.scaling import BASE_INITS

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@strict
class SpanNormConfig(LlamaConfig):
    """Configuration of `SpanNormModel`. All keys of `LlamaConfig`, and:

    Args:
        placement: a name of `spannorm.PLACEMENTS`.
        depth_rule: a name of `spannorm.depth_rule`; None becomes the placement's default, so that files record the
            resolved name.
        placement_options: the placement's own options, such as `{"initial_norm": "embedding"}` for `span`.
        norm: `rmsnorm` or `layernorm`.
        qk_norm: a norm on each head's queries and keys, before RoPE; a placement that norms them itself does so in
            its own way, whatever this says.
        base_init: a name of `spannorm.scaling.BASE_INITS`: `fan_in` (body N(0, 1/fan_in), embedding std 1, head
            d^-1/2), `xavier`, `normal` (`initializer_range`), `normal_cut` (the same, cut at 3σ), `megatron`
            (N(0, 1/(2.5 d)) cut at 3σ), `small`, `tiny` (N(0, 1/(2 d L)), embedding as in `fan_in`).
        init_seed: seeds every parameter's draw together with its name; `torch.manual_seed` has no say.
        embedding_multiplier: what the embedding is multiplied with on input. None becomes √d for tied embeddings
            under `fan_in`, `xavier` and `tiny` (whose std is then d^-1/2), and 1 otherwise.
        num_experts: experts of each sparse layer; 0 makes every layer dense, whatever the keys below say.
        num_experts_per_tok: k, the experts that a token goes to.
        moe_intermediate_size: channels inside an expert; k of them stand for a dense `intermediate_size` of k times it.
        norm_topk_prob: divide the k chosen probabilities by their sum.
        shared_expert_intermediate_size: channels of an expert that every token goes to besides; None means none.
        decoder_sparse_step: every so many layers one is sparse: the last of each group.
        router_aux_loss_coef: weight of the load-balancing loss, which every sparse layer adds in training.
        router_aux_scope: what load is balanced over: each `sequence`, or each forward pass's whole `batch`, which makes
            the gradient depend on how a batch is split.
        router_z_loss_coef: weight of the router z-loss, which every sparse layer adds in training.

    Raises:
        InputError: sizes that do not divide, an unknown placement, rule, norm or base init, experts that cannot be.
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
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int | None = None
    decoder_sparse_step: int = 1
    router_aux_loss_coef: float = 0.01
    router_aux_scope: str = "sequence"
    router_z_loss_coef: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.num_experts:
            self._check_experts()
        self.depth_rule = self.stack.depth_rule
        if self.base_init not in BASE_INITS:
            raise unknown("base_init", self.base_init, BASE_INITS)
        if self.embedding_multiplier is None:
            scaled = self.tie_word_embeddings and self.base_init in ("fan_in", "xavier", "tiny")
            self.embedding_multiplier = self.hidden_size**0.5 if scaled else 1.0
        super().__post_init__(**kwargs)

    def _check_sizes(self) -> None:
        for name in (*_SIZES, "num_key_value_heads", "head_dim"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise InputError(f"`{name}` must be at least 1; got {size}.")
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if width % heads:
            # an even number of channels a head, which RoPE turns in pairs
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

    def _check_experts(self) -> None:
        experts, k, size = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        if experts < 0:
            raise InputError(f"`num_experts` must be at least 1, or 0 for a dense model; got {experts}.")
        if not 1 <= k <= experts:
            raise InputError(f"`num_experts_per_tok` ({k}) must lie in 1 … `num_experts` ({experts}).")
        if size < 1:
            raise InputError(
                f"`moe_intermediate_size` must be at least 1 for experts; got {size}. As many active parameters as the "
                f"dense model: {max(1, self.intermediate_size // k)}."
            )
        shared = self.shared_expert_intermediate_size
        if shared is not None and shared < 1:
            raise InputError(
                f"`shared_expert_intermediate_size` must be at least 1; got {shared}. None means no shared expert."
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
        if self.router_aux_scope not in ("sequence", "batch"):
            raise unknown("router_aux_scope", self.router_aux_scope, ["sequence", "batch"])
        for name in ("router_aux_loss_coef", "router_z_loss_coef"):
            if getattr(self, name) < 0:
                raise InputError(f"`{name}` must not be negative; got {getattr(self, name)}.")

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a block's feed-forward is a mixture of experts."""
        return self.num_experts > 0 and (layer_idx + 1) % self.decoder_sparse_step == 0

    @property
    def stack(self) -> Stack:
        """The blocks' placements, as this configuration has them."""
        options = self.placement_options or {}
        return Stack(self.placement, self.num_hidden_layers, self.depth_rule, options, self.norm, self.rms_norm_eps)
