"""State spaces, linear attention and other recurrences, most of them mixed with attention."""

from __future__ import annotations

from .family import Config, Family, family, text
from .sizes import LLAMA, SPECIAL


def state_space(name: str, model_class: str, config: Config) -> Family:
    return family("state-space", name, model_class, config, text, generates=True)


STATE_SPACE = (
    state_space(
        "mamba",
        "MambaForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "time_step_rank": 4,
            **SPECIAL,
        },
    ),
    state_space(
        "falcon_mamba",
        "FalconMambaForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "time_step_rank": 4,
            **SPECIAL,
        },
    ),
    state_space(
        "mamba2",
        "Mamba2ForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 4,
            **SPECIAL,
        },
    ),
    state_space(
        "rwkv",
        "RwkvForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "context_length": 64,
        },
    ),
    state_space(
        "jamba",
        "JambaForCausalLM",
        LLAMA
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    state_space(
        "bamba",
        "BambaForCausalLM",
        LLAMA
        | {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
    ),
    state_space(
        "zamba",
        "ZambaForCausalLM",
        LLAMA
        | {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "num_key_value_heads": 4,
            "attention_head_dim": 16,
        },
    ),
    state_space(
        "zamba2",
        "Zamba2ForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 40,
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 2,
            "chunk_size": 4,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
    state_space(
        "falcon_h1",
        "FalconH1ForCausalLM",
        LLAMA
        | {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
        },
    ),
    state_space(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "lru_width": 32,
            "intermediate_size": 48,
            "attention_window_size": 16,
            **SPECIAL,
        },
    ),
    state_space(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        LLAMA
        | {
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
        },
    ),
    state_space(
        "nemotron_h",
        "NemotronHForCausalLM",
        LLAMA
        | {
            "num_hidden_layers": 3,
            "hybrid_override_pattern": "M*-",
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    state_space("lfm2", "Lfm2ForCausalLM", LLAMA | {"layer_types": ["conv", "full_attention"]}),
    state_space(
        "minimax",
        "MiniMaxForCausalLM",
        LLAMA
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    state_space(
        "xlstm",
        "xLSTMForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 64,
            "num_heads": 4,
            "num_blocks": 2,
            "chunk_size": 4,
            "qk_dim_factor": 1.0,
            **SPECIAL,
        },
    ),
    state_space(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        LLAMA
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
)
