"""Networks of timm and transformers for the scoreboard: small or with tiny configurations, and with random weights."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_models import Arguments, Case, Shape

# One of each way to be unlike the networks of torchvision.
_TIMM = {
    "resnetv2_50": 96,  # norm first
    "resnest14d": 96,  # split attention
    "res2net50_26w_4s": 96,  # a chain of narrow convolutions within a block
    "hrnet_w18_small": 96,  # four resolutions, added up again and again
    "eca_nfnet_l0": 96,  # standardised weights
    "ghostnet_100": 96,  # channels made out of channels
    "mobilevit_xxs": 96,  # attention over unfolded images
    "poolformer_s12": 96,  # pooling in place of attention
    "mixer_s32_224": 224,  # linear layers over positions
    "deit_tiny_patch16_224": 224,  # attention of its own
    "xcit_nano_12_p8_224": 224,  # attention over channels
    "repvgg_a0": 96,  # three branches in a sum
}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "bert": _TINY | {"intermediate_size": 128},
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "llama": _TINY | {"intermediate_size": 128, "num_key_value_heads": 2},
    "qwen2": _TINY | {"intermediate_size": 128, "num_key_value_heads": 2},
    "opt": _TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64},
}


def extra_cases(library: str) -> list[Case]:
    """The networks of ``timm`` or ``transformers``; none where that is not installed."""
    if find_spec(library) is None:
        return []
    if library == "timm":
        return [Case(name, "timm", _timm(name), Shape(size, size + 32), _image) for name, size in _TIMM.items()]
    return [Case(kind, "transformers", _transformer(kind), Shape(16, 24), _text) for kind in _TRANSFORMERS]


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm: Any = import_module("timm")
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=100)
        return net

    return build


def _transformer(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers: Any = import_module("transformers")
        options = {"use_cache": False, "attn_implementation": "sdpa"} | _TRANSFORMERS[kind]
        config = transformers.AutoConfig.for_model(kind, **options)
        net: nn.Module = transformers.AutoModel.from_config(config)
        return net

    return build


def _image(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return (torch.randn([batch, 3, size, size], generator=generator, dtype=torch.float64),)


def _text(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return (torch.randint(0, 99, (batch, size), generator=generator),)
