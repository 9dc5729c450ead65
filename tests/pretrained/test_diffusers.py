"""Models and pipelines of diffusers, which need no loader of their own: ``lazy_loading`` and ``load`` take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import pylomin
from tests.families.compare import aligned, assert_same, outputs_of
from tests.families.family import Inputs, floats

from .common import in_memory


def unet() -> Any:
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def flux() -> Any:
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def autoencoder() -> Any:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
    ).eval()


def unet_inputs() -> Inputs:
    return {
        "sample": floats(1, 4, 8, 8),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": floats(1, 5, 16, seed=1),
    }


def flux_inputs() -> Inputs:
    return {
        "hidden_states": floats(1, 16, 4),
        "encoder_hidden_states": floats(1, 6, 32, seed=1),
        "pooled_projections": floats(1, 32, seed=2),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }


def autoencoder_inputs() -> Inputs:
    return {"sample": floats(1, 3, 16, 16)}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(unet, unet_inputs), (flux, flux_inputs), (autoencoder, autoencoder_inputs)],
    ids=["unet", "flux", "autoencoder"],
)
def test_models(build: Callable[[], Any], inputs: Callable[[], Inputs], tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = build()
    expected = outputs_of(plain, inputs())
    plain.save_pretrained(tmp_path / "saved")
    loaded = pylomin.load(build, tmp_path / "saved")
    assert in_memory(loaded) == set()
    loaded.save_pretrained(tmp_path / "again")
    again = type(plain).from_pretrained(tmp_path / "again", low_cpu_mem_usage=False)
    for model in (pylomin.prefetch(pylomin.lazy_loading(plain)), loaded, aligned(again.eval())):
        for _ in range(2):
            assert_same(expected, outputs_of(model, inputs()))


def tokenizer(directory: Path) -> CLIPTokenizer:
    letters = "abcdefgh"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (directory / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    made = CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
    made.model_max_length = 16
    return made


def components(directory: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=18,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    models = {"unet": unet(), "vae": autoencoder(), "text_encoder": CLIPTextModel(config).eval()}
    return models | {"scheduler": scheduler, "tokenizer": tokenizer(directory)}


def pipeline(parts: dict[str, Any]) -> Any:
    made = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def picture(made: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    output = made("a b c", num_inference_steps=2, height=16, width=16, generator=generator, output_type="np")
    return torch.from_numpy(output.images)


def test_pipeline(tmp_path: Path) -> None:
    expected = picture(pipeline(components(tmp_path)))
    parts = components(tmp_path)
    for name in ("unet", "vae", "text_encoder"):
        pylomin.lazy_loading(parts[name])
    offloaded = pipeline(parts)
    assert torch.equal(picture(offloaded), expected)
    offloaded.save_pretrained(tmp_path / "saved")

    empty = components(tmp_path)
    for name, build in {"unet": unet, "vae": autoencoder}.items():
        empty[name] = pylomin.load(build, tmp_path / "saved" / name)
    empty["text_encoder"] = pylomin.from_pretrained(CLIPTextModel, tmp_path / "saved" / "text_encoder")
    assert torch.equal(picture(pipeline(empty)), expected)
