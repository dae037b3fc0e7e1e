"""The Hugging Face side: configuration and models, registered with the Auto classes on import."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from spannorm.models.configuration import SpanNormConfig
from spannorm.models.modeling import SpanNormForCausalLM, SpanNormModel

AutoConfig.register(SpanNormConfig.model_type, SpanNormConfig)
AutoModel.register(SpanNormConfig, SpanNormModel)
AutoModelForCausalLM.register(SpanNormConfig, SpanNormForCausalLM)

__all__ = ["SpanNormConfig", "SpanNormForCausalLM", "SpanNormModel"]
