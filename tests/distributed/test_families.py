"""Models of transformers under its own tensor-parallel plans: as one process computes them, within rounding."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

import pylomin
from pylomin.lazy.distributed import local_of
from pylomin.lazy.tensor import OffloadedTensor
from tests.distributed.ranks import check, launch
from tests.families.catalog import BY_NAME

FAMILIES = (
    *("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "starcoder2", "glm4"),
    *("gptj", "gpt_neox", "granite", "cohere2", "t5gemma", "eurobert", "nemotron", "minicpm3"),
    *("mixtral", "qwen3_moe", "deepseek_v2", "llama4", "gpt_oss", "jamba", "llava", "qwen2_audio"),
)


def case_of(name: str) -> Callable[[Path], None]:
    def case(directory: Path) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        os.environ |= {
            "RANK": str(dist.get_rank()),
            "LOCAL_RANK": str(dist.get_rank()),
            "WORLD_SIZE": str(dist.get_world_size()),
        }
        family = BY_NAME[name]
        alone: Any = family.build()
        path = directory / name
        alone.save_pretrained(path)  # which the first rank does
        dist.barrier()
        model = pylomin.from_pretrained(type(alone), path, tp_plan="auto", tp_size=dist.get_world_size())
        assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert all(isinstance(local_of(parameter), OffloadedTensor) for parameter in model.parameters())
        inputs = family.inputs()
        with torch.no_grad():
            expected = alone(**inputs)[0]
            outputs = [model(**inputs)[0] for _ in range(2)]  # before anything raises, which the others do not see
        for output in outputs:
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)

    return case


def case_arguments(directory: Path) -> None:
    path = directory / "arguments"
    alone: Any = BY_NAME["llama"].build()
    alone.save_pretrained(path)
    dist.barrier()
    with pytest.raises(pylomin.PassError, match="shards the model by FSDP"):
        pylomin.from_pretrained(type(alone), path, distributed_config={"fsdp_size": 2})
    with pytest.raises(pylomin.PassError, match="give either distributed_config or tp_size"):
        pylomin.from_pretrained(type(alone), path, distributed_config={"tp_size": 2}, tp_size=2)


CASES = {name: case_of(name) for name in FAMILIES} | {"arguments": case_arguments}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch("test_families", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_family(case: str, results: dict[str, list[Any]]) -> None:
    check(results[case])
