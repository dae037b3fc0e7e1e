"""The language model: Transformers' attention, MLP, RoPE and cache, wired by a placement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from spannorm.errors import InputError
from spannorm.init import Draw, InitReceipt, init_plan, init_receipt, init_weights_, standard_normal
from spannorm.models.checkpoint import RENAMED, check_feed_forwards
from spannorm.models.configuration import SpanNormConfig
from spannorm.models.experts import TopKRouter
from spannorm.models.layer import CACHE, HiddenState, ScaledEmbedding, SpanNormDecoderLayer
from spannorm.models.losses import chunked_loss, next_tokens, router_losses
from spannorm.shapes import Stream


def _recorder() -> OutputRecorder:
    recorder = OutputRecorder(HiddenState, capture_initial_hidden_state=False)
    recorder.num_hidden_layers_key = "num_hidden_states"  # their number, for indices from the end
    return recorder


class SpanNormPreTrainedModel(PreTrainedModel):
    config: SpanNormConfig
    config_class = SpanNormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpanNormDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_set_experts_implementation_cached_value = True  # else Transformers looks for a decorator in this file
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": _recorder(),
        "streams": OutputRecorder(SpanNormDecoderLayer),
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(TopKRouter, index=0),
    }

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, from safetensors only. A pickle is refused, because it can run code."""
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise InputError("use_safetensors=False asks for a pickle: convert the weights to safetensors instead.")
        wanted = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = {**RENAMED, **(kwargs.get("key_mapping") or {})}
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # otherwise save_pretrained would write the old names
        used = getattr(model, "_weight_conversions", [])  # missing if shards were loaded
        model._weight_conversions = [c for c in used if c.source_patterns[0] not in RENAMED]
        check_feed_forwards(model.config, info)
        return (model, info) if wanted else model

    def idle_parameters(self) -> int:
        """The number of parameters in experts that a token does not use. All other parameters are active."""
        experts = self.config.num_experts
        in_experts = sum(p.numel() for name, p in self.named_parameters() if ".experts." in name)
        return in_experts // experts * (experts - self.config.num_experts_per_tok) if experts else 0

    def init_plan(self) -> dict[str, Draw]:
        """How every parameter must be drawn, according to this model's configuration."""
        return init_plan(
            self,
            width=self.config.hidden_size,
            base_init=self.config.base_init,
            initializer_range=self.config.initializer_range,
            tied=self.config.tie_word_embeddings,
        )

    def init_receipt(self) -> InitReceipt:
        """Expected against actual std of every parameter of a freshly drawn model."""
        return init_receipt(self, self.init_plan())

    def init_weights_(self) -> None:
        """Draw all weights anew, in place: for a model built on meta device, after `to_empty`."""
        self.tie_weights()
        for module in self.modules():
            if isinstance(module, LlamaRotaryEmbedding):
                super()._init_weights(module)
        self._draw(self.init_plan())

    def _draw(self, plan: dict[str, Draw]) -> None:
        init_weights_(self, plan, seed=self.config.init_seed, prefix=f"{self.base_model_prefix}.")

    @property
    def keeps_unknown_parameters(self) -> bool:
        """Whether parameters without a role keep what their own modules draw: only in a user's own class."""
        return type(self).__module__ != __name__

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # Transformers initializes module by module, but a draw needs the parameter's name, which only the root knows.
        # So the root draws what was neither loaded nor drawn by its body; loaded and drawn parameters have a flag.
        super().initialize_weights()
        fresh = {n: p for n, p in self.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
        self._draw({name: draw for name, draw in self.init_plan().items() if name in fresh})
        for parameter in fresh.values():
            parameter._is_hf_initialized = True

    def _init_weights(self, module: nn.Module) -> None:
        # Only these are initialized module by module: RoPE's buffers, modules that a subclass adds, and a new embedding
        # or head when the vocabulary grows.
        if isinstance(module, LlamaRotaryEmbedding):
            super()._init_weights(module)
        elif isinstance(module, (nn.Embedding, nn.Linear)) and not any(module is m for m in self.modules()):
            self._draw_table(module)
        elif self.keeps_unknown_parameters and not any(module is m for m in self.base_model.modules()):
            getattr(module, "reset_parameters", lambda: None)()

    def _draw_table(self, table: nn.Embedding | nn.Linear) -> None:
        old = self.get_input_embeddings() if isinstance(table, nn.Embedding) else self.get_output_embeddings()
        name, draw = next((n, self.init_plan()[n]) for n, p in self.named_parameters() if p is old.weight)
        key = name.removeprefix(f"{self.base_model_prefix}.")
        normal = standard_normal(table.weight.shape, self.config.init_seed, key, draw.cut)
        table.weight.copy_(normal * draw.sigma)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Transformers' own; with `mean_resizing=False` new rows are drawn like the old ones."""
        table: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        for module in (self.get_input_embeddings(), self.get_output_embeddings()):
            for parameter in () if module is None else module.parameters():
                parameter._is_hf_initialized = True  # a later post_init would draw a new head again
        return table


@dataclass
class SpanNormModelOutput(MoeModelOutputWithPast):
    """The decoder's output. On request also:

    `hidden_states` (`output_hidden_states`): the input of each block's attention before its norm, and the head's input
    after the final norm; L + 1 of (batch, seq, hidden), for any placement.
    `streams` (`output_streams`): the state after each block; with several streams (batch, seq, n, hidden).
    """

    streams: tuple[Tensor, ...] | None = None


class SpanNormModel(SpanNormPreTrainedModel):
    """The decoder: embedding, blocks, and the norms that the placement needs at both ends."""

    def __init__(self, config: SpanNormConfig) -> None:
        super().__init__(config)
        table, scale = (config.vocab_size, config.hidden_size, config.pad_token_id), config.embedding_multiplier
        self.embed_tokens = nn.Embedding(*table) if scale in (None, 1.0) else ScaledEmbedding(*table, scale)
        self.layers = nn.ModuleList(SpanNormDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = config.stack.new_norm(config.hidden_size) if config.stack.final_norm else nn.Identity()
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.hidden_state = HiddenState()
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> SpanNormModelOutput:
        """Token ids (batch, seq) or embeddings (batch, seq, hidden) → hidden states (batch, seq, hidden).

        Embeddings must be outputs of `get_input_embeddings()`, so that its `embed_scale` is included.
        `past_key_values` is the older name of `cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if cache is None:
            cache = DynamicCache(config=self.config) if use_cache and past_key_values is None else past_key_values
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        record = kwargs.pop("output_hidden_states", self.config.output_hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                record=record,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        return SpanNormModelOutput(last_hidden_state=self.hidden_state(self.norm(hidden_states)), **{CACHE: cache})


@dataclass
class SpanNormOutput(MoeCausalLMOutputWithPast):
    """The causal LM's output. `hidden_states` and `streams` are the decoder's.

    A mixture of experts, with labels, also returns the load-balancing loss `aux_loss` and the router z-loss `z_loss`,
    each summed over the sparse layers, before its coefficient."""

    z_loss: Tensor | None = None
    streams: tuple[Tensor, ...] | None = None


class SpanNormForCausalLM(SpanNormPreTrainedModel, GenerationMixin):
    """A causal language model with any placement.

    With `placement="pre"` it computes what Transformers' Llama computes from the same weights.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: SpanNormConfig) -> None:
        super().__init__(config)
        self.model = SpanNormModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        loss_chunk: int = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> SpanNormOutput:
        """Logits (batch, seq, vocab), and with `labels` (batch, seq; shifted inside, -100 ignored) the mean
        cross-entropy in nats per token.

        With `loss_chunk` the loss is computed in chunks of `loss_chunk` tokens, whose logits backward computes again.
        At most (loss_chunk, vocab) logits are in memory, and none are returned.

        In training a mixture of experts adds `router_aux_loss_coef · aux_loss + router_z_loss_coef · z_loss`. A
        sequence's weight is its share of the predictions, or of `num_items_in_batch` where the caller gives it, as in
        the cross-entropy. So the losses of the parts of a step add up to the loss of the step, however it is split.
        """
        balanced = labels is not None and self.training and self.config.num_experts > 0
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=balanced or output_router_logits or False,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        chunked = labels is not None and loss_chunk > 0
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if chunked else self.lm_head(hidden[:, kept, :])
        loss = aux_loss = z_loss = None
        if labels is not None:
            if logits is None:
                loss = self._chunked_loss(hidden, labels, loss_chunk, **kwargs)
            else:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if outputs.router_logits:
                aux_loss, z_loss = self._router_losses(outputs.router_logits, labels, attention_mask, **kwargs)
                if self.training:
                    loss = loss + self.config.router_aux_loss_coef * aux_loss + self.config.router_z_loss_coef * z_loss
        return SpanNormOutput(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            streams=outputs.streams,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _chunked_loss(
        self,
        hidden: Stream,
        labels: Tensor,
        chunk: int,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        targets = next_tokens(labels) if shift_labels is None else shift_labels
        count = (targets != -100).sum() if num_items_in_batch is None else num_items_in_batch
        kwargs |= {"labels": None, "vocab_size": self.config.vocab_size, "num_items_in_batch": count}

        def part_loss(h: Tensor, y: Tensor) -> Tensor:
            return self.loss_function(logits=self.lm_head(h), shift_labels=y, **kwargs)

        return chunked_loss(part_loss, hidden, targets, chunk)

    def _router_losses(
        self,
        router_logits: tuple[Tensor, ...],
        labels: Tensor,
        attention_mask: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        router = next(module for module in self.modules() if isinstance(module, TopKRouter))
        targets = next_tokens(labels) if shift_labels is None else shift_labels
        return router_losses(self.config, router, router_logits, targets, attention_mask, num_items_in_batch)


class SpanNormForSequenceClassification(GenericForSequenceClassification, SpanNormPreTrainedModel):
    """The decoder and a head on the last token of a sequence: (batch, labels)."""


class SpanNormForTokenClassification(GenericForTokenClassification, SpanNormPreTrainedModel):
    """The decoder and a head on every token: (batch, seq, labels)."""
