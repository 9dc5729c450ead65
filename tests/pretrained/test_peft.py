"""PEFT's adapters on top of offloaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import pylomin
from pylomin.lazy.tensor import OffloadedTensor
from tests.families.compare import assert_same, flatten, outputs_of
from tests.families.family import Inputs

from .common import both, in_memory, saved, values_of

# What peft calls of transformers has another name by now.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*gradient_checkpointing_enable.*:FutureWarning",
    "ignore:fan_in_fan_out:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:The following .*_pattern keys:RuntimeWarning",
)

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Any, Any, Inputs]:
    """The model of transformers and ours, with adapters of equal random weights."""
    model_class, inputs = saved("llama", tmp_path / "model")
    return *(with_adapter(model) for model in both(model_class, tmp_path / "model")), inputs


def with_adapter(model: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def test_forward_and_generate(adapted: tuple[Any, Any, Inputs]) -> None:
    expected, actual, inputs = adapted
    names = in_memory(actual)
    assert names
    assert all(".lora_" in name for name in names)
    for _ in range(2):
        assert_same(outputs_of(expected, inputs), outputs_of(actual, inputs))
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    prompt = {"input_ids": inputs["input_ids"]}
    assert torch.equal(expected.generate(**prompt, **options), actual.generate(**prompt, **options))
    with expected.disable_adapter(), actual.disable_adapter():
        assert_same(outputs_of(expected, inputs), outputs_of(actual, inputs))


def test_training_reaches_the_adapter(adapted: tuple[Any, Any, Inputs]) -> None:
    expected, actual, inputs = adapted
    for _ in range(2):
        for model in (expected, actual):
            model.train()
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.SGD(parameters, lr=0.1)
            optimizer.zero_grad()
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
    gradients = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 * len(TARGETS) * 2
    for name, parameter in actual.named_parameters():
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name]), name
    assert_same(outputs_of(expected.eval(), inputs), outputs_of(actual.eval(), inputs))


def gradients(model: Any, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Of all that is trained, after one step without noise."""
    model.zero_grad()
    model(**inputs)[0].float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


FAMILIES = ["llama", "gpt2", "bert", "t5", "opt", "bloom", "qwen3_moe", "mamba", "vit", "whisper"]


@pytest.mark.parametrize("budget", [None, 1 << 17], ids=["streamed", "budget"])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_adapters_on_every_linear(name: str, budget: int | None, tmp_path: Path) -> None:
    model_class, inputs = saved(name, tmp_path / "model")
    expected, actual = both(model_class, tmp_path / "model")
    if budget is not None:
        pylomin.set_memory_budget(actual, budget)
        pylomin.prefetch(actual)
    targets: Any = ["in_proj", "x_proj"] if name == "mamba" else "all-linear"  # peft refuses some of its linears
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    results = []
    for base in (expected, actual):
        torch.manual_seed(0)
        results.append(peft.get_peft_model(base, config).eval())
    for _ in range(3):
        left, right = (gradients(model, inputs) for model in results)
        assert left
        assert left.keys() == right.keys()
        for key, gradient in left.items():
            # What runs by tiles rounds otherwise; so does mamba's product of a weight and a batch.
            if budget is None and name != "mamba":
                assert torch.equal(gradient, right[key]), key
            else:
                torch.testing.assert_close(right[key], gradient, rtol=1e-4, atol=1e-5, msg=key)
    if budget is not None:
        assert pylomin.stats(actual).peak_bytes <= budget


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name: str, reentrant: bool, tmp_path: Path) -> None:
    model_class, inputs = saved(name, tmp_path / "model")
    results = []
    for base in both(model_class, tmp_path / "model"):
        torch.manual_seed(0)
        model: Any = peft.get_peft_model(
            base, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        )
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        results.append(gradients(model.train(), inputs | {"use_cache": False}))
    assert results[0].keys() == results[1].keys()
    for key, gradient in results[0].items():
        assert torch.equal(gradient, results[1][key]), key


@pytest.mark.parametrize("tuner", ["modules_to_save", "norms"])
def test_modules_that_peft_trains_are_restored_before(tuner: str, tmp_path: Path) -> None:
    model_class, inputs = saved("llama", tmp_path / "model")
    expected, actual = both(model_class, tmp_path / "model")
    if tuner == "norms":
        config: Any = peft.LNTuningConfig(target_modules=["input_layernorm"])
        trained = [layer.input_layernorm for layer in actual.model.layers]
    else:
        config = peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"], init_lora_weights=False)
        trained = [actual.lm_head]
    pylomin.restore(actual, target_modules=trained)
    results = []
    for base in (expected, actual):
        torch.manual_seed(0)
        results.append(gradients(peft.get_peft_model(base, config).eval(), inputs))
    assert results[0].keys() == results[1].keys()
    assert any("layernorm" in name if tuner == "norms" else "lm_head" in name for name in results[0])
    for key, gradient in results[0].items():
        assert torch.equal(gradient, results[1][key]), key


def test_merge_and_unload(adapted: tuple[Any, Any, Inputs]) -> None:
    expected, actual, inputs = adapted
    expected, actual = expected.merge_and_unload(), actual.merge_and_unload()
    assert all(isinstance(parameter, OffloadedTensor) for parameter in actual.parameters())
    assert_same(flatten(values_of(expected), "state"), flatten(values_of(actual), "state"))
    assert_same(outputs_of(expected, inputs), outputs_of(actual, inputs))


def test_adapter_is_saved_and_loaded(adapted: tuple[Any, Any, Inputs], tmp_path: Path) -> None:
    expected, actual, inputs = adapted
    expected.save_pretrained(tmp_path / "expected")
    actual.save_pretrained(tmp_path / "actual")
    name = "adapter_model.safetensors"
    assert (tmp_path / "actual" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()
    model_class = type(expected.base_model.model)
    _, fresh = both(model_class, tmp_path / "model")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "actual").eval()
    assert_same(outputs_of(expected, inputs), outputs_of(again, inputs))
