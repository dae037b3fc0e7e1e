"""A mixture of experts as a feed-forward: Transformers' Qwen3-MoE router and experts, with norms inside each expert."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import _grouped_linear
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP, Qwen3MoeTopKRouter

from spannorm.errors import InputError
from spannorm.models.configuration import SpanNormConfig


class TopKRouter(Qwen3MoeTopKRouter):
    """Qwen3-MoE's router, except that the softmax of a float64 model stays float64."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (tokens, hidden) → logits (tokens, experts); weights and indices of the chosen experts (tokens, k)."""
        logits = F.linear(hidden_states, self.weight)
        probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), chosen


class ExpertNorm(nn.Module):
    """A norm on each expert's channels. Each expert has its own gain: `weight` is (experts, channels)."""

    def __init__(self, config: SpanNormConfig) -> None:
        super().__init__()
        shape = config.num_experts, config.moe_intermediate_size
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if config.norm == "layernorm" else None

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        """Rows (rows, channels) and the expert of each (rows,)."""
        if self.bias is None:
            return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight[expert].to(x.dtype)
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return normed * self.weight[expert].to(x.dtype) + self.bias[expert].to(x.dtype)


class Experts(Qwen3MoeExperts):
    """Qwen3-MoE's experts, except that a float64 model runs them one by one: PyTorch's `grouped_mm` has no float64."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        alone = hidden_states.dtype == torch.float64 and self.config._experts_implementation == "grouped_mm"
        run = Qwen3MoeExperts.forward.__wrapped__ if alone else Qwen3MoeExperts.forward
        y: Tensor = run(self, hidden_states, top_k_index, top_k_weights)
        return y


class NormedExperts(Qwen3MoeExperts):
    """Qwen3-MoE's experts, except that each normalizes what its down projection reads.

    Rows are sorted by expert, so that `eager` is a loop over slices and `grouped_mm` one call. `generate` uses
    `batched_mm` for single tokens on a GPU; it copies the expert's matrix for each row.
    """

    def __init__(self, config: SpanNormConfig) -> None:
        super().__init__(config)
        self.down_norm = ExpertNorm(config)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        k = top_k_index.shape[-1]
        expert, order = top_k_index.flatten().sort(stable=True)
        rows = F.one_hot(expert, self.num_experts).sum(0)
        gate, up = self._linear(hidden_states[order // k], self.gate_up_proj, expert, rows).chunk(2, dim=-1)
        y = self._linear(self.down_norm(self.act_fn(gate) * up, expert), self.down_proj, expert, rows)
        y = y * top_k_weights.flatten()[order, None]
        return y[order.argsort()].unflatten(0, (-1, k)).sum(1).to(hidden_states.dtype)

    def _linear(self, x: Tensor, weight: Tensor, expert: Tensor, rows: Tensor) -> Tensor:
        """Each expert's rows times its own matrix."""
        how = self.config._experts_implementation or "eager"
        if how == "grouped_mm" and x.dtype != torch.float64:
            return _grouped_linear(x, weight, rows.cumsum(0, dtype=torch.int32))
        if how == "batched_mm":
            return torch.bmm(weight[expert], x.unsqueeze(-1)).squeeze(-1)
        if how not in ("eager", "grouped_mm"):
            raise InputError(f"experts with a norm inside run as 'eager', 'grouped_mm' or 'batched_mm'; got {how!r}.")
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(rows.tolist()), weight, strict=True)])


class MixtureOfExperts(nn.Module):
    """Each token goes to its k most likely experts, and to the shared expert if there is one.

        x ─ gate ─ top k ─ w
        x ─ experts i ∈ top k ─ Σ w_i·E_i(x) ─(+)─ y
        x ─ shared expert ─────────────────────┘

    Equation: `y = Σ_{i ∈ top k} w_i·E_i(x) + S(x)`, w the softmax over all experts; with `norm_topk_prob` it is divided
    by its sum over the chosen experts.
    Source: Qwen3-MoE, arXiv 2505.09388. The shared expert, added without a gate: DeepSeekMoE, arXiv 2401.06066.

    Args:
        inner_norms: from `Placement.inner_norms`; the norm on ffn_down is in every expert.
    """

    def __init__(self, config: SpanNormConfig, inner_norms: Mapping[str, str]) -> None:
        super().__init__()
        self.gate = TopKRouter(config)
        self.experts = (NormedExperts if "ffn_down" in inner_norms else Experts)(config)
        self.shared_expert: nn.Module | None = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = Qwen3MoeMLP(config, config.shared_expert_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        _, weights, chosen = self.gate(tokens)
        y: Tensor = self.experts(tokens, chosen, weights).view(x.shape)
        return y if self.shared_expert is None else y + self.shared_expert(x)
