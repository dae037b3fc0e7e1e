"""torchtitan's Llama 3 and Qwen 3 with any placement. Blocks, both ends and init are ours; the rest is torchtitan's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.models.common.attention import GQAttention
from torchtitan.models.common.decoder_sharding import norm_config
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.rope import ComplexRoPE
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.models.qwen3.model import Qwen3Model
from torchtitan.protocols.sharding import ShardingConfig

from spannorm.errors import InputError
from spannorm.init import Draw
from spannorm.roles import NO_DECAY, known_parameters
from spannorm.torchtitan.block import PlacedBlock, PlacementConfig, end_norm, no_norm
from spannorm.torchtitan.draws import ROLES, Heads, give_draws, plan_draws
from spannorm.torchtitan.sublayers import attention, copied, feed_forward

NOT_AS_DTENSOR = ("mixed_input",)
Factors = tuple[float, float, float]


class ScaledEmbedding(Embedding):
    """torchtitan's embedding, multiplied by a constant."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        scale: float

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scale = config.scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class _Placed:
    """Common part of the two models."""

    config: Any

    def _draw_by_our_rules(self) -> None:
        config, chosen = self.config, self.config.placement
        if chosen is None or not isinstance(config.layers[0], PlacedBlock.Config):
            raise InputError("this model has no placement yet: call place(config, PlacementConfig(…)) before build().")
        base = {"base_init": chosen.base_init, "initializer_range": chosen.initializer_range}
        heads = heads_of(config)
        self.init_plan: dict[str, Draw] = plan_draws(
            self, heads, width=config.dim, tied=config.enable_weight_tying, **base
        )
        give_draws(self, self.init_plan, heads, chosen.init_seed)  # type: ignore[arg-type]
        self.optimizer_factors = factors(self, heads, chosen.decay_matrices_only)


def factors(model: Any, heads: Heads, decay_matrices_only: bool) -> dict[str, Factors]:
    """Parameter → what its learning rate, weight decay and Adam's ε are multiplied with."""
    found = {}
    for k in known_parameters(model, {**ROLES, "wqkv": heads.fused}):
        rates = {k.rule.learning_rate.get(role, 1.0) for role in k.layout.roles}
        decays = {k.rule.weight_decay.get(role, 1.0) for role in k.layout.roles}
        if len(rates) > 1 or len(decays) > 1:
            raise InputError(
                f"depth rule {k.rule.name!r} gives the parts of the fused matrix {k.name} learning rates of their own: "
                "build the model with fuse_qkv=False."
            )
        decay = 0.0 if decay_matrices_only and k.role in NO_DECAY else decays.pop()
        found[k.name] = (rates.pop(), decay, k.rule.eps.get(k.role, 1.0))
    return found


def heads_of(config: Any) -> Heads:
    """The sizes of attention of a model, alike in every block."""
    a = config.layers[0].attention
    if not isinstance(a, GQAttention.Config):
        raise InputError(f"placements are put around torchtitan's GQAttention; this model has {type(a).__qualname__}.")
    channels = a.head_dim or config.dim // a.n_heads
    return Heads(a.n_heads, a.n_kv_heads or a.n_heads, channels, isinstance(a.rope, ComplexRoPE.Config))


class Llama3(_Placed, Llama3Model):
    """torchtitan's Llama 3 with a placement. With `pre` it computes what torchtitan's own computes."""

    @dataclass(kw_only=True, slots=True)
    class Config(Llama3Model.Config):
        placement: PlacementConfig | None = None

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            before_sharding(self, config)
            Llama3Model.Config.update_from_config(self, config=config, **kwargs)
            shard(self, config.parallelism)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._draw_by_our_rules()


class Qwen3(_Placed, Qwen3Model):
    """torchtitan's Qwen 3 with a placement, dense or a mixture of experts."""

    @dataclass(kw_only=True, slots=True)
    class Config(Qwen3Model.Config):
        placement: PlacementConfig | None = None

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            before_sharding(self, config)
            Qwen3Model.Config.update_from_config(self, config=config, **kwargs)
            shard(self, config.parallelism)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._draw_by_our_rules()


def as_ours(config: Any) -> Any:
    """A configuration of torchtitan's → our configuration, without a placement yet.

    Raises:
        InputError: a model with unknown blocks.
    """
    for theirs, ours in ((Llama3Model, Llama3), (Qwen3Model, Qwen3)):
        if isinstance(config, ours.Config):
            return config
        if isinstance(config, theirs.Config):
            return copied(config, ours.Config)
    raise InputError(f"placements go into torchtitan's llama3 and qwen3; got {type(config).__qualname__}.")


def place(config: Any, chosen: PlacementConfig) -> Any:
    """A configuration of torchtitan's Llama 3 or Qwen 3 with a placement: build it, or train it.

    Args:
        config: one of torchtitan's flavors. Its attention, feed-forward and experts do not change; its `param_init` is
            replaced.

    Raises:
        InputError: a setting that the placement or the model does not support.
    """
    ours = copied(config, type(as_ours(config)), layers=list(config.layers))
    lay_out(ours, chosen)
    return ours


def lay_out(config: Any, chosen: PlacementConfig) -> None:
    """Put a placement into a configuration, in place."""
    if isinstance(config.layers[0], PlacedBlock.Config):
        raise InputError("this model has its placement already: start from torchtitan's configuration.")
    stack = chosen.stack(len(config.layers), config.layers[0].attention_norm.eps)
    inner = stack.inner_norms
    if "ffn_down" in inner and any(layer.moe is not None for layer in config.layers):
        raise InputError(
            f"placement {chosen.name!r} has a norm inside every expert, which torchtitan's grouped experts have no "
            "place for: train it with `spannorm train`, or choose another placement for a mixture."
        )
    config.placement = chosen
    config.layers = [
        copied(
            layer, PlacedBlock.Config, stack=stack, layer_idx=b, dim=config.dim,
            attention=attention(layer.attention, stack, inner),
            feed_forward=feed_forward(layer.feed_forward, stack, inner),
            embedding_norm=end_norm(stack, config.dim) if stack.embedding_norm and b == 0 else None,
        )
        for b, layer in enumerate(config.layers)
    ]  # fmt: skip
    config.norm = end_norm(stack, config.dim) if stack.final_norm else no_norm()
    scale = embedding_scale(config)
    if scale != 1.0:
        config.tok_embeddings = copied(config.tok_embeddings, ScaledEmbedding.Config, scale=scale)


def embedding_scale(config: Any) -> float:
    """The factor on the embedding at the input, by the same rule as in `SpanNormConfig`."""
    chosen = config.placement
    if chosen.embedding_multiplier is not None:
        return float(chosen.embedding_multiplier)
    scaled = config.enable_weight_tying and chosen.base_init in ("fan_in", "xavier", "tiny")
    return float(config.dim) ** 0.5 if scaled else 1.0


def before_sharding(config: Any, trainer: Any) -> None:
    """Build the trainer's placements, and refuse settings whose work cannot be split over processes."""
    if not isinstance(config.layers[0], PlacedBlock.Config):
        lay_out(config, getattr(trainer, "placement", None) or config.placement or PlacementConfig())
    parallelism, stack = trainer.parallelism, config.layers[0].stack
    wide = [role for role, over in stack.inner_norms.items() if over == "width" and role != "head_scale"]
    if wide and parallelism.tensor_parallel_degree > 1 and parallelism.spmd_backend == "spmd_types":
        raise InputError(
            f"placement {stack.placement!r} norms {', '.join(wide)} over the whole width inside a sublayer, which "
            "tensor parallelism cuts: add --parallelism.spmd_backend full_dtensor, which gathers what a norm needs, or "
            "set parallelism.tensor_parallel_degree=1."
        )
    as_dtensor = parallelism.tensor_parallel_degree > 1 and parallelism.spmd_backend != "spmd_types"
    if stack.placement in NOT_AS_DTENSOR and as_dtensor:
        raise InputError(
            f"placement {stack.placement!r} reads one stream of several by itself, which PyTorch's DTensor does not "
            "differentiate: take parallelism.spmd_backend=spmd_types, torchtitan's default."
        )


def shard(config: Any, parallelism: Any) -> None:
    """Set how the norms that a placement adds are sharded, if torchtitan has set it for its own."""
    sequence = parallelism.enable_sequence_parallel
    for layer in config.layers:
        layer.sequence_parallel = sequence
        if layer.embedding_norm is not None:
            layer.embedding_norm.sharding_config = _with_bias(norm_config(enable_sp=sequence))
    config.norm.sharding_config = _with_bias(config.norm.sharding_config)


def _with_bias(sharding: ShardingConfig) -> ShardingConfig:
    sharding.state_shardings["bias"] = sharding.state_shardings["weight"]
    return sharding
