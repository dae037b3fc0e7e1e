"""`SpanNormConfig`: a Llama configuration that also says where the norms go and how the weights are drawn."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from spannorm.errors import InputError, unknown
from spannorm.norms import NORMS
from spannorm.placements import PLACEMENTS, Placement, build_placement
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
            (N(0, 1/(2.5 d)) cut at 3σ).
        init_seed: seeds every parameter's draw together with its name; `torch.manual_seed` has no say.
        embedding_multiplier: what the embedding is multiplied with on input. None becomes √d for tied embeddings
            under `fan_in` and `xavier` (whose std is then d^-1/2), and 1 otherwise.

    Raises:
        InputError: sizes that do not divide, an unknown placement, rule, norm or base init.
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
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.placement not in PLACEMENTS:
            raise unknown("placement", self.placement, PLACEMENTS)
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if self.base_init not in BASE_INITS:
            raise unknown("base_init", self.base_init, BASE_INITS)
        self.depth_rule = self.build_placement(0).rule.name
        if self.embedding_multiplier is None:
            scaled = self.tie_word_embeddings and self.base_init in ("fan_in", "xavier")
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

    def build_placement(self, layer_idx: int) -> Placement:
        """The placement of one block, as this configuration has it."""
        return build_placement(
            self.placement,
            hidden_size=self.hidden_size,
            layer_idx=layer_idx,
            num_layers=self.num_hidden_layers,
            depth_rule=self.depth_rule,
            norm=self.norm,
            eps=self.rms_norm_eps,
            **(self.placement_options or {}),
        )
