"""Text with images or sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .family import Config, Family, Inputs, family, floats, mel, pixels, seeded, text, token_ids
from .sizes import BART, BERT, LLAMA, SPECIAL, T5, VIT

IMAGE_TOKEN = 98


CLIP: dict[str, Any] = {
    "text_config": BERT | {"projection_dim": 16},
    "vision_config": VIT | {"projection_dim": 16},
    "projection_dim": 16,
}


LLAVA: dict[str, Any] = {
    "text_config": LLAMA | {"model_type": "llama"},
    "vision_config": VIT | {"model_type": "clip_vision_model"},
    "image_token_index": IMAGE_TOKEN,
}


def multimodal(
    name: str,
    model_class: str,
    config: Config,
    inputs: Callable[[], Inputs] | None = None,
    *,
    generates: bool = False,
) -> Family:
    return family("multimodal", name, model_class, config, inputs or captioned_image, generates=generates)


def captioned_image() -> Inputs:
    return text() | pixels()()


def image_in_text(
    image_tokens: int, *, token: int = IMAGE_TOKEN, images: Callable[[], Inputs] | None = None
) -> Callable[[], Inputs]:
    """Text whose first tokens stand for the image."""

    def inputs() -> Inputs:
        ids = token_ids(below=token)
        image = torch.full((2, image_tokens), token)
        return {"input_ids": torch.cat([image, ids], dim=1)} | (images or pixels())()

    return inputs


def _boxes(rows: int = 2, length: int = 8, *, below: int = 50) -> Tensor:
    """Boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, shape (rows, length, 4)."""
    corners = torch.randint(0, below, (rows, length, 2, 2), generator=seeded(2))
    return corners.sort(dim=2).values.reshape(rows, length, 4)


MULTIMODAL = (
    multimodal("clip", "CLIPModel", CLIP),
    multimodal("chinese_clip", "ChineseCLIPModel", CLIP),
    multimodal("altclip", "AltCLIPModel", CLIP | {"text_config": BERT | {"project_dim": 16}}),
    multimodal(
        "siglip",
        "SiglipModel",
        {"text_config": BERT | {"projection_size": 32}, "vision_config": VIT},
    ),
    multimodal(
        "clipseg",
        "CLIPSegForImageSegmentation",
        CLIP
        | {
            "extract_layers": [0, 1],
            "reduce_dim": 8,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
    ),
    multimodal(
        "groupvit",
        "GroupViTModel",
        {
            "text_config": BERT,
            "vision_config": VIT | {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]},
            "projection_dim": 16,
            "projection_intermediate_dim": 20,
        },
    ),
    multimodal(
        "owlvit",
        "OwlViTForObjectDetection",
        CLIP | {"projection_dim": 32},
        lambda: {"input_ids": token_ids(2, 8), "pixel_values": floats(2, 3, 32, 32)},
    ),
    multimodal(
        "clap",
        "ClapModel",
        {
            "text_config": BERT,
            "audio_config": {
                "window_size": 4,
                "num_mel_bins": 8,
                "spec_size": 32,
                "patch_size": 4,
                "patch_stride": [4, 4],
                "depths": [1, 1],
                "num_attention_heads": [2, 2],
                "num_hidden_layers": 2,
                "hidden_size": 16,
                "patch_embeds_hidden_size": 8,
                "projection_dim": 16,
            },
            "projection_dim": 16,
        },
        lambda: text() | {"input_features": floats(2, 1, 120, 8)},
    ),
    multimodal(
        "blip",
        "BlipForConditionalGeneration",
        {
            "text_config": BERT | {"encoder_hidden_size": 32},
            "vision_config": VIT,
            "projection_dim": 16,
            "image_text_hidden_size": 16,
        },
    ),
    multimodal(
        "blip_retrieval",
        "BlipForImageTextRetrieval",
        {
            "text_config": BERT | {"encoder_hidden_size": 32},
            "vision_config": VIT,
            "projection_dim": 16,
            "image_text_hidden_size": 16,
        },
    ),
    multimodal(
        "blip_2",
        "Blip2ForConditionalGeneration",
        {
            "vision_config": VIT,
            "qformer_config": BERT | {"encoder_hidden_size": 32},
            "text_config": {
                "model_type": "opt",
                "vocab_size": 99,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_dim": 40,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 64,
                **SPECIAL,
            },
            "num_query_tokens": 3,
            "image_token_index": IMAGE_TOKEN,
        },
        image_in_text(3),
        generates=True,
    ),
    multimodal(
        "instructblip",
        "InstructBlipForConditionalGeneration",
        {
            "vision_config": VIT,
            "qformer_config": BERT | {"encoder_hidden_size": 32},
            "text_config": {
                "model_type": "opt",
                "vocab_size": 99,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "ffn_dim": 40,
                "word_embed_proj_dim": 32,
                "max_position_embeddings": 64,
                **SPECIAL,
            },
            "num_query_tokens": 3,
            "image_token_index": IMAGE_TOKEN,
        },
        lambda: image_in_text(3)() | {"qformer_input_ids": token_ids(2, 4, seed=5)},
        generates=True,
    ),
    multimodal("llava", "LlavaForConditionalGeneration", LLAVA, image_in_text(16), generates=True),
    multimodal(
        "vipllava",
        "VipLlavaForConditionalGeneration",
        LLAVA | {"vision_feature_layers": [-1, -2]},
        image_in_text(16),
        generates=True,
    ),
    multimodal(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "gemma"},
            "vision_config": VIT | {"model_type": "siglip_vision_model", "projection_dim": 32},
            "projection_dim": 32,
            "image_token_index": IMAGE_TOKEN,
        },
        image_in_text(16),
        generates=True,
    ),
    multimodal(
        "gemma3_multimodal",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "gemma3_text", "sliding_window": 4},
            "vision_config": VIT | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
        },
        lambda: image_in_text(4)() | {"token_type_ids": torch.tensor([[1] * 4 + [0] * 8] * 2)},
        generates=True,
    ),
    multimodal(
        "internvl",
        "InternVLForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "vision_config": VIT | {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": IMAGE_TOKEN,
        },
        image_in_text(4),
        generates=True,
    ),
    multimodal(
        "idefics",
        "IdeficsForVisionText2Text",
        LLAMA
        | {
            "additional_vocab_size": 3,
            "vision_config": {
                "embed_dim": 32,
                "image_size": 32,
                "patch_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 40,
            },
            "use_resampler": False,
        },
        lambda: (
            text()
            | {
                "pixel_values": floats(2, 1, 3, 32, 32),
                "image_attention_mask": torch.ones(2, 8, 1, dtype=torch.long),
            }
        ),
    ),
    multimodal(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "llama"},
            "vision_config": VIT,
            "image_token_id": IMAGE_TOKEN,
            "scale_factor": 2,
        },
        image_in_text(4, images=lambda: {"pixel_values": floats(2, 1, 3, 32, 32)}),
        generates=True,
    ),
    multimodal(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": LLAMA
            | {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                }
            },
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "spatial_merge_size": 2,
            },
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": 97,
            "vision_start_token_id": 96,
            "vision_end_token_id": 95,
        },
        lambda: {
            "input_ids": torch.cat([torch.tensor([[96, 98, 98, 98, 98, 95]] * 2), token_ids(below=90)], dim=1),
            "pixel_values": floats(32, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0] + [0] * 8] * 2),
        },
    ),
    multimodal(
        "flava",
        "FlavaModel",
        {
            "text_config": BERT,
            "image_config": VIT,
            "multimodal_config": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "intermediate_size": 40,
            },
            "hidden_size": 32,
            "projection_dim": 16,
        },
    ),
    multimodal("vilt", "ViltForMaskedLM", BERT | VIT | {"max_image_length": 16}),
    multimodal("git", "GitForCausalLM", BERT | {"vision_config": VIT}, generates=True),
    multimodal(
        "visual_bert",
        "VisualBertModel",
        BERT | {"visual_embedding_dim": 12},
        lambda: text() | {"visual_embeds": floats(2, 3, 12)},
    ),
    multimodal(
        "lxmert",
        "LxmertModel",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
            "l_layers": 1,
            "x_layers": 1,
            "r_layers": 1,
            "visual_feat_dim": 12,
        },
        lambda: text() | {"visual_feats": floats(2, 3, 12), "visual_pos": floats(2, 3, 4)},
    ),
    multimodal(
        "bridgetower",
        "BridgeTowerModel",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "text_config": BERT | {"hidden_size": 64},
            "vision_config": {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "patch_size": 8,
                "image_size": 32,
            },
        },
    ),
    multimodal(
        "layoutlm",
        "LayoutLMForMaskedLM",
        BERT | {"max_2d_position_embeddings": 64},
        lambda: text() | {"bbox": _boxes()},
    ),
    multimodal(
        "layoutlmv3",
        "LayoutLMv3Model",
        BERT
        | {
            "input_size": 32,
            "patch_size": 8,
            "coordinate_size": 4,
            "shape_size": 8,
            "max_2d_position_embeddings": 64,
            "rel_pos_bins": 8,
            "max_rel_pos": 16,
            "rel_2d_pos_bins": 8,
            "max_rel_2d_pos": 16,
        },
        lambda: captioned_image() | {"bbox": _boxes()},
    ),
    multimodal(
        "lilt",
        "LiltModel",
        BERT | {"hidden_size": 24, "channel_shrink_ratio": 2, "max_2d_position_embeddings": 64},
        lambda: text() | {"bbox": _boxes()},
    ),
    multimodal(
        "udop",
        "UdopForConditionalGeneration",
        T5
        | {
            "relative_attention_num_buckets": 32,
            "image_size": 32,
            "patch_size": 8,
            "max_2d_position_embeddings": 64,
        },
        lambda: (
            text()
            | {
                "bbox": _boxes() / 64,
                "pixel_values": floats(2, 3, 32, 32),
                "decoder_input_ids": token_ids(2, 5),
            }
        ),
    ),
    multimodal(
        "pix2struct",
        "Pix2StructForConditionalGeneration",
        {
            "text_config": {
                "vocab_size": 99,
                "hidden_size": 32,
                "d_kv": 8,
                "d_ff": 40,
                "num_layers": 2,
                "num_heads": 4,
                **SPECIAL,
                "decoder_start_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 32,
                "patch_embed_hidden_size": 12,
                "d_ff": 40,
                "d_kv": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "seq_len": 16,
            },
        },
        lambda: {
            "flattened_patches": torch.cat([torch.arange(1, 5).repeat(2, 2).reshape(2, 4, 2), floats(2, 4, 12)], dim=2),
            "decoder_input_ids": token_ids(2, 5),
        },
    ),
    multimodal(
        "kosmos2",
        "Kosmos2ForConditionalGeneration",
        {
            "text_config": {
                "vocab_size": 99,
                "embed_dim": 32,
                "layers": 2,
                "ffn_dim": 40,
                "attention_heads": 4,
                "max_position_embeddings": 64,
                **SPECIAL,
            },
            "vision_config": VIT,
            "latent_query_num": 3,
        },
        lambda: text() | pixels()() | {"image_embeds_position_mask": torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0]] * 2)},
    ),
    multimodal(
        "florence2",
        "Florence2ForConditionalGeneration",
        {
            "text_config": BART | {"model_type": "bart"},
            "vision_config": {
                "depths": [1, 1],
                "patch_size": [7, 3],
                "patch_stride": [4, 2],
                "patch_padding": [3, 1],
                "patch_prenorm": [False, True],
                "embed_dim": [8, 16],
                "num_heads": [2, 2],
                "num_groups": [2, 2],
                "window_size": 4,
                "projection_dim": 32,
                "mlp_ratio": 2.0,
                "max_position_embeddings": 8,
                "max_temporal_embeddings": 2,
            },
            "image_token_id": IMAGE_TOKEN,
        },
        lambda: image_in_text(17)() | {"decoder_input_ids": token_ids(2, 5)},
    ),
    multimodal(
        "qwen2_audio",
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": LLAMA | {"model_type": "qwen2"},
            "audio_config": {
                "num_mel_bins": 8,
                "encoder_layers": 1,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 40,
                "d_model": 32,
                "max_source_positions": 10,
            },
            "audio_token_index": IMAGE_TOKEN,
        },
        lambda: image_in_text(5, images=mel(8, 20))() | {"feature_attention_mask": torch.ones(2, 20, dtype=torch.long)},
    ),
)
