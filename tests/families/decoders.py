"""Language models."""

from __future__ import annotations

from .family import Config, Family, family, text
from .sizes import BERT, GPT2, LLAMA, MLA, SPECIAL

FALCON = {name: value for name, value in LLAMA.items() if name != "head_dim"}


def decoder(name: str, model_class: str, config: Config) -> Family:
    return family("decoder", name, model_class, config, text, generates=True)


DECODERS = (
    decoder("gpt2", "GPT2LMHeadModel", GPT2),
    decoder("openai_gpt", "OpenAIGPTLMHeadModel", GPT2),
    decoder("gpt_bigcode", "GPTBigCodeForCausalLM", GPT2),
    decoder(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 40,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            **SPECIAL,
        },
    ),
    decoder("gptj", "GPTJForCausalLM", GPT2 | {"rotary_dim": 4}),
    decoder("codegen", "CodeGenForCausalLM", GPT2 | {"rotary_dim": 4}),
    decoder("gpt_neox", "GPTNeoXForCausalLM", LLAMA),
    decoder("gpt_neox_japanese", "GPTNeoXJapaneseForCausalLM", LLAMA | {"intermediate_multiple_size": 2}),
    decoder(
        "opt",
        "OPTForCausalLM",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 40,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
    decoder(
        "bloom",
        "BloomForCausalLM",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL},
    ),
    decoder("falcon", "FalconForCausalLM", FALCON | {"multi_query": True, "parallel_attn": True}),
    decoder(
        "falcon_new",
        "FalconForCausalLM",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    decoder("llama", "LlamaForCausalLM", LLAMA),
    decoder("llama_eager", "LlamaForCausalLM", LLAMA | {"attn_implementation": "eager"}),
    decoder(
        "llama_tied",
        "LlamaForCausalLM",
        LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    decoder("mistral", "MistralForCausalLM", LLAMA | {"sliding_window": 4}),
    decoder("qwen2", "Qwen2ForCausalLM", LLAMA),
    decoder("qwen3", "Qwen3ForCausalLM", LLAMA),
    decoder("gemma", "GemmaForCausalLM", LLAMA),
    decoder("gemma2", "Gemma2ForCausalLM", LLAMA | {"sliding_window": 4, "query_pre_attn_scalar": 8}),
    decoder(
        "gemma3",
        "Gemma3ForCausalLM",
        LLAMA
        | {
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    decoder(
        "gemma3n",
        "Gemma3nForCausalLM",
        LLAMA
        | {
            "vocab_size_per_layer_input": 99,
            "hidden_size_per_layer_input": 8,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.5, 0.0],
            "sliding_window": 4,
        },
    ),
    decoder("phi", "PhiForCausalLM", LLAMA | {"qk_layernorm": True}),
    decoder("phi3", "Phi3ForCausalLM", LLAMA),
    decoder("olmo", "OlmoForCausalLM", LLAMA | {"clip_qkv": 1.0}),
    decoder("olmo2", "Olmo2ForCausalLM", LLAMA),
    decoder("olmo3", "Olmo3ForCausalLM", LLAMA | {"sliding_window": 4}),
    decoder("cohere", "CohereForCausalLM", LLAMA | {"use_qk_norm": True}),
    decoder("cohere2", "Cohere2ForCausalLM", LLAMA | {"sliding_window": 4}),
    decoder("stablelm", "StableLmForCausalLM", LLAMA | {"qk_layernorm": True, "use_qkv_bias": True}),
    decoder("starcoder2", "Starcoder2ForCausalLM", LLAMA),
    decoder("granite", "GraniteForCausalLM", LLAMA),
    decoder("nemotron", "NemotronForCausalLM", LLAMA),
    decoder("persimmon", "PersimmonForCausalLM", LLAMA),
    decoder("glm", "GlmForCausalLM", LLAMA),
    decoder("glm4", "Glm4ForCausalLM", LLAMA),
    decoder("smollm3", "SmolLM3ForCausalLM", LLAMA),
    decoder("exaone4", "Exaone4ForCausalLM", LLAMA | {"sliding_window": 4, "sliding_window_pattern": 2}),
    decoder("helium", "HeliumForCausalLM", LLAMA),
    decoder("ernie4_5", "Ernie4_5ForCausalLM", LLAMA | {"use_bias": True}),
    decoder("seed_oss", "SeedOssForCausalLM", LLAMA),
    decoder("arcee", "ArceeForCausalLM", LLAMA),
    decoder("apertus", "ApertusForCausalLM", LLAMA),
    decoder("bitnet", "BitNetForCausalLM", LLAMA),
    decoder("diffllama", "DiffLlamaForCausalLM", LLAMA),
    decoder("minicpm3", "MiniCPM3ForCausalLM", MLA),
    decoder(
        "mpt",
        "MptForCausalLM",
        {
            "vocab_size": 99,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": 64,
            **SPECIAL,
        },
    ),
    decoder(
        "xglm",
        "XGLMForCausalLM",
        {
            "vocab_size": 99,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 40,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
    ),
    decoder("biogpt", "BioGptForCausalLM", BERT),
    decoder("ctrl", "CTRLLMHeadModel", GPT2 | {"dff": 40}),
    decoder("bert_lm", "BertLMHeadModel", BERT | {"is_decoder": True}),
    decoder(
        "modernbert_decoder",
        "ModernBertDecoderForCausalLM",
        LLAMA | {"cls_token_id": 3, "sep_token_id": 4, "local_attention": 4},
    ),
    decoder("nanochat", "NanoChatForCausalLM", LLAMA),
)
