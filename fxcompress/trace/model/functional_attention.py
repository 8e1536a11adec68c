"""F.multi_head_attention_forward as what it computes, for models that call it on weights of their own.

It is one function with fixed sizes, as nn.MultiheadAttention is one module; see lowering.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.trace.model.lowering import attend, check_hint, thirds


def can_be_opened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call has no extra keys and values, and none that are given already projected."""
    given = dict(zip(_NAMES, args, strict=False)) | kwargs
    extra = any(given.get(name) is not None for name in ("bias_k", "bias_v", "static_k", "static_v"))
    return not extra and given.get("add_zero_attn") is False


def multi_head_attention(  # noqa: PLR0913, PLR0917 - the signature of torch
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,  # noqa: FBT001
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,  # noqa: FBT001, FBT002
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,  # noqa: FBT001, FBT002
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,  # noqa: FBT001, FBT002
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,  # noqa: FBT001, FBT002
    is_causal: bool = False,  # noqa: FBT001, FBT002 - a hint; the mask says it as well
) -> tuple[Tensor, Tensor | None]:
    """Inputs are (tokens, samples, channels) or (tokens, channels).

    Raises:
        ValueError: the hint ``is_causal`` comes without its mask.
    """
    check_hint(attn_mask, is_causal=is_causal)
    n = embed_dim_to_check
    matrices: tuple[Any, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        assert in_proj_weight is not None
        matrices = thirds(in_proj_weight, n)
    biases = (None, None, None) if in_proj_bias is None else thirds(in_proj_bias, n)
    inputs = (query.unflatten(-1, (n,)), key, value)  # torch compares this size with the number that it is told
    given = zip(inputs, matrices, biases, strict=True)
    heads = (num_heads, n // num_heads)
    q, k, v = (F.linear(x, w, c).unflatten(-1, heads).movedim(0, -2) for x, w, c in given)
    masks, rate, scale = (attn_mask, key_padding_mask), dropout_p if training else 0.0, (n // num_heads) ** -0.5
    y, weights = attend(q, k, v, masks, rate, scale, need_weights=need_weights, average=average_attn_weights)
    return F.linear(y.movedim(-2, 0).flatten(-2), out_proj_weight, out_proj_bias), weights


_CODE = multi_head_attention.__code__
_NAMES = _CODE.co_varnames[: _CODE.co_argcount]
ATTENTION = torch.nn.functional.multi_head_attention_forward
"""The function of torch."""
