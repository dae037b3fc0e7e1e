"""Why a test of Transformers' fails on our models: every failure that is expected, with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Known:
    test: str
    """Name of the test, with `*` for any text."""
    reason: str
    models: tuple[str, ...] = ("*",)
    """Names of the models, likewise."""

    def covers(self, model: str, test: str) -> bool:
        return any(fnmatchcase(model, name) for name in self.models) and fnmatchcase(test, self.test)


DENSE = ("pre", "span", "siamese", "hybrid")

OURS = (*DENSE, "mixture")

KNOWN = (
    Known(
        "test_bc_cache_name_forward",
        "`past_key_values` is taken without a warning that it is deprecated: it is the name up to Transformers 5.23, "
        "which we support too",
        OURS,
    ),
    Known(
        "test_eager_matches_batched_and_grouped_inference*",
        "one class serves dense models and mixtures, so the test asks a dense model for its experts",
        DENSE,
    ),
    Known(
        "test_training_gradient_checkpointing_use_reentrant_true",
        "reentrant checkpointing hides the routers from the auxiliary losses: the model refuses it and says what to do",
        ("mixture",),
    ),
    Known(
        "test_retain_grad_hidden_states_attentions",
        "of several streams a hidden state is computed beside the path, so no gradient arrives at it: the streams have "
        "theirs",
        ("siamese",),
    ),
    Known(
        "test_base_model_prefix_loads_base_weights",
        "the test makes the body by its class alone, which is the family's: a configuration does not rewire",
        ("rewired llama",),
    ),
)
