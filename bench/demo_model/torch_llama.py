"""The Llama architecture in PyTorch, with the parameter names of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


STRIP = 512  # of queries
HIDDEN = -1e5  # the score of a future position; finite, as compiled gradients of an infinite one are no numbers


@dataclass(frozen=True)
class Shape:
    vocab: int
    hidden: int = 256
    inner: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    epsilon: float = 1e-5
    rope_theta: float = 1e8

    def to_config(self, max_positions: int, bos: int, eos: int) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": self.vocab,
            "max_position_embeddings": max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.epsilon,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": bos,
            "eos_token_id": eos,
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rotary_angles(positions: int, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [positions, 1, head_dim / 2]."""
    half = shape.head_dim // 2
    frequencies = shape.rope_theta ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64, device=device), frequencies)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).bfloat16()


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight).bfloat16()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.bfloat16())


def attend(rows: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal, of `rows` sequences that lie one after the other. [tokens, heads, head_dim] each, `key` and `value` with
    fewer heads. In strips of queries, which need no keys beyond their end."""
    tokens, heads, head_dim = query.shape
    positions, kv_heads = tokens // rows, key.shape[1]
    pairs, group = rows * kv_heads, heads // kv_heads

    def by_pair(x: Tensor, *inner: int) -> Tensor:
        return x.view(rows, positions, -1, head_dim).transpose(1, 2).reshape(pairs, *inner, positions, head_dim)

    query, key, value = by_pair(query, group), by_pair(key), by_pair(value)
    outputs = []
    for begin in range(0, positions, STRIP):
        end = min(begin + STRIP, positions)
        queries = query[:, :, begin:end].reshape(pairs, -1, head_dim)
        scores = torch.bmm(queries, key[:, :end].transpose(1, 2)).view(pairs, group, end - begin, end).float()
        places = torch.arange(end, device=query.device)
        future = places > places[begin:, None]
        weights = torch.softmax((scores * head_dim**-0.5).masked_fill(future, HIDDEN), dim=-1)
        mixed = torch.bmm(weights.bfloat16().view(pairs, -1, end), value[:, :end])
        outputs.append(mixed.view(pairs, group, end - begin, head_dim))
    mixed = torch.cat(outputs, dim=2).view(rows, heads, positions, head_dim)
    return mixed.transpose(1, 2).reshape(tokens, heads * head_dim)


def project(
    shape: Shape, x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor, w_query: Tensor, w_key: Tensor, w_value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as `attend` takes them."""
    inner = normed(x, norm, shape.epsilon)
    split = (x.shape[0], -1, shape.head_dim)
    query = rotate(linear(inner, w_query).view(split), cos, sin)
    key = rotate(linear(inner, w_key).view(split), cos, sin)
    return query, key, linear(inner, w_value).view(split)


def finish(
    shape: Shape, x: Tensor, mixed: Tensor, w_out: Tensor, norm: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor
) -> Tensor:
    """The residual stream after a layer whose attention gave `mixed`."""
    x = x + linear(mixed, w_out)
    inner = normed(x, norm, shape.epsilon)
    return x + linear(F.silu(linear(inner, w_gate)) * linear(inner, w_up), w_down)


# A layer is then a few fused loops instead of hundreds of passes over memory.
compiled_project, compiled_attend, compiled_finish = (
    torch.compile(function, dynamic=False) for function in (project, attend, finish)
)


@dataclass(frozen=True)
class Guide:
    """Where a head should look: from position rows[b, i] at position targets[b, i], both [sequences, count]; a negative
    target is none."""

    head: int
    rows: Tensor
    targets: Tensor


def guide_loss(query: Tensor, key: Tensor, guide: Guide) -> Tensor:
    """Cross entropy of a head's weights, 0 without targets; `query` and `key` are [sequences, positions, head_dim] of it."""
    chosen = query.gather(1, guide.rows[..., None].expand(-1, -1, query.shape[2]))
    logits = (chosen @ key.transpose(1, 2)).float() * query.shape[2] ** -0.5
    future = torch.arange(key.shape[1], device=key.device) > guide.rows[..., None]
    logits = logits.masked_fill(future, float("-inf"))
    losses = F.cross_entropy(logits.flatten(0, 1), guide.targets.flatten(), ignore_index=-1, reduction="sum")
    return losses / (guide.targets >= 0).sum().clamp(min=1)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.hidden, bias=False)


class Block(nn.Module):
    """Parameters under the names of a checkpoint, in the order that project and finish take them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.input_layernorm = nn.RMSNorm(shape.hidden)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden)
        self.mlp = Mlp(shape)

    def forward(
        self, rows: int, x: Tensor, cos: Tensor, sin: Tensor, guides: Sequence[Guide]
    ) -> tuple[Tensor, list[Tensor]]:
        norm_in, w_query, w_key, w_value, *rest = self.parameters()
        query, key, value = compiled_project(self.shape, x, cos, sin, norm_in, w_query, w_key, w_value)
        x = compiled_finish(self.shape, x, compiled_attend(rows, query, key, value), *rest)
        group = self.shape.heads // self.shape.kv_heads

        def of_head(heads: Tensor, head: int) -> Tensor:
            return heads[:, head].view(rows, -1, self.shape.head_dim)

        return x, [guide_loss(of_head(query, g.head), of_head(key, g.head // group), g) for g in guides]


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden)


class TorchLlama(nn.Module):
    """Tied embeddings. Computes in bf16, whatever the parameters are."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        residual_scale = (2 * shape.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 * (residual_scale if is_output else 1.0))

    def forward(
        self, tokens: Tensor, guides: Mapping[int, Sequence[Guide]] = MappingProxyType({})
    ) -> tuple[Tensor, list[Tensor]]:
        """What the head reads at every position, and the losses of the guides (by layer), in order."""
        rows, positions = tokens.shape
        cos, sin = (part.repeat(rows, 1, 1) for part in rotary_angles(positions, self.shape, tokens.device))
        x = self.model.embed_tokens(tokens.flatten()).bfloat16()
        losses: list[Tensor] = []
        for index, layer in enumerate(self.model.layers):
            x, layer_losses = layer(rows, x, cos, sin, guides.get(index, ()))
            losses += layer_losses
        return normed(x, self.model.norm.weight, self.shape.epsilon).view(rows, positions, -1), losses

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.model.embed_tokens.weight)
