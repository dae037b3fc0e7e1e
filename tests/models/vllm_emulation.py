"""What vLLM's Transformers backend does to a model, on a CPU and without vLLM: it builds the body without weights, cuts
it by the pipeline plan, replaces parts, puts its own attention under all layers, and loads weights by name.

Written from https://docs.vllm.ai/en/stable/models/supported_models/#writing-custom-models and from how the backend
behaves. Not emulated: CUDA kernels and paged memory, the graph compiler, tensor parallelism, the merging of q, k and v
or of gate and up into one matrix, fused experts, quantization.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class Registry:
    """Stands where vLLM's registry of models does: this file plays the module that holds it."""

    def supports(self, config: Any) -> bool:
        """Whether the backend can take a model, which it asks the class of that name."""
        return getattr(transformers, config.architectures[0]).is_backend_compatible()


ModelRegistry = Registry()


class Attention:
    """One layer's keys and values so far, and causal attention over them; (tokens, heads · head size) in and out."""

    def __init__(self, config: Any) -> None:
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.keys = self.values = torch.empty(0, dtype=torch.float64)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.keys = torch.cat([self.keys, key]) if len(self.keys) else key
        self.values = torch.cat([self.values, value]) if len(self.values) else value
        q = query.unflatten(-1, (self.heads, -1))
        groups = self.heads // self.kv_heads
        k, v = (x.unflatten(-1, (self.kv_heads, -1)).repeat_interleave(groups, 1) for x in (self.keys, self.values))
        scores = torch.einsum("ihc,jhc->hij", q, k) * scale
        future = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hij,jhc->ihc", weights, v).flatten(1)


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface; the model has to pass `attention_instances` on to here."""
    assert mask is None, "vLLM's attention takes no mask"
    query, key, value = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    return kwargs["attention_instances"][module.layer_idx](query, key, value, scaling), None


ALL_ATTENTION_FUNCTIONS.register("vllm", attention)


class Linear(nn.Module):
    """In place of every `nn.Linear` and of whatever a subclass of it does besides."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """In place of the input embedding, of which it keeps the size and `embed_scale`."""

    def __init__(self, config: Any, old: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, device="meta"))
        self.scale = float(getattr(old, "embed_scale", 1.0))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight) * self.scale


class RMSNorm(nn.Module):
    """In place of a norm that takes one tensor, which the backend tells from its forward."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, getattr(norm, "variance_epsilon", getattr(norm, "eps", None))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Missing(nn.Module):
    """In place of what another stage holds: hands on what it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class Stage:
    """One process of a pipeline of `stages`, with the weights of a saved model."""

    def __init__(self, folder: Path, rank: int = 0, stages: int = 1) -> None:
        self.config = AutoConfig.from_pretrained(folder)
        assert ModelRegistry.supports(self.config)
        self.config._attn_implementation, self.config._experts_implementation = "vllm", "eager"
        with init_empty_weights(include_buffers=False):
            self.model = AutoModel.from_config(self.config, dtype=torch.float64).eval()
        self.first, self.last = rank == 0, rank == stages - 1
        depth = self.config.num_hidden_layers
        self.own = range(depth * rank // stages, depth * (rank + 1) // stages)
        if stages > 1:
            self.cut()
        self.replace(self.model)
        embedding = self.model.get_input_embeddings()
        if not isinstance(embedding, Missing):
            self.model.set_input_embeddings(Embedding(self.config, embedding))
        self.attention_instances = {i: Attention(self.config) for i in self.own}
        self.load(folder)

    def cut(self) -> None:
        """Leave what this stage holds: before the layers the first stage's, after them the last one's."""
        names = list(self.model._pp_plan)
        middle = names.index("layers")
        for i in set(range(self.config.num_hidden_layers)) - set(self.own):
            self.model.layers[i] = Missing()
        for name in names[:middle] if not (self.first or (self.config.tie_word_embeddings and self.last)) else []:
            setattr(self.model, name, Missing())
        for name in names[middle + 1 :] if not self.last else []:
            setattr(self.model, name, Missing())

    def replace(self, module: nn.Module) -> None:
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Linear(child))  # whatever the tensor-parallel plan says: there is one process
            elif type(child).__name__.endswith("RMSNorm") and len(inspect.signature(child.forward).parameters) == 1:
                setattr(module, name, RMSNorm(child))
            else:
                self.replace(child)

    def load(self, folder: Path) -> None:
        """Fill every parameter by its name in the checkpoint; one without a weight, or a weight without one, fails."""
        weights = load_file(folder / "model.safetensors")
        self.head = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"]).double()
        for name, _ in list(self.model.named_parameters()):
            owner = self.model.get_submodule(name.rpartition(".")[0])
            weight = weights.pop(f"model.{name}").double()
            setattr(owner, name.rpartition(".")[2], nn.Parameter(weight, requires_grad=False))
        self.left = set(weights)

    def __call__(self, given: Tensor, positions: Tensor) -> Tensor:
        """Token ids (tokens,) of the first stage, hidden states (tokens, hidden) of the others → the next one's input,
        or logits (tokens, vocab) of the last."""
        kind = "input_ids" if self.first else "inputs_embeds"
        hidden = self.model(
            **{kind: given[None]}, position_ids=positions[None], use_cache=False, return_dict=False,
            attention_instances=self.attention_instances,
        )[0][0]  # fmt: skip
        return hidden @ self.head.T if self.last else hidden


def served(folder: Path, ids: Tensor, prompt: int, stages: int = 1) -> Iterator[Tensor]:
    """Logits of the prompt's tokens at once, then of each token after it, through all stages."""
    pipeline = [Stage(folder, rank, stages) for rank in range(stages)]
    left = [stage.left for stage in pipeline]
    assert not set.intersection(*left), f"no stage loads {set.intersection(*left)}"
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, len(ids)))]:
        state = ids[start:end]
        for stage in pipeline:
            state = stage(state, torch.arange(start, end))
        yield state
