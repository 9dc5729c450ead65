"""PEFT's adapters on top of offloaded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from pylomin.lazy.tensor import OffloadedTensor
from tests.families.compare import assert_same, flatten, outputs_of
from tests.families.family import Inputs

from .common import both, in_memory, saved, values_of

# What peft calls of transformers has another name by now.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

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
