"""Transformers' suites on each of our models: one class a model and suite, and no test of our own."""

from __future__ import annotations

import unittest
from typing import Any

import tests.test_executorch as executorch
import tests.test_expert_parallel_mixin as expert_parallel
import tests.test_fsdp_mixin as fsdp
import tests.test_tensor_parallel_mixin as tensor_parallel
import torch
from models import MODELS, REWIRED, ModelTester
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers import GenerationConfig, set_seed
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from spannorm.models import SpanNormConfig, SpanNormModel

# The suites run their distributed tests on a list of families; ours are not on it.
fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
expert_parallel.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
# How the common tests know a model without a head: as is done for each family when it is added to Transformers.
MODEL_MAPPING_NAMES.setdefault(SpanNormConfig.model_type, SpanNormModel.__name__)


class Configuration:
    """The configuration suite is no mixin, but a helper with one entry."""

    def test_config(self: Any) -> None:
        sizes = {"hidden_size": 64, "num_attention_heads": 4}
        ConfigTester(self, config_class=self.model_tester.config_class, **sizes).run_common_tests()


def suite(name: str) -> Any:
    """Every suite whose tests make their models by a tester."""

    class Suite(
        ModelTesterMixin,
        GenerationTesterMixin,
        TrainingTesterMixin,
        fsdp.FSDPTesterMixin,
        tensor_parallel.TensorParallelTesterMixin,
        expert_parallel.ExpertParallelTesterMixin,
        Configuration,
        unittest.TestCase,
    ):
        model_tester: Any = None
        test_can_init_all_missing_weights_before_2023 = True  # our files say no year

        def setUp(self) -> None:
            set_seed(0)
            self.model_tester = ModelTester(name)
            self.all_model_classes = self.model_tester.all_model_classes

        def _has_fsdp_plan(self) -> bool:  # asked first by each of FSDP's tests
            if name == REWIRED:
                self.skipTest("FSDP's tests make models by AutoModelForCausalLM, which makes no rewired one")
            return super()._has_fsdp_plan()

    return Suite


def executorch_suite(name: str) -> Any:
    """The suite of exported caches, on our model in place of one from the Hub."""

    class Suite(executorch.ExecutorchTest):
        def setUp(self) -> None:
            set_seed(42)
            tester = ModelTester(name)
            self.model = tester.causal_lm_class(tester.get_config()).eval()
            self.model.generation_config = GenerationConfig(
                use_cache=True,
                cache_implementation="static",
                cache_config={"batch_size": 1, "max_cache_len": 32, "device": "cpu"},
            )
            self.input_ids = torch.tensor([[1, 2, 3]])
            self.inputs_embeds = torch.randn(1, 3, self.model.config.hidden_size)
            self.cache_position = torch.arange(3)

    return Suite


for _model in MODELS:
    for _kind, _make in {"": suite, "__executorch": executorch_suite}.items():
        _class = _make(_model)
        _class.__name__ = _class.__qualname__ = f"Test_{_model.replace(' ', '_')}{_kind}"
        globals()[_class.__name__] = _class
del _class
