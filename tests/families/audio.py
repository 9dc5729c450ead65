"""Sound in, sound out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import nn

from .family import Config, Family, Inputs, family, floats, mel, token_ids, waveform
from .sizes import BART, SPECIAL, VIT

WAV2VEC2: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "conv_dim": [16, 16],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}


ENCODEC: dict[str, Any] = {
    "hidden_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_size": 32,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
    "target_bandwidths": [1.5, 3.0],
    "sampling_rate": 2400,
}


MIMI: dict[str, Any] = {
    "hidden_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "codebook_size": 32,
    "codebook_dim": 8,
    "num_quantizers": 3,
    "vector_quantization_hidden_dimension": 8,
    "upsample_groups": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sampling_rate": 200,
    "frame_rate": 12.5,
    "use_cache": False,
}


def audio(
    name: str,
    model_class: str,
    config: Config,
    inputs: Callable[[], Inputs] | None = None,
    *,
    generates: bool = False,
) -> Family:
    return family("audio", name, model_class, config, inputs or waveform(), generates=generates)


def _encoder_of(name: str, model_class: str, config: Config, input_name: str) -> Family:
    def construct() -> nn.Module:
        cls = getattr(transformers, model_class)
        encoder: nn.Module = cls(cls.config_class(**config)).encoder
        return encoder

    return Family(f"{name}_encoder", "audio", construct, lambda: {input_name: floats(2, 1, 200)})


AUDIO = (
    # The positional convolution is weight-normed by a parametrization.
    audio("wav2vec2", "Wav2Vec2ForCTC", WAV2VEC2),
    audio(
        "wav2vec2_layer_norm",
        "Wav2Vec2Model",
        WAV2VEC2 | {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True},
    ),
    audio("wav2vec2_conformer", "Wav2Vec2ConformerModel", WAV2VEC2 | {"conv_depthwise_kernel_size": 3}),
    audio(
        "wav2vec2_bert",
        "Wav2Vec2BertModel",
        WAV2VEC2 | {"feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 3},
        lambda: {"input_features": floats(2, 12, 20)},
    ),
    audio("hubert", "HubertForCTC", WAV2VEC2),
    audio("wavlm", "WavLMForCTC", WAV2VEC2 | {"num_buckets": 16, "max_bucket_distance": 20}),
    audio("unispeech_sat", "UniSpeechSatModel", WAV2VEC2),
    audio(
        "data2vec_audio",
        "Data2VecAudioModel",
        WAV2VEC2 | {"conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2},
    ),
    audio("sew", "SEWModel", WAV2VEC2 | {"squeeze_factor": 2}),
    audio(
        "sew_d",
        "SEWDModel",
        WAV2VEC2 | {"squeeze_factor": 2, "position_buckets": 8, "max_position_embeddings": 32},
    ),
    audio(
        "whisper",
        "WhisperForConditionalGeneration",
        {name: value for name, value in BART.items() if name != "max_position_embeddings"}
        | {
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 32,
            "begin_suppress_tokens": None,
        },
        lambda: mel(8, 20)() | {"decoder_input_ids": token_ids(2, 5)},
        generates=True,
    ),
    audio(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        BART
        | {
            "input_feat_per_channel": 8,
            "conv_channels": 16,
            "max_source_positions": 40,
            "max_target_positions": 32,
            "tie_word_embeddings": True,
        },
        lambda: mel(20, 8)() | {"decoder_input_ids": token_ids(2, 5)},
        generates=True,
    ),
    audio(
        "moonshine",
        "MoonshineForConditionalGeneration",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 40,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "encoder_num_key_value_heads": 4,
            "decoder_num_key_value_heads": 4,
            "max_position_embeddings": 64,
            **SPECIAL,
        },
        lambda: waveform(1600)() | {"decoder_input_ids": token_ids(2, 5)},
        generates=True,
    ),
    audio(
        "audio_spectrogram_transformer",
        "ASTForAudioClassification",
        VIT | {"max_length": 24, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": floats(2, 24, 16)},
    ),
    # SEANet convolutions are weight-normed; between them is an LSTM.
    audio("encodec", "EncodecModel", ENCODEC, lambda: {"input_values": floats(2, 1, 200)}),
    # A model's encoder has families of its own: behind it, codes are too coarse to show its bits.
    _encoder_of("encodec", "EncodecModel", ENCODEC, "hidden_states"),
    _encoder_of("mimi", "MimiModel", MIMI, "input_values"),
    audio(
        "dac",
        "DacModel",
        {
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 4],
            "decoder_hidden_size": 16,
            "n_codebooks": 2,
            "codebook_size": 32,
            "codebook_dim": 4,
            "upsampling_ratios": [4, 2],
            "hidden_size": 16,
        },
        lambda: {"input_values": floats(2, 1, 200)},
    ),
    audio("mimi", "MimiModel", MIMI, lambda: {"input_values": floats(2, 1, 200)}),
    audio(
        "musicgen_decoder",
        "MusicgenForCausalLM",
        {
            "vocab_size": 60,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 40,
            "num_codebooks": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
        },
        lambda: {"input_ids": token_ids(4, 6, below=60), "encoder_hidden_states": floats(2, 3, 32)},
    ),
    audio(
        "vits",
        "VitsModel",
        {
            "vocab_size": 38,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 20,
            "flow_size": 16,
            "spectrogram_bins": 17,
            "upsample_initial_channel": 16,
            "upsample_rates": [4, 2],
            "upsample_kernel_sizes": [8, 4],
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3]],
            "duration_predictor_filter_channels": 16,
            "duration_predictor_num_flows": 2,
            "depth_separable_num_layers": 1,
            "prior_encoder_num_flows": 2,
            "prior_encoder_num_wavenet_layers": 1,
            "posterior_encoder_num_wavenet_layers": 1,
        },
        lambda: {"input_ids": token_ids(1, 6, below=38)},
    ),
    audio(
        "univnet",
        "UnivNetModel",
        {
            "model_in_channels": 8,
            "model_hidden_channels": 4,
            "num_mel_bins": 10,
            "resblock_kernel_sizes": [3, 3],
            "resblock_stride_sizes": [4, 2],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
            "kernel_predictor_hidden_channels": 8,
            "kernel_predictor_num_blocks": 1,
        },
        lambda: {"input_features": floats(1, 6, 10), "noise_sequence": floats(1, 6, 8, seed=1)},
    ),
    audio(
        "speecht5",
        "SpeechT5ForSpeechToText",
        WAV2VEC2
        | {
            "vocab_size": 81,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_speech_positions": 64,
            "max_text_positions": 32,
            "encoder_max_relative_position": 8,
        },
        lambda: waveform()() | {"decoder_input_ids": token_ids(2, 5, below=81)},
        generates=True,
    ),
    audio(
        "speecht5_tts",
        "SpeechT5ForTextToSpeech",
        WAV2VEC2
        | {
            "vocab_size": 81,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "max_speech_positions": 64,
            "max_text_positions": 32,
            "encoder_max_relative_position": 8,
            "num_mel_bins": 8,
            "speech_decoder_prenet_units": 16,
            "speech_decoder_postnet_units": 16,
            "speech_decoder_postnet_layers": 2,
            "speaker_embedding_dim": 12,
        },
        lambda: {
            "input_ids": token_ids(2, 6, below=81),
            "decoder_input_values": floats(2, 4, 8),
            "speaker_embeddings": floats(2, 12),
        },
    ),
    audio(
        "speecht5_hifigan",
        "SpeechT5HifiGan",
        {
            "model_in_dim": 8,
            "upsample_initial_channel": 16,
            "upsample_rates": [2, 2],
            "upsample_kernel_sizes": [4, 4],
            "resblock_kernel_sizes": [3, 5],
            "resblock_dilation_sizes": [[1, 3], [1, 3]],
        },
        lambda: {"spectrogram": floats(2, 6, 8)},
    ),
    audio(
        "fastspeech2_conformer",
        "FastSpeech2ConformerModel",
        {
            "speaking_speed": 0.3,
            "vocab_size": 60,
            "hidden_size": 32,
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_num_attention_heads": 2,
            "decoder_num_attention_heads": 2,
            "encoder_linear_units": 20,
            "decoder_linear_units": 20,
            "duration_predictor_channels": 16,
            "energy_predictor_channels": 16,
            "pitch_predictor_channels": 16,
            "speech_decoder_postnet_units": 16,
            "speech_decoder_postnet_layers": 2,
        },
        lambda: {"input_ids": token_ids(1, 6, below=60)},
    ),
)
