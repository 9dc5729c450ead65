"""The weights of a transformers Llama as a GGUF file, for llama.cpp. Needs the extra ``llama``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from safetensors import safe_open
from transformers import LlamaConfig

# Names in GGUF of what is in each layer; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_file(config: LlamaConfig, checkpoint: Path, path: Path, *, is_quantized: bool = False) -> Path:
    """Write the F32 weights in ``checkpoint`` as GGUF, one at a time, unless a newer file is there.

    Args:
        is_quantized: matrices as Q8_0, where their rows are whole blocks.
    """
    if path.exists() and path.stat().st_mtime > checkpoint.stat().st_mtime:
        return path
    import gguf

    Q8_0 = gguf.GGMLQuantizationType.Q8_0
    print(f"Writing {path}", flush=True)
    scratch = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(scratch, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_vocabulary(writer, config.vocab_size)

    with safe_open(checkpoint, "pt") as file:
        names = list(file.keys())
        for name in names:
            shape = file.get_slice(name).get_shape()
            size_bytes = 4 * torch.Size(shape).numel()
            if is_quantized and _has_blocks(shape):
                shape = gguf.quant_shape_to_byte_shape(shape, Q8_0)
                size_bytes = torch.Size(shape).numel()
                writer.add_tensor_info(gguf_name(name), shape, numpy.dtype("uint8"), size_bytes, Q8_0)
            else:
                writer.add_tensor_info(gguf_name(name), shape, numpy.dtype("float32"), size_bytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            weight = file.get_tensor(name)
            if name.endswith("q_proj.weight"):
                weight = interleaved(weight, config.num_attention_heads)
            elif name.endswith("k_proj.weight"):
                weight = interleaved(weight, config.num_key_value_heads)
            values = weight.numpy()
            writer.write_tensor_data(
                gguf.quantize(values, Q8_0) if is_quantized and _has_blocks(values.shape) else values
            )
    writer.close()
    scratch.replace(path)
    return path


def _has_blocks(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[-1] % 32 == 0


def gguf_name(name: str) -> str:
    """What GGUF calls a weight of a transformers Llama.

    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    owner, _, kind = name.rpartition(".")
    if owner in OTHER_NAMES:
        return f"{OTHER_NAMES[owner]}.{kind}"
    _, _, layer, place = owner.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[place]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in llama.cpp's order: it rotates neighbouring pairs, where transformers rotates halves of a head."""
    rows, columns = weight.shape
    halves = weight.view(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()


def _add_vocabulary(writer: object, size: int) -> None:
    """A made-up one: llama.cpp wants the tokens of all bytes, and the benchmark feeds token numbers."""
    import gguf

    special = ["<unk>", "<s>", "</s>"]
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    other = [f"t{number}" for number in range(size - len(special) - len(of_bytes))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * len(of_bytes) + [gguf.TokenType.NORMAL] * len(other)
    assert isinstance(writer, gguf.GGUFWriter)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *of_bytes, *other])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
