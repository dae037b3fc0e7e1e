"""What only a GPU shows: our models in bf16 with Triton's kernels against themselves in float64 on the CPU.

`make test-gpu` runs these, and the kernels' own tests, which take the GPU where there is one.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spannorm import PLACEMENTS, kernels

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 4}


def model_of(config, dtype=torch.float32, device=CUDA):
    from spannorm.models import SpanNormForCausalLM

    return SpanNormForCausalLM(config).to(device, dtype)


def step(model, ids, autocast=False):
    """The loss and the gradient of every parameter, in float64 on the CPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out = model(ids.to(model.device), labels=ids.to(model.device))
    out.loss.backward()
    return out.loss.double().cpu(), {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def relative(actual, expected) -> float:
    """‖actual − expected‖ ∕ ‖expected‖ over all tensors."""
    apart = sum((actual[n] - g).square().sum() for n, g in expected.items())
    return float((apart / sum(g.square().sum() for g in expected.values())).sqrt())


@pytest.fixture(params=["dense", "experts"])
def config_of(request, tiny_config):
    more = EXPERTS if request.param == "experts" else {}
    return lambda placement, **options: tiny_config(placement=placement, hidden_size=64, intermediate_size=96,
                                                    **more, **options)  # fmt: skip


@pytest.fixture
def ids():
    return torch.randint(37, (4, 33))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_loss_and_gradients_are_those_of_float64_on_the_cpu(placement, kernel, config_of, ids):
    exact_loss, exact = step(model_of(config_of(placement, experts_implementation="eager"), torch.float64, "cpu"), ids)
    kernels.use(kernel)
    try:
        model = model_of(config_of(placement))
        loss, gradients = step(model, ids)
        assert abs(loss - exact_loss) < 1e-5 and relative(gradients, exact) < 1e-4
        model.zero_grad()
        loss, gradients = step(model, ids, autocast=True)
        # bf16 keeps 8 bits; a router near a tie may choose otherwise, so a mixture is held to its loss alone
        assert abs(loss - exact_loss) < 0.02 * exact_loss
        dense = getattr(model.config, "num_experts", 0) == 0
        assert all(g.isfinite().all() for g in gradients.values()) and (not dense or relative(gradients, exact) < 0.1)
    finally:
        kernels.use("auto")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_draw_is_the_same_on_a_gpu(placement, config_of):
    on_cpu, config = model_of(config_of(placement), device="cpu"), config_of(placement)
    with CUDA:
        on_gpu = model_of(config)
    assert all(torch.equal(p.cpu(), on_cpu.state_dict()[name]) for name, p in on_gpu.state_dict().items())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_with_a_cache_is_decoding_without(placement, cache, config_of):
    model = model_of(config_of(placement), torch.bfloat16).eval()
    prompt = torch.randint(1, 37, (2, 5), device=CUDA)  # 0 is padding, and would be masked
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True,
               "return_dict_in_generate": True}  # fmt: skip
    static = {"cache_implementation": "static"} if cache == "static" else {}
    cached = model.generate(prompt, **options, **static, **({"disable_compile": True} if static else {}))
    logits = model(cached.sequences).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(cached.logits, 1).float(), logits.float(), rtol=0.1, atol=0.1)


COMPILED = """
import sys, torch
from spannorm.models import SpanNormConfig, SpanNormForCausalLM
x = torch.randint(37, (2, 33), device="cuda")
for placement in sys.argv[1:]:
    torch._dynamo.reset()
    config = SpanNormConfig(vocab_size=37, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                            num_attention_heads=4, placement=placement)
    model = SpanNormForCausalLM(config).cuda()
    results = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        out = run(x, labels=x)
        out.loss.backward()
        results.append([out.logits, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    print("same", placement)
"""


def test_a_compiled_model_is_the_model():
    names = ["span", "pre", "siamese", "mhc", "attnres_block"]
    done = subprocess.run([sys.executable, "-c", COMPILED, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"same {name}" for name in names]


@pytest.mark.parametrize("placement", ["span", "siamese"])
def test_a_model_in_bf16_reads_flash_attention_and_checkpoints_the_same(placement, config_of, ids):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = model_of(config_of(placement)).train()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where it cannot run
        _, plain = step(model, ids, autocast=True)
        model.zero_grad()
        model.gradient_checkpointing_enable()
        _, checkpointed = step(model, ids, autocast=True)
    assert relative(checkpointed, plain) < 1e-6
