"""Writes the GGUF that llama.cpp loads from a Llama folder in BF16: the same weights, the same byte-level BPE.

    gguf_from_safetensors.py FOLDER FILE
"""

import json
import mmap
import struct
import sys
from pathlib import Path

F32, BF16 = 0, 30
ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
NORMAL, CONTROL = 1, 3  # kinds of tokens

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
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


def name_of(name):
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def encode(kind, value):
    if kind == STRING:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data
    return struct.pack({UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}[kind], value)


def entry(key, kind, value):
    return encode(STRING, key) + struct.pack("<I", kind) + encode(kind, value)


def array(key, kind, values):
    body = b"".join(encode(kind, value) for value in values)
    return encode(STRING, key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + body


def model_entries(config):
    head_dim = config["head_dim"]
    numbers = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": config["vocab_size"],
    }
    entries = [entry("general.architecture", STRING, "llama"), entry("general.alignment", UINT32, ALIGNMENT)]
    entries += [entry(f"llama.{key}", UINT32, value) for key, value in numbers.items()]
    entries.append(entry("llama.attention.layer_norm_rms_epsilon", FLOAT32, config["rms_norm_eps"]))
    entries.append(entry("llama.rope.freq_base", FLOAT32, config["rope_theta"]))
    return entries


def tokenizer_entries(config, tokenizer):
    tokens = [""] * config["vocab_size"]
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index] = token
    kinds = [NORMAL] * len(tokens)
    for token in tokenizer["added_tokens"]:
        kinds[token["id"]] = CONTROL
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    return [
        entry("tokenizer.ggml.model", STRING, "gpt2"),
        entry("tokenizer.ggml.pre", STRING, "gpt-2"),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", INT32, kinds),
        array("tokenizer.ggml.merges", STRING, merges),
        entry("tokenizer.ggml.bos_token_id", UINT32, config["bos_token_id"]),
        entry("tokenizer.ggml.eos_token_id", UINT32, config["eos_token_id"]),
        entry("tokenizer.ggml.add_bos_token", BOOL, False),  # prompts are token ids
    ]


def rows_for_interleaved_rope(data, heads, shape):
    """llama.cpp rotates neighbours, Hugging Face's layout halves: row 2i of a head is row i, 2i + 1 is row half + i."""
    row_bytes = shape[1] * 2
    head_dim = shape[0] // heads
    half = head_dim // 2
    order = [h * head_dim + (i % 2) * half + i // 2 for h in range(heads) for i in range(head_dim)]
    return b"".join(data[row * row_bytes : (row + 1) * row_bytes] for row in order)


def contents(name, data, shape, config):
    if len(shape) == 1:  # norms: BF16 is the upper half of F32
        return b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    if name.endswith("q_proj.weight"):
        return rows_for_interleaved_rope(data, config["num_attention_heads"], shape)
    if name.endswith("k_proj.weight"):
        return rows_for_interleaved_rope(data, config["num_key_value_heads"], shape)
    return data


def padding(size):
    return b"\0" * (-size % ALIGNMENT)


def main(folder, path):
    config = json.loads((Path(folder) / "config.json").read_text())
    tokenizer = json.loads((Path(folder) / "tokenizer.json").read_text())
    with open(Path(folder) / "model.safetensors", "rb") as file:
        weights = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header_bytes = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    begin_of_data = 8 + header_bytes

    infos, offset = [], 0
    for name, tensor in header.items():
        if tensor["dtype"] != "BF16":
            sys.exit(f"{name} is {tensor['dtype']}, only BF16 is read")
        shape = tensor["shape"]
        kind = BF16 if len(shape) == 2 else F32
        size = (tensor["data_offsets"][1] - tensor["data_offsets"][0]) * (1 if kind == BF16 else 2)
        dimensions = b"".join(struct.pack("<Q", n) for n in reversed(shape))
        infos.append(encode(STRING, name_of(name)) + struct.pack("<I", len(shape)) + dimensions +
                     struct.pack("<IQ", kind, offset))
        offset += size + len(padding(size))

    entries = model_entries(config) + tokenizer_entries(config, tokenizer)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join(entries) + b"".join(infos)
    with open(path, "wb") as out:
        out.write(head + padding(len(head)))
        for name, tensor in header.items():
            begin, end = (begin_of_data + at for at in tensor["data_offsets"])
            data = contents(name, weights[begin:end], tensor["shape"], config)
            out.write(data + padding(len(data)))


if __name__ == "__main__":
    main(*sys.argv[1:])
