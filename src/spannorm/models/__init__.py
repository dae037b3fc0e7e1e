"""The Hugging Face side: configuration and models, registered with the Auto classes on import."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spannorm.models.configuration import SpanNormConfig
from spannorm.models.modeling import (
    SpanNormForCausalLM,
    SpanNormForSequenceClassification,
    SpanNormForTokenClassification,
    SpanNormModel,
)

# What Transformers decides by the class's name: that its Trainer shifts labels before it smooths them, its pipelines.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[SpanNormConfig.model_type] = SpanNormForCausalLM.__name__
AutoConfig.register(SpanNormConfig.model_type, SpanNormConfig)
for auto, model in (
    (AutoModel, SpanNormModel),
    (AutoModelForCausalLM, SpanNormForCausalLM),
    (AutoModelForSequenceClassification, SpanNormForSequenceClassification),
    (AutoModelForTokenClassification, SpanNormForTokenClassification),
):
    auto.register(SpanNormConfig, model)

__all__ = [
    "SpanNormConfig",
    "SpanNormForCausalLM",
    "SpanNormForSequenceClassification",
    "SpanNormForTokenClassification",
    "SpanNormModel",
]
