"""Every family gives the same bits with its weights on disk as in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .catalog import BY_NAME, FAMILIES
from .compare import NamedTensors, assert_same, flatten, outputs_of
from .family import Family

GENERATING = tuple(family for family in FAMILIES if family.generates)
# transformers cannot reorder the state of these.
WITHOUT_BEAM_SEARCH = {"rwkv", "xlstm"}

GREEDY: dict[str, Any] = {"do_sample": False}
BEAM_SEARCH: dict[str, Any] = {"do_sample": False, "num_beams": 3}
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 20}


def families(*names: str) -> pytest.MarkDecorator:
    """Run a test for the families of these names, or for all."""
    chosen = [BY_NAME[name] for name in names] if names else list(FAMILIES)
    return pytest.mark.parametrize("family", chosen, ids=[family.name for family in chosen])


def resident(family: Family) -> nn.Module:
    """The model to compare with: as its authors build it, trainable."""
    return family.build()


@dataclass(frozen=True)
class Reference:
    """What a family's resident model is and does."""

    forwards: tuple[NamedTensors, NamedTensors]
    state: dict[str, Tensor]


@dataclass(frozen=True)
class Structure:
    """All of a model but its values: by name, class of a module; first name, kind of a tensor."""

    classes: dict[str, type]
    parameters: dict[str, tuple[str, type, torch.dtype, bool]]
    buffers: dict[str, tuple[str, type, torch.dtype, bool]]

    @staticmethod
    def of(model: nn.Module) -> Structure:
        return Structure(
            {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
            _identities(dict(model.named_parameters(remove_duplicate=False))),
            _identities(dict(model.named_buffers(remove_duplicate=False))),
        )


def _identities(
    tensors: Mapping[str, Tensor],
) -> dict[str, tuple[str, type, torch.dtype, bool]]:
    first: dict[int, str] = {}
    return {
        name: (
            first.setdefault(id(tensor), name),
            type(tensor),
            tensor.dtype,
            tensor.requires_grad,
        )
        for name, tensor in tensors.items()
    }


@cache
def reference(name: str) -> Reference:
    family = BY_NAME[name]
    model = resident(family)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    forwards = outputs_of(model, family.inputs()), outputs_of(model, family.inputs())
    return Reference(forwards, state)


def assert_forwards(model: nn.Module, family: Family, times: int = 2) -> None:
    """The first ``times`` forwards give the bits of the resident model's."""
    expected = reference(family.name).forwards
    for index in range(times):
        assert_same(expected[min(index, 1)], outputs_of(model, family.inputs()))


def assert_offloaded(model: nn.Module) -> None:
    in_memory = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not isinstance(parameter, OffloadedTensor)
    ]
    assert not in_memory


def generate(model: nn.Module, family: Family, options: Mapping[str, Any]) -> NamedTensors:
    """Five tokens after the prompt, with the scores they were chosen by."""
    torch.manual_seed(0)
    generate_tokens: Callable[..., Any] = model.generate  # type: ignore[assignment]
    output = generate_tokens(
        **family.prompt(),
        **options,
        max_new_tokens=5,
        min_new_tokens=5,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return flatten({"sequences": output.sequences, "scores": output.scores})


def chunk_first_embedding(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings > 1 and not module.max_norm:
            return pylomin.chunked_embedding(model, target_modules=[module], chunk_size=7)
    return model


@families()
def test_lazy_loading_keeps_every_bit(family: Family) -> None:
    model = family.build()
    assert pylomin.lazy_loading(model) is model
    assert_offloaded(model)
    assert_forwards(model, family)
    assert_offloaded(model)


@families()
def test_all_passes_keep_every_bit(family: Family) -> None:
    model = pylomin.lazy_loading(family.build())
    model = pylomin.prefetch(chunk_first_embedding(model))
    assert_forwards(model, family, times=3)
    assert_offloaded(model)


@families("bert", "gpt2", "t5", "opt", "mixtral", "mamba", "whisper", "llava")
@pytest.mark.parametrize(
    "passes",
    [
        (chunk_first_embedding, pylomin.lazy_loading, pylomin.prefetch),
        (pylomin.lazy_loading, pylomin.prefetch, chunk_first_embedding),
    ],
    ids=["chunk-lazy-prefetch", "lazy-prefetch-chunk"],
)
def test_order_of_passes_is_free(family: Family, passes: tuple[Callable[[nn.Module], nn.Module], ...]) -> None:
    model = family.build()
    for apply in passes:
        model = apply(model)
    assert_forwards(model, family, times=3)
    assert_offloaded(model)


@families()
def test_restore_gives_the_model_back(family: Family) -> None:
    model = family.build()
    structure = Structure.of(model)
    pylomin.prefetch(chunk_first_embedding(pylomin.lazy_loading(model)))
    outputs_of(model, family.inputs())
    assert pylomin.restore(model) is model

    expected = reference(family.name)
    assert Structure.of(model) == structure
    assert_same(flatten(expected.state, "state"), flatten(model.state_dict(), "state"))
    assert_same(expected.forwards[1], outputs_of(model, family.inputs()))


@pytest.mark.parametrize("family", GENERATING, ids=lambda family: family.name)
def test_generation_keeps_every_token(family: Family) -> None:
    oracle = resident(family)
    model = pylomin.prefetch(pylomin.lazy_loading(family.build()))
    searches = [GREEDY] if family.name in WITHOUT_BEAM_SEARCH else [GREEDY, BEAM_SEARCH]
    for options in searches:
        assert_same(generate(oracle, family, options), generate(model, family, options))


@families("gpt2", "llama", "mixtral", "mamba", "t5", "whisper", "llava")
def test_sampling_keeps_every_token(family: Family) -> None:
    model = pylomin.lazy_loading(family.build())
    assert_same(generate(resident(family), family, SAMPLING), generate(model, family, SAMPLING))


@families("bert", "gpt2", "llama", "t5", "mixtral", "vit", "wav2vec2", "mamba")
def test_tight_budget_is_kept(family: Family) -> None:
    model = family.build()
    owned = [sum(parameter.nbytes for parameter in module.parameters(recurse=False)) for module in model.modules()]
    budget = 2 * max(owned)  # one in use, one on its way
    assert budget < sum(parameter.nbytes for parameter in model.parameters())

    model = pylomin.prefetch(pylomin.lazy_loading(model, memory_budget=budget))
    assert_forwards(model, family, times=3)
    assert 0 < pylomin.stats(model).peak_bytes <= budget


@families("bert", "deberta", "gpt2", "mixtral", "mamba2", "vit", "wav2vec2", "clip", "siglip")
def test_inference_mode_keeps_every_bit(family: Family) -> None:
    oracle = resident(family)
    model = pylomin.lazy_loading(family.build())
    for _ in range(2):
        with torch.inference_mode():
            expected, actual = oracle(**family.inputs()), model(**family.inputs())
        assert_same(flatten(expected), flatten(actual))


@families("bert", "gpt2", "llama", "t5", "mixtral")
def test_half_precision_keeps_every_bit(family: Family) -> None:
    oracle = resident(family).to(torch.bfloat16)
    model = pylomin.lazy_loading(family.build().to(torch.bfloat16))
    for _ in range(2):
        assert_same(outputs_of(oracle, family.inputs()), outputs_of(model, family.inputs()))


@families(
    "bert",
    "albert",
    "deberta_v2",
    "gpt2",
    "llama",
    "gemma3",
    "t5",
    "bart",
    "mixtral",
    "deepseek_v3",
    "switch_transformers",
    "mamba",
    "zamba2",
    "vit",
    "resnet",
    "wav2vec2",
    "encodec",
    "whisper",
    "clip",
    "llava",
)
def test_load_from_a_file_keeps_every_bit(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(family.build(), str(path))  # of tied weights, only one name is in the file

    def build_empty() -> nn.Module:
        torch.manual_seed(0)
        return family.construct().eval()

    model = pylomin.load(build_empty, path)
    assert_offloaded(model)
    assert_forwards(model, family)
    assert_offloaded(model)
