"""Text in, vectors out."""

from __future__ import annotations

from collections.abc import Callable

from .family import Config, Family, Inputs, family, first_token, floats, text, token_ids
from .sizes import BERT, LLAMA


def encoder(name: str, model_class: str, config: Config, inputs: Callable[[], Inputs] = text) -> Family:
    return family("encoder", name, model_class, config, inputs)


def _unmasked() -> Inputs:
    return {"input_ids": token_ids()}


def _characters() -> Inputs:
    return text(2, 16)


def _paragraphs() -> Inputs:
    return text(2, 64)


ENCODERS = (
    encoder("bert", "BertForMaskedLM", BERT),
    encoder("bert_pooled", "BertModel", BERT),
    encoder("roberta", "RobertaForMaskedLM", BERT),
    encoder("camembert", "CamembertModel", BERT),
    encoder("xlm_roberta_xl", "XLMRobertaXLForMaskedLM", BERT),
    encoder(
        "xmod",
        "XmodModel",
        BERT | {"languages": ("en", "de"), "default_language": "de", "adapter_reduction_factor": 2},
    ),
    encoder(
        "distilbert",
        "DistilBertForMaskedLM",
        {
            "vocab_size": 99,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 40,
            "max_position_embeddings": 64,
        },
    ),
    # All layers of ALBERT are one layer.
    encoder("albert", "AlbertForMaskedLM", BERT | {"embedding_size": 16}),
    encoder("electra", "ElectraForMaskedLM", BERT | {"embedding_size": 16}),
    encoder("electra_discriminator", "ElectraForPreTraining", BERT | {"embedding_size": 16}),
    encoder(
        "deberta",
        "DebertaModel",
        BERT
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "max_relative_positions": 16,
        },
    ),
    encoder(
        "deberta_v2",
        "DebertaV2ForMaskedLM",
        BERT
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3,
            "position_biased_input": False,
        },
    ),
    encoder(
        "xlnet",
        "XLNetLMHeadModel",
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 40},
        lambda: text() | {"token_type_ids": token_ids(2, 8, seed=1) % 2},
    ),
    encoder(
        "xlm",
        "XLMModel",
        {
            "vocab_size": 99,
            "emb_dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    encoder(
        "flaubert",
        "FlaubertModel",
        {
            "vocab_size": 99,
            "emb_dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    encoder(
        "funnel",
        "FunnelForMaskedLM",
        {
            "vocab_size": 99,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 40,
        },
    ),
    encoder(
        "longformer",
        "LongformerModel",
        BERT | {"attention_window": 4},
        lambda: text() | {"global_attention_mask": first_token()},
    ),
    encoder(
        "big_bird",
        "BigBirdModel",
        BERT | {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"},
        _paragraphs,
    ),
    encoder("mpnet", "MPNetForMaskedLM", BERT),
    encoder("modernbert", "ModernBertForMaskedLM", LLAMA | {"cls_token_id": 3, "sep_token_id": 4}),
    encoder("eurobert", "EuroBertForMaskedLM", LLAMA),
    encoder("nomic_bert", "NomicBertModel", BERT | {"head_dim": 8}),
    encoder("ibert", "IBertModel", BERT),
    encoder(
        "mobilebert",
        "MobileBertModel",
        BERT | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    ),
    encoder("megatron_bert", "MegatronBertModel", BERT),
    encoder("squeezebert", "SqueezeBertModel", BERT | {"embedding_size": 32}),
    encoder("convbert", "ConvBertModel", BERT | {"embedding_size": 16, "conv_kernel_size": 3}),
    encoder("roformer", "RoFormerModel", BERT | {"embedding_size": 16}),
    encoder("rembert", "RemBertModel", BERT | {"input_embedding_size": 16, "output_embedding_size": 24}),
    encoder(
        "nystromformer",
        "NystromformerModel",
        BERT | {"num_landmarks": 4, "segment_means_seq_len": 8},
        _unmasked,
    ),
    encoder("yoso", "YosoModel", BERT | {"use_expectation": True}),
    encoder("fnet", "FNetModel", BERT, _unmasked),
    encoder("ernie", "ErnieModel", BERT | {"use_task_id": True, "task_type_vocab_size": 3}),
    encoder(
        "luke",
        "LukeModel",
        BERT | {"entity_vocab_size": 20, "entity_emb_size": 16},
        lambda: (
            text()
            | {
                "entity_ids": token_ids(2, 2, below=20),
                "entity_position_ids": token_ids(4, 3, below=8).reshape(2, 2, 3),
            }
        ),
    ),
    encoder(
        "canine",
        "CanineModel",
        BERT
        | {
            "num_hash_buckets": 32,
            "num_hash_functions": 2,
            "downsampling_rate": 2,
            "local_transformer_stride": 8,
        },
        _characters,
    ),
    encoder("esm", "EsmForMaskedLM", BERT | {"mask_token_id": 4, "position_embedding_type": "rotary"}),
    encoder("dpr", "DPRQuestionEncoder", BERT | {"projection_dim": 12}),
    encoder("tapas", "TapasModel", BERT | {"type_vocab_sizes": [3, 4, 4, 2, 4, 10, 10]}),
    encoder("bert_generation", "BertGenerationEncoder", BERT),
    encoder("data2vec_text", "Data2VecTextModel", BERT),
    encoder("splinter", "SplinterModel", BERT),
    encoder(
        "reformer",
        "ReformerModel",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "attn_layers": ["local", "lsh"],
            "num_attention_heads": 2,
            "attention_head_size": 16,
            "feed_forward_size": 40,
            "axial_pos_embds": True,
            "axial_pos_shape": [4, 8],
            "axial_pos_embds_dim": [16, 16],
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 4,
            "num_buckets": 4,
            "hash_seed": 0,
            "is_decoder": False,
        },
        lambda: text(2, 32),
    ),
    encoder(
        "perceiver",
        "PerceiverModel",
        {
            "d_model": 32,
            "d_latents": 24,
            "num_latents": 6,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
        },
        lambda: {"inputs": floats(2, 8, 32)},
    ),
)
