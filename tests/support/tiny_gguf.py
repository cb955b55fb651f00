"""A language model of a few thousand random weights, in the file format of llama.cpp (GGUF, version 3)."""

import struct

import numpy as np

WIDTH, HEADS, INNER, CONTEXT = 32, 2, 64, 512
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ALIGNMENT = 32
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def _string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(key, kind, value):
    return _string(key) + struct.pack("<I", kind) + value


def _array(kind, items):
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def write_model(path):
    """Write the model to a file."""
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "▁word"]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, _NORMAL, _NORMAL]
    numbers = {
        "llama.context_length": CONTEXT, "llama.embedding_length": WIDTH, "llama.block_count": 1,
        "llama.feed_forward_length": INNER, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": HEADS,
        "llama.rope.dimension_count": WIDTH // HEADS, "llama.vocab_size": len(tokens), "general.file_type": 0,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    entries = [
        _entry("general.architecture", _STRING, _string("llama")),
        _entry("general.name", _STRING, _string("tiny")),
        *[_entry(key, _U32, struct.pack("<I", value)) for key, value in numbers.items()],
        _entry("llama.attention.layer_norm_rms_epsilon", _F32, struct.pack("<f", 1e-5)),
        _entry("tokenizer.ggml.model", _STRING, _string("llama")),
        _entry("tokenizer.ggml.tokens", _ARRAY, _array(_STRING, [_string(token) for token in tokens])),
        _entry(
            "tokenizer.ggml.scores", _ARRAY, _array(_F32, [struct.pack("<f", -float(i)) for i in range(len(tokens))])
        ),
        _entry("tokenizer.ggml.token_type", _ARRAY, _array(5, [struct.pack("<i", kind) for kind in kinds])),
        _entry("tokenizer.ggml.add_bos_token", _BOOL, b"\1"),
    ]
    shapes = {"token_embd": (len(tokens), WIDTH), "output": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    random = np.random.default_rng(1)
    head, body = b"", b""
    for name, shape in shapes.items():
        weights = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.3, shape)
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += _string(f"{name}.weight") + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", 0, len(body))
        data = weights.astype("<f4").tobytes()
        body += data + bytes(-len(data) % _ALIGNMENT)
    start = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(entries)) + b"".join(entries) + head
    path.write_bytes(start + bytes(-len(start) % _ALIGNMENT) + body)
