"""Attention in the forms that people write it in, for random networks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """How an attention is written.

    Attributes:
        heads: number of them; 0 for one head without a dim of its own.
        head: dims of q and k in each head.
        value: dims of v in each head.
        product: "sdpa", "matmul", "einsum", "cross" (q first, as channels) or "transposed" (attention among dims).
        packed: one layer makes q, k and v.
        shared: heads that share their k and v.
        extra: "", "temperature", "norm", "bias" or "mask".
        scaled: by "default", "literal" or "size".
    """

    heads: int
    head: int
    value: int
    product: str = "sdpa"
    packed: bool = False
    shared: int = 1
    extra: str = ""
    scaled: str = "default"

    @property
    def among_dims(self) -> bool:
        """Whether the dims of each of several heads attend to each other."""
        return self.product == "transposed" and self.heads > 1


class Attention(nn.Module):
    """Attention among the pixels of (N, C, H, W), with as many channels as come in."""

    def __init__(self, channels: int, form: Form, tokens: int) -> None:
        super().__init__()
        self.form = form
        heads, kv = max(form.heads, 1), max(form.heads, 1) // form.shared
        self.sizes = [heads * form.head, kv * form.head, kv * form.value]
        if form.packed:
            self.qkv = nn.Linear(channels, sum(self.sizes))
        else:
            self.q, self.k, self.v = (nn.Linear(channels, n, bias=form.extra != "mask") for n in self.sizes)
        self.out = nn.Linear(heads * form.value, channels)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.norm = nn.LayerNorm(form.head) if form.extra == "norm" else nn.Identity()
        self.bias = nn.Parameter(torch.randn(heads, tokens, tokens)) if form.extra == "bias" else None

    def forward(self, x: Tensor) -> Tensor:
        form = self.form
        tokens = x.flatten(2).transpose(1, 2)
        if form.packed:
            q, k, v = self.qkv(tokens).split(self.sizes, -1)
        else:
            q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        if form.heads:
            q, k, v = (
                t.unflatten(-1, (-1, n)).transpose(1, 2) for t, n in ((q, form.head), (k, form.head), (v, form.value))
            )
        y = self.attend(self.norm(q), self.norm(k), v)
        y = y.transpose(1, 2).flatten(2) if form.heads else y
        return self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        form = self.form
        if form.product == "sdpa":
            return F.scaled_dot_product_attention(
                q, k, v, self.bias, scale=None if form.scaled == "default" else 0.4, enable_gqa=form.shared > 1
            )
        if form.shared > 1:
            k, v = k.repeat_interleave(form.shared, 1), v.repeat_interleave(form.shared, 1)
        if form.product == "transposed":
            return (v @ (self.scale(k.transpose(-1, -2) @ q)).softmax(-2)) if form.head == form.value else v
        logits = self.scale(
            torch.einsum("...ld,...sd->...ls", q, k) if form.product == "einsum" else q @ k.transpose(-1, -2)
        )
        if self.bias is not None:
            logits = logits + self.bias if form.heads else logits
        y: Tensor = logits.softmax(-1) @ v
        return y

    @staticmethod
    def split(x: Tensor, size: int) -> Tensor:
        """(N, T, heads * size) to (N, heads, T, size)."""
        y: Tensor = x.unflatten(-1, (-1, size)).transpose(1, 2)
        return y

    def scale(self, logits: Tensor) -> Tensor:
        if self.form.extra == "temperature" and self.form.heads:
            return logits * self.temperature
        return logits / 2
