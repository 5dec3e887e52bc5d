"""A random gpt-oss model in llama.cpp's file format.

``python -m tests.benchmarks.random_gguf FILE {bf16|q8_0} [LAYERS]``

Experts in MXFP4; the other matrices in bfloat16 as in the published checkpoint, or in Q8_0 as in the files that
llama.cpp's people publish. Shapes are those of gpt-oss-20b, values are random and small, and there is no vocabulary:
the file is for measuring time. Needs the packages ``gguf`` and ``numpy`` alone.
"""

from __future__ import annotations

import sys
from typing import Any

import gguf  # type: ignore[import-not-found]  # of llama.cpp, where its benchmark runs
import numpy as np

WIDTH, INNER, EXPERTS, CHOSEN, HEADS, KV_HEADS, HEAD, VOCAB = 2880, 2880, 32, 4, 64, 8, 64, 201088
Kind = gguf.GGMLQuantizationType
BLOCKS = {Kind.MXFP4: (32, 17), Kind.Q8_0: (32, 34), Kind.BF16: (1, 2), Kind.F32: (1, 4)}
"""Values in a block, and bytes of it."""


def tensors(layers: int, dense: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> shape and kind, in the order of the file."""
    found: dict[str, tuple[tuple[int, ...], Any]] = {
        "token_embd.weight": ((VOCAB, WIDTH), dense), "output.weight": ((VOCAB, WIDTH), dense),
        "output_norm.weight": ((WIDTH,), Kind.F32)}
    for layer in range(layers):
        sizes = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
        one: dict[str, tuple[tuple[int, ...], Any]] = {
            "attn_norm.weight": ((WIDTH,), Kind.F32), "post_attention_norm.weight": ((WIDTH,), Kind.F32),
            **{f"attn_{name}.weight": ((rows, WIDTH), dense) for name, rows in sizes.items()},
            **{f"attn_{name}.bias": ((rows,), Kind.F32) for name, rows in sizes.items()},
            "attn_output.weight": ((WIDTH, HEADS * HEAD), dense), "attn_output.bias": ((WIDTH,), Kind.F32),
            "attn_sinks.weight": ((HEADS,), Kind.F32),
            "ffn_gate_inp.weight": ((EXPERTS, WIDTH), Kind.F32), "ffn_gate_inp.bias": ((EXPERTS,), Kind.F32)}
        for name, rows, columns in (("gate", INNER, WIDTH), ("up", INNER, WIDTH), ("down", WIDTH, INNER)):
            one[f"ffn_{name}_exps.weight"] = ((EXPERTS, rows, columns), Kind.MXFP4)
            one[f"ffn_{name}_exps.bias"] = ((EXPERTS, rows), Kind.F32)
        found |= {f"blk.{layer}.{name}": entry for name, entry in one.items()}
    return found


def values(name: str, shape: tuple[int, ...], kind: Any, noise: np.ndarray) -> np.ndarray:
    """Random bytes of a tensor, such that its values are small and finite."""
    count = int(np.prod(shape))
    if kind == Kind.F32:
        small = np.resize(noise, count).astype(np.float32) / 2560
        return np.ones(shape, np.float32) if "norm" in name else (small - 0.05).reshape(shape)
    each, size = BLOCKS[kind]
    blocks = np.resize(noise, count // each * size).reshape(-1, size)
    if kind == Kind.MXFP4:
        blocks[:, 0] = 119 + (blocks[:, 0] & 1)
    elif kind == Kind.Q8_0:
        blocks[:, :2] = np.frombuffer(np.float16(0.02 / 64).tobytes(), np.uint8)
    else:  # bfloat16 of either sign, from 2 ** -6 on
        blocks[:, 1] = blocks[:, 1] & 0x80 | 0x3C
    return blocks.reshape(*shape[:-1], -1)


def main(path: str, kind: str, layers: int = 24) -> None:
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_name("random")
    writer.add_block_count(layers)
    writer.add_context_length(131072)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(150000.0)
    writer.add_sliding_window(128)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(CHOSEN)
    writer.add_expert_feed_forward_length(INNER)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(4096)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    noise = np.random.default_rng(0).integers(0, 256, (1 << 26) + 1, dtype=np.uint8)
    found = tensors(layers, Kind.BF16 if kind == "bf16" else Kind.Q8_0)
    for name, (shape, of) in found.items():
        each, size = BLOCKS[of]
        stored = shape if of == Kind.F32 else (*shape[:-1], shape[-1] // each * size)
        dtype = np.dtype(np.float32 if of == Kind.F32 else np.uint8)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(shape)) // each * size,
                               raw_dtype=None if of == Kind.F32 else of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (shape, of) in found.items():  # one at a time: the file is larger than memory should be
        writer.write_tensor_data(values(name, shape, of, noise))
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
