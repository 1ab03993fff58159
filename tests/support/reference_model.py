"""An independent decoder: plain torch from the equations, on the consolidated names and the interleaved rope.

It shares nothing with the package: positions turn pairs as complex numbers, attention is one loop over heads, there is
no cache and no mask argument. Slow and clear, in the dtype of the weights it is given.
"""

import math

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * hidden / hidden.square().mean(-1, keepdim=True).add(eps).sqrt()


def turn_interleaved_pairs(states: Tensor, theta: float) -> Tensor:
    """Multiply the pairs (x0, y0), (x1, y1), … of [positions, head_dim] by the unit complex numbers of rope."""
    positions, head_dim = states.shape
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=states.dtype) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=states.dtype), frequencies)
    pairs = torch.view_as_complex(states.reshape(positions, head_dim // 2, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).reshape(positions, head_dim)


def reference_logits(weights: dict[str, Tensor], params: dict[str, float], token_ids: Tensor) -> Tensor:
    """Logits [positions, vocab_size] of one sequence [positions]; `params` are those of params.json."""
    head_dim, eps, theta = int(params["head_dim"]), params["norm_eps"], params["rope_theta"]
    group = int(params["n_heads"] / params["n_kv_heads"])
    positions = len(token_ids)
    future = torch.ones(positions, positions).triu(1).bool()
    hidden = weights["tok_embeddings.weight"][token_ids]
    for layer in range(int(params["n_layers"])):
        at = f"layers.{layer}."
        normed = rms_norm(hidden, weights[at + "attention_norm.weight"], eps)
        queries, keys, values = (normed @ weights[f"{at}attention.{name}.weight"].T for name in ("wq", "wk", "wv"))
        attended = []
        for head in range(int(params["n_heads"])):
            own, shared = head * head_dim, head // group * head_dim
            query = turn_interleaved_pairs(queries[:, own : own + head_dim], theta)
            key = turn_interleaved_pairs(keys[:, shared : shared + head_dim], theta)
            scores = (query @ key.T / math.sqrt(head_dim)).masked_fill(future, -math.inf)
            attended.append(scores.softmax(-1) @ values[:, shared : shared + head_dim])
        hidden = hidden + torch.cat(attended, -1) @ weights[at + "attention.wo.weight"].T
        normed = rms_norm(hidden, weights[at + "ffn_norm.weight"], eps)
        w1, w2, w3 = (weights[f"{at}feed_forward.{name}.weight"] for name in ("w1", "w2", "w3"))
        gate = normed @ w1.T
        hidden = hidden + (gate * gate.sigmoid() * (normed @ w3.T)) @ w2.T
    return rms_norm(hidden, weights["norm.weight"], eps) @ weights["output.weight"].T
