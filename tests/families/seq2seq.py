"""Encoders with decoders."""

from __future__ import annotations

from .family import Config, Family, family, first_token, text_pair
from .sizes import BART, LLAMA, SPECIAL, T5


def seq2seq(name: str, model_class: str, config: Config) -> Family:
    return family("encoder-decoder", name, model_class, config, text_pair, generates=True)


SEQ2SEQ = (
    seq2seq("t5", "T5ForConditionalGeneration", T5),
    seq2seq(
        "t5_gated",
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    seq2seq("mt5", "MT5ForConditionalGeneration", T5),
    seq2seq("umt5", "UMT5ForConditionalGeneration", T5),
    seq2seq(
        "longt5",
        "LongT5ForConditionalGeneration",
        T5 | {"local_radius": 3, "global_block_size": 4, "encoder_attention_type": "transient-global"},
    ),
    seq2seq("bart", "BartForConditionalGeneration", BART),
    seq2seq("mbart", "MBartForConditionalGeneration", BART),
    seq2seq(
        "mvp",
        "MvpForConditionalGeneration",
        BART | {"use_prompt": True, "prompt_length": 3, "prompt_mid_dim": 8},
    ),
    seq2seq("plbart", "PLBartForConditionalGeneration", BART),
    seq2seq("pegasus", "PegasusForConditionalGeneration", BART),
    seq2seq(
        "pegasus_x",
        "PegasusXForConditionalGeneration",
        BART | {"num_global_tokens": 4, "block_size": 4},
    ),
    seq2seq(
        "bigbird_pegasus",
        "BigBirdPegasusForConditionalGeneration",
        BART | {"attention_type": "original_full"},
    ),
    seq2seq("marian", "MarianMTModel", BART | {"decoder_vocab_size": 99}),
    seq2seq("m2m_100", "M2M100ForConditionalGeneration", BART),
    family(
        "encoder-decoder",
        "led",
        "LEDForConditionalGeneration",
        BART
        | {
            "attention_window": 4,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        lambda: text_pair() | {"global_attention_mask": first_token()},
        generates=True,
    ),
    seq2seq(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 64,
            "ngram": 2,
            "num_buckets": 8,
            "decoder_start_token_id": 2,
            **SPECIAL,
        },
    ),
    seq2seq("blenderbot", "BlenderbotForConditionalGeneration", BART),
    seq2seq("blenderbot_small", "BlenderbotSmallForConditionalGeneration", BART),
    seq2seq(
        "fsmt",
        "FSMTForConditionalGeneration",
        BART | {"langs": ["en", "de"], "src_vocab_size": 99, "tgt_vocab_size": 99},
    ),
    seq2seq(
        "t5gemma",
        "T5GemmaForConditionalGeneration",
        {
            "encoder": LLAMA | {"sliding_window": 4},
            "decoder": LLAMA | {"sliding_window": 4},
            "vocab_size": 99,
        },
    ),
)
