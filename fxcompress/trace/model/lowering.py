"""Modules of torch.nn in a form that can have fewer heads, smaller ones, or fewer channels than it divides by.

nn.MultiheadAttention and the transformer layers around it are traced as one opaque call whose sizes are fixed. On the
skeleton of a model they become what they compute: linear layers and scaled_dot_product_attention. Names and tensors
stay, so the state_dict is the same; an instance only gets a class with another ``forward``.

    self_attn (call_module)   ->   linear, chunk, unflatten, scaled_dot_product_attention, flatten, out_proj
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxcompress.trace.basics.modules import modules_in


class Lowered(nn.Module):
    """Mark of the classes below: torch.fx traces into them."""


def lower(root: nn.Module) -> None:
    """Give the modules in ``root``, a skeleton, their lowered classes, in place."""
    for module in modules_in(root):
        found = _LOWERED.get(type(module))
        if found is not None and not _is_odd(module):
            module.__class__ = found
        if type(module) is NonDynamicallyQuantizableLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]


def _is_odd(module: nn.Module) -> bool:
    """Attention with extra keys and values, which stays opaque, and group norms with a group for each channel."""
    if isinstance(module, nn.GroupNorm):
        return 1 < module.num_groups == module.num_channels
    return isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn)


def drop_averages(graph: fx.Graph) -> None:
    """Erase the averages of attention weights that nobody reads."""
    for node in reversed(graph.nodes):
        if node.target is average_heads and not node.users:
            graph.erase_node(node)


class LoweredAttention(Lowered, nn.MultiheadAttention):
    """nn.MultiheadAttention as linear layers and products; batched or not, either order of dims."""

    def forward(  # noqa: D102 - the signature of nn.MultiheadAttention
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: FBT001, FBT002 - a hint; the mask says it as well
    ) -> tuple[Tensor, Tensor | None]:
        check_hint(attn_mask, is_causal=is_causal)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        rate = self.dropout if self.dropout and self.training else 0.0
        masks, scale = (attn_mask, key_padding_mask), self.head_dim**-0.5
        y, weights = attend(q, k, v, masks, rate, scale, need_weights=need_weights, average=average_attn_weights)
        y = y.transpose(-3, -2) if self.batch_first else y.movedim(-2, 0)
        return self.out_proj(y.flatten(-2)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, heads side by side in the last dim."""
        n = self.embed_dim
        bias: Tensor | None = self.in_proj_bias  # None where there is none, whatever torch's annotation says
        if self._qkv_same_embed_dim and query is key and key is value:
            whole = F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
            return whole[0], whole[1], whole[2]  # torch.fx takes a frame apart to unpack
        if self._qkv_same_embed_dim:
            matrices = thirds(self.in_proj_weight, n)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else thirds(bias, n)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """(..., heads, tokens, dims)."""
        x = x.unflatten(-1, (self.num_heads, -1))
        return x.transpose(-3, -2) if self.batch_first else x.movedim(0, -2)


def check_hint(attn_mask: Tensor | None, *, is_causal: bool) -> None:
    """Check that the hint ``is_causal`` comes with its mask, as torch does.

    Raises:
        ValueError: it does not.
    """
    if is_causal is True and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which is missing")


def thirds(packed: Tensor, size: int) -> tuple[Any, ...]:
    """What is packed for queries, keys and values, ``size`` rows for each of the first two."""
    return packed[:size], packed[size : 2 * size], packed[2 * size :]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    rate: float,
    scale: float,
    *,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:
    """What the heads of an attention return, (..., heads, L, dims), and its weights, where they are needed.

    Args:
        q: (..., heads, L, dims).
        k: (..., heads, S, dims).
        v: the same.
        masks: see :func:`merge_masks`.
        rate: of dropout.
        scale: of the products.
        need_weights: whether the weights are asked for.
        average: over the heads.
    """
    mask = None if masks[0] is None and masks[1] is None else merge_masks(q, *masks)
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, mask, rate, scale=scale), None
    logits = (q * scale) @ k.transpose(-2, -1)
    attention = F.softmax(logits if mask is None else logits + mask, -1)
    attention = F.dropout(attention, rate) if rate else attention
    y = attention @ v
    return y, average_heads(attention) if average else attention


@fx.wrap
def merge_masks(query: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """What is added to the logits of all heads.

    Args:
        query: (..., heads, L, dims).
        attn_mask: (L, S), or (N * heads, L, S); bool, True where nothing may be read, or what is to be added.
        key_padding_mask: (N, S) or (S,), in the same two forms.
    """
    mask = _additive(attn_mask, query)
    if mask is not None and mask.dim() == 3 and query.dim() == 4:
        mask = mask.view(*query.shape[:2], *mask.shape[1:])
    padding = _additive(key_padding_mask, query)
    if padding is None:
        return mask
    padding = padding.unsqueeze(-2) if padding.dim() == 1 else padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -torch.inf)


@fx.wrap
def average_heads(attention: Tensor) -> Tensor:
    """The mean of the attention weights over heads: (..., heads, L, S) to (..., L, S)."""
    return attention.mean(-3)


class LoweredEncoderLayer(Lowered, nn.TransformerEncoderLayer):
    """nn.TransformerEncoderLayer without its fast path for inference."""

    def forward(  # noqa: D102 - the signature of nn.TransformerEncoderLayer
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), *masks, is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, *masks, is_causal))
        y: Tensor = self.norm2(src + self._ff_block(src))
        return y


class LoweredDecoderLayer(Lowered, nn.TransformerDecoderLayer):
    """nn.TransformerDecoderLayer, whose own code can be traced."""


class LoweredEncoder(Lowered, nn.TransformerEncoder):
    """nn.TransformerEncoder without nested tensors."""

    def forward(  # noqa: D102 - the signature of nn.TransformerEncoder
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,  # noqa: FBT001
    ) -> Tensor:
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class LoweredDecoder(Lowered, nn.TransformerDecoder):
    """nn.TransformerDecoder without a look at its masks."""

    def forward(  # noqa: D102 - the signature of nn.TransformerDecoder
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,  # noqa: FBT001
        memory_is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        for layer in self.layers:
            tgt = layer(tgt, memory, *masks)
        return tgt if self.norm is None else self.norm(tgt)


class LoweredTransformer(Lowered, nn.Transformer):
    """nn.Transformer without its checks of shapes."""

    def forward(  # noqa: D102, PLR0917 - the signature of nn.Transformer
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,  # noqa: FBT001
        tgt_is_causal: bool | None = None,  # noqa: FBT001
        memory_is_causal: bool = False,  # noqa: FBT001, FBT002
    ) -> Tensor:
        memory = self.encoder(src, src_mask, src_key_padding_mask)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        y: Tensor = self.decoder(tgt, memory, *masks)
        return y


class LoweredRMSNorm(Lowered, nn.RMSNorm):
    """nn.RMSNorm as a call of the function, in whose place a rewrite can put another."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the signature of nn.RMSNorm
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class LoweredLayerNorm(Lowered, nn.LayerNorm):
    """The same for nn.LayerNorm."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the signature of nn.LayerNorm
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LoweredGroupNorm(Lowered, nn.GroupNorm):
    """The same for an nn.GroupNorm with groups of several channels."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102 - the signature of nn.GroupNorm
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


_LOWERED: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: LoweredAttention,
    nn.TransformerEncoderLayer: LoweredEncoderLayer,
    nn.TransformerDecoderLayer: LoweredDecoderLayer,
    nn.TransformerEncoder: LoweredEncoder,
    nn.TransformerDecoder: LoweredDecoder,
    nn.Transformer: LoweredTransformer,
    nn.RMSNorm: LoweredRMSNorm,
    nn.LayerNorm: LoweredLayerNorm,
    nn.GroupNorm: LoweredGroupNorm,
}

UNLOWERED: dict[type[nn.Module], type[nn.Module]] = {
    lowered: kind for kind, lowered in _LOWERED.items() if kind in {nn.RMSNorm, nn.LayerNorm, nn.GroupNorm}
}
"""The class of torch.nn by the lowered one, of those that compute the same on fewer channels."""
