"""Mixtures of experts: of a layer's weights, only those of the routed experts are used."""

from __future__ import annotations

from .family import Config, Family, family, text, text_pair
from .sizes import BART, LLAMA, MLA, SPECIAL, T5

FOUR_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def moe(name: str, model_class: str, config: Config) -> Family:
    return family("moe", name, model_class, config, text, generates=True)


MOE = (
    # Three ways to run packed experts: one product per expert, rows gathered per token, one grouped
    # product (which is what transformers chooses by itself).
    moe("mixtral", "MixtralForCausalLM", LLAMA | FOUR_EXPERTS),
    moe(
        "mixtral_eager",
        "MixtralForCausalLM",
        LLAMA | FOUR_EXPERTS | {"experts_implementation": "eager"},
    ),
    moe(
        "mixtral_batched",
        "MixtralForCausalLM",
        LLAMA | FOUR_EXPERTS | {"experts_implementation": "batched_mm"},
    ),
    moe(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        LLAMA
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [0],
        },
    ),
    moe(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        LLAMA | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    ),
    moe(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        LLAMA
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    moe(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        MLA
        | {
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        },
    ),
    moe(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        MLA
        | {
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
        },
    ),
    moe("olmoe", "OlmoeForCausalLM", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    moe(
        "granitemoe",
        "GraniteMoeForCausalLM",
        LLAMA | FOUR_EXPERTS,
    ),
    moe(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        LLAMA | FOUR_EXPERTS | {"shared_intermediate_size": 16},
    ),
    moe("phimoe", "PhimoeForCausalLM", LLAMA | FOUR_EXPERTS),
    moe(
        "dbrx",
        "DbrxForCausalLM",
        {
            "vocab_size": 99,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {
                "ffn_hidden_size": 24,
                "hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
            **SPECIAL,
        },
    ),
    moe(
        "gpt_oss",
        "GptOssForCausalLM",
        LLAMA | FOUR_EXPERTS | {"sliding_window": 4},
    ),
    moe(
        "jetmoe",
        "JetMoeForCausalLM",
        LLAMA | FOUR_EXPERTS | {"kv_channels": 8},
    ),
    moe(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        LLAMA
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 12,
            "moe_layer_start_index": 0,
        },
    ),
    moe(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        LLAMA
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
        },
    ),
    moe(
        "dots1",
        "Dots1ForCausalLM",
        LLAMA
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
        },
    ),
    moe("hunyuan_moe", "HunYuanMoEV1ForCausalLM", LLAMA | {"num_experts": 4, "moe_topk": 2}),
    moe("flex_olmo", "FlexOlmoForCausalLM", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2}),
    moe(
        "llama4",
        "Llama4ForCausalLM",
        LLAMA
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 40,
            "moe_layers": [1],
            "attention_chunk_size": 16,
        },
    ),
    moe(
        "longcat_flash",
        "LongcatFlashForCausalLM",
        MLA
        | {
            "num_layers": 1,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "ffn_hidden_size": 40,
            "expert_ffn_hidden_size": 12,
        },
    ),
    family(
        "moe",
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        T5
        | {
            "num_experts": 4,
            "expert_capacity": 8,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
        },
        text_pair,
        generates=True,
    ),
    family(
        "moe",
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        BART
        | {
            "num_experts": 4,
            "expert_capacity": 8,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
        text_pair,
        generates=True,
    ),
)
