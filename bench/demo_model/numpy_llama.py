"""A plain NumPy forward pass of a Llama folder in float32, with keys and values rounded as a BF16 cache holds them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

_ROWS_AT_ONCE = 256  # of queries, to bound the memory of scores


def round_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32; the file holds BF16 or F32."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(data[begin:end], dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data[begin:end], dtype=np.float32)
        tensors[name] = values.reshape(entry["shape"])
    return tensors


class NumpyLlama:
    """One sequence; its cache grows with each `forward`."""

    def __init__(self, folder: Path, bf16: bool) -> None:
        """`bf16` rounds the cache and what enters each matrix product; else all is float32."""
        self.config = json.loads((folder / "config.json").read_text())
        self.tensors = read_safetensors(folder / "model.safetensors")
        self.round = round_bf16 if bf16 else (lambda x: x)
        half = self.config["head_dim"] // 2
        self.frequencies = self.config["rope_theta"] ** (-np.arange(half) / half)
        self.window: int | None = None  # layers before the last then attend to at least this many latest positions only
        self.length = 0  # tokens that the cache holds; may be lowered to cut back to a prefix
        self._cache = [np.zeros(self._cache_shape(0), np.float32)] * self.config["num_hidden_layers"]

    def _cache_shape(self, capacity: int) -> tuple[int, int, int, int]:
        return 2, self.config["num_key_value_heads"], capacity, self.config["head_dim"]

    def cache(self, layer: int) -> np.ndarray:
        """Keys and values, [2, kv_heads, length, head_dim]: a view of what the next `forward` may overwrite."""
        return self._cache[layer][:, :, : self.length]

    def forward(self, tokens: list[int]) -> np.ndarray:
        """Logits after the last of `tokens`, which follow what the cache holds."""
        x = self.tensors["model.embed_tokens.weight"][tokens]
        positions = np.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        last = self.config["num_hidden_layers"] - 1
        for layer in range(last + 1):
            normed = self._norm(x, f"model.layers.{layer}.input_layernorm.weight")
            self._append(layer, normed, positions)
            if layer == last:  # nothing reads the other rows
                x, normed, positions = x[-1:], normed[-1:], positions[-1:]
            x = x + self._attend(layer, normed, positions, None if layer == last else self.window)
            x = x + self._mlp(layer, self._norm(x, f"model.layers.{layer}.post_attention_layernorm.weight"))
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return self._norm(x[-1:], "model.norm.weight")[0] @ self.tensors[head].T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return self.round(x * scale * self.tensors[name])

    def _mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        prefix = f"model.layers.{layer}.mlp."
        gate, up, down = (self.tensors[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
        g = x @ gate.T
        return self.round(g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T

    def _heads(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        projected = x @ self.tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T
        return projected.reshape(len(x), -1, self.config["head_dim"]).transpose(1, 0, 2)

    def _rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        angles = np.outer(positions, self.frequencies)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        first, second = np.split(x, 2, axis=-1)
        return self.round(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))

    def _append(self, layer: int, x: np.ndarray, positions: np.ndarray) -> None:
        key, value = self._rotate(self._heads(layer, "k", x), positions), self.round(self._heads(layer, "v", x))
        if self.length > self._cache[layer].shape[2]:
            grown = np.zeros(self._cache_shape(self.length * 5 // 4), np.float32)
            grown[:, :, : positions[0]] = self._cache[layer][:, :, : positions[0]]
            self._cache[layer] = grown
        self._cache[layer][:, :, positions] = key, value

    def _attend(self, layer: int, x: np.ndarray, positions: np.ndarray, window: int | None) -> np.ndarray:
        query = self._rotate(self._heads(layer, "q", x), positions)
        keys, values = self.cache(layer)
        group = len(query) // len(keys)
        out = np.empty((len(x), len(query), self.config["head_dim"]), np.float32)
        for begin in range(0, len(x), _ROWS_AT_ONCE):
            rows = positions[begin : begin + _ROWS_AT_ONCE]
            seen = np.arange(max(0, rows[0] + 1 - window) if window else 0, rows[-1] + 1)
            for head in range(len(query)):
                part = query[head, begin : begin + len(rows)]
                weights = self._weights(part, keys[head // group, seen[0] : seen[-1] + 1], rows, seen)
                out[begin : begin + len(rows), head] = weights @ values[head // group, seen[0] : seen[-1] + 1]
        out = self.round(out.reshape(len(x), -1))
        return out @ self.tensors[f"model.layers.{layer}.self_attn.o_proj.weight"].T

    def _weights(self, query: np.ndarray, key: np.ndarray, rows: np.ndarray, seen: np.ndarray) -> np.ndarray:
        scores = query @ key.T / np.float32(np.sqrt(self.config["head_dim"]))
        scores[seen[None, :] > rows[:, None]] = -np.inf
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        return scores / scores.sum(-1, keepdims=True)
