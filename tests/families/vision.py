"""Images in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from .family import Config, Family, Inputs, family, floats, pixels, seeded, token_ids
from .sizes import GPT2, VIT

STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}


SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}


SWIN_BACKBONE = SWIN | {
    "model_type": "swin",
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


RESNET: dict[str, Any] = STAGES | {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 32]}


RESNET_BACKBONE = RESNET | {
    "model_type": "resnet",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def vision(name: str, model_class: str, config: Config, inputs: Callable[[], Inputs] | None = None) -> Family:
    return family("vision", name, model_class, config, inputs or pixels())


def _masked_autoencoder_inputs() -> Inputs:
    # The model shuffles patches by noise, which it would otherwise draw itself.
    return pixels()() | {"noise": torch.rand(2, 16, generator=seeded(3))}


def _encoder_decoder_of_vit_and_gpt2() -> nn.Module:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VIT), transformers.GPT2Config(**GPT2)
    )
    model: nn.Module = transformers.VisionEncoderDecoderModel(config=config)
    return model


VISION = (
    vision("vit", "ViTForImageClassification", VIT),
    vision("vit_pooled", "ViTModel", VIT),
    vision("deit", "DeiTForImageClassificationWithTeacher", VIT),
    vision(
        "beit",
        "BeitForImageClassification",
        VIT
        | {
            "use_relative_position_bias": True,
            "use_shared_relative_position_bias": False,
            "use_mask_token": True,
        },
    ),
    vision("data2vec_vision", "Data2VecVisionModel", VIT | {"use_shared_relative_position_bias": True}),
    vision("swin", "SwinForImageClassification", SWIN),
    vision("swinv2", "Swinv2ForImageClassification", SWIN),
    vision(
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        {
            "image_size": 16,
            "patch_size": 1,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "upscale": 2,
        },
        pixels(16),
    ),
    vision("convnext", "ConvNextForImageClassification", STAGES | {"image_size": 32}),
    vision("convnextv2", "ConvNextV2ForImageClassification", STAGES | {"image_size": 32}),
    vision("resnet", "ResNetForImageClassification", RESNET),
    vision("regnet", "RegNetForImageClassification", RESNET | {"groups_width": 4}),
    vision("bit", "BitForImageClassification", RESNET | {"num_groups": 2}),
    vision(
        "mobilenet_v1",
        "MobileNetV1ForImageClassification",
        {"image_size": 64, "depth_multiplier": 0.125},
        pixels(64),
    ),
    vision(
        "mobilenet_v2",
        "MobileNetV2ForImageClassification",
        {"image_size": 64, "depth_multiplier": 0.25, "finegrained_output": False},
        pixels(64),
    ),
    vision(
        "efficientnet",
        "EfficientNetForImageClassification",
        {
            "image_size": 32,
            "width_coefficient": 0.25,
            "depth_coefficient": 0.5,
            "depth_divisor": 4,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 16],
            "out_channels": [16, 16],
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 2],
            "hidden_dim": 320,
        },
    ),
    vision(
        "segformer",
        "SegformerForSemanticSegmentation",
        STAGES
        | {
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
            "sr_ratios": [2, 2, 1, 1],
            "decoder_hidden_size": 8,
        },
        pixels(64),
    ),
    vision(
        "glpn",
        "GLPNForDepthEstimation",
        STAGES
        | {
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
            "sr_ratios": [2, 2, 1, 1],
            "decoder_hidden_size": 8,
        },
        pixels(64),
    ),
    vision(
        "pvt",
        "PvtForImageClassification",
        STAGES
        | {
            "image_size": 64,
            "sequence_reduction_ratios": [2, 2, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
            "num_labels": 5,
        },
        pixels(64),
    ),
    vision(
        "pvt_v2",
        "PvtV2ForImageClassification",
        STAGES
        | {
            "image_size": 64,
            "sr_ratios": [2, 2, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "mlp_ratios": [2, 2, 2, 2],
        },
        pixels(64),
    ),
    vision("poolformer", "PoolFormerForImageClassification", STAGES),
    vision(
        "swiftformer",
        "SwiftFormerForImageClassification",
        {"image_size": 32, "depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16], "mlp_ratio": 2},
    ),
    vision(
        "focalnet",
        "FocalNetForImageClassification",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
    ),
    vision(
        "cvt",
        "CvtForImageClassification",
        {
            "embed_dim": [8, 8, 16],
            "num_heads": [1, 1, 2],
            "depth": [1, 2, 3],
            "mlp_ratio": [2.0, 2.0, 2.0],
        },
    ),
    vision(
        "levit",
        "LevitForImageClassification",
        {
            "image_size": 64,
            "patch_size": 16,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        pixels(64),
    ),
    vision(
        "hiera",
        "HieraForImageClassification",
        {
            "image_size": [32, 32],
            "embed_dim": 8,
            "depths": [1, 1, 1],
            "num_heads": [1, 1, 2],
            "num_query_pool": 2,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, True, False],
            "patch_size": [7, 7],
        },
    ),
    vision(
        "mobilevit",
        "MobileViTForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [8, 8, 8],
            "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
        },
        pixels(64),
    ),
    vision(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {
            "image_size": 32,
            "width_multiplier": 0.125,
            "base_attn_unit_dims": [64, 64, 64],
            "n_attn_blocks": [1, 1, 1],
        },
        pixels(64),
    ),
    vision("dinov2", "Dinov2ForImageClassification", VIT),
    vision("dinov2_with_registers", "Dinov2WithRegistersModel", VIT | {"num_register_tokens": 2}),
    vision("dinov3_vit", "DINOv3ViTModel", VIT | {"num_register_tokens": 2}),
    vision("dinov3_convnext", "DINOv3ConvNextModel", STAGES),
    vision("ijepa", "IJepaModel", VIT),
    vision(
        "vit_mae",
        "ViTMAEForPreTraining",
        VIT
        | {
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 20,
        },
        _masked_autoencoder_inputs,
    ),
    vision("vit_msn", "ViTMSNModel", VIT),
    vision(
        "vitdet",
        "VitDetModel",
        VIT
        | {
            "pretrain_image_size": 32,
            "mlp_ratio": 2,
            "window_block_indices": [0],
            "window_size": 2,
            "residual_block_indices": [1],
            "use_relative_position_embeddings": True,
        },
    ),
    vision("clip_vision", "CLIPVisionModelWithProjection", VIT | {"projection_dim": 16}),
    vision("siglip_vision", "SiglipVisionModel", VIT),
    vision(
        "dpt",
        "DPTForDepthEstimation",
        VIT
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
    ),
    vision(
        "depth_anything",
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": VIT
            | {
                "model_type": "dinov2",
                "num_hidden_layers": 4,
                "out_indices": [1, 2, 3, 4],
                "apply_layernorm": True,
                "reshape_hidden_states": False,
            },
            "patch_size": 8,
            "reassemble_hidden_size": 32,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "head_hidden_size": 8,
            "depth_estimation_type": "metric",
            "max_depth": 9,
        },
    ),
    vision(
        "upernet",
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": SWIN_BACKBONE,
            "hidden_size": 8,
            "auxiliary_in_channels": 32,
            "auxiliary_channels": 8,
            "pool_scales": [1, 2],
        },
        pixels(64),
    ),
    vision(
        "detr",
        "DetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "backbone_config": RESNET_BACKBONE,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "num_queries": 5,
        },
        pixels(64),
    ),
    vision(
        "conditional_detr",
        "ConditionalDetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "backbone_config": RESNET_BACKBONE,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "num_queries": 5,
        },
        pixels(64),
    ),
    vision(
        "deformable_detr",
        "DeformableDetrForObjectDetection",
        {
            "use_timm_backbone": False,
            "backbone_config": RESNET_BACKBONE,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20,
            "decoder_ffn_dim": 20,
            "num_queries": 5,
        },
        pixels(64),
    ),
    vision(
        "yolos",
        "YolosForObjectDetection",
        VIT | {"image_size": [32, 32], "num_detection_tokens": 4},
    ),
    vision(
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        {
            "backbone_config": SWIN_BACKBONE,
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 20,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "num_attention_heads": 2,
            "dim_feedforward": 20,
            "num_queries": 5,
        },
        pixels(64),
    ),
    vision(
        "maskformer",
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": SWIN_BACKBONE,
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "decoder_config": {
                "model_type": "detr",
                "d_model": 32,
                "decoder_layers": 1,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 20,
                "decoder_ffn_dim": 20,
                "num_queries": 5,
            },
        },
        pixels(64),
    ),
    vision(
        "sam",
        "SamModel",
        {
            "vision_config": VIT
            | {
                "output_channels": 16,
                "window_size": 2,
                "global_attn_indexes": [1],
                "mlp_dim": 40,
                "num_pos_feats": 8,
            },
            "prompt_encoder_config": {
                "hidden_size": 16,
                "image_size": 32,
                "patch_size": 8,
                "mask_input_channels": 4,
                "image_embedding_size": 4,
            },
            "mask_decoder_config": {
                "hidden_size": 16,
                "mlp_dim": 20,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "iou_head_hidden_dim": 8,
            },
        },
        lambda: pixels()() | {"input_points": floats(2, 1, 2, 2).abs() * 10},
    ),
    vision(
        "vitpose",
        "VitPoseForPoseEstimation",
        {
            "backbone_config": VIT
            | {
                "model_type": "vitpose_backbone",
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "out_indices": [2],
            },
            "num_labels": 5,
        },
    ),
    vision(
        "superpoint",
        "SuperPointForKeypointDetection",
        {
            "encoder_hidden_sizes": [4, 4, 8, 8],
            "decoder_hidden_size": 8,
            "descriptor_decoder_dim": 8,
        },
    ),
    vision("imagegpt", "ImageGPTModel", GPT2, lambda: {"input_ids": token_ids()}),
    vision(
        "videomae",
        "VideoMAEForVideoClassification",
        VIT | {"num_frames": 4},
        lambda: {"pixel_values": floats(1, 4, 3, 32, 32)},
    ),
    vision(
        "vivit",
        "VivitForVideoClassification",
        VIT | {"num_frames": 4, "tubelet_size": [2, 8, 8]},
        lambda: {"pixel_values": floats(1, 4, 3, 32, 32)},
    ),
    vision(
        "timesformer",
        "TimesformerForVideoClassification",
        VIT | {"num_frames": 4},
        lambda: {"pixel_values": floats(1, 4, 3, 32, 32)},
    ),
    Family(
        "vit_gpt2",
        "vision",
        _encoder_decoder_of_vit_and_gpt2,
        lambda: pixels()() | {"decoder_input_ids": token_ids(2, 5)},
    ),
)
