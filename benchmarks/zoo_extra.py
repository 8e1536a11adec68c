"""Networks of timm and transformers for the scoreboard: small or with tiny configurations, and with random weights."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_models import Arguments, Case, Shape

# One of each way to be unlike the networks of torchvision, and those that are used most.
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
    "botnet26t_256": 256,  # attention with positions relative to each other
    "coat_lite_tiny": 224,  # attention and depthwise convolutions in parallel
    "coatnet_nano_rw_224": 224,  # convolutions, then attention with a table of biases
    "convformer_s18": 96,  # scales of its own for each channel
    "convit_tiny": 224,  # attention mixed with positions by gates
    "convnextv2_atto": 96,  # norms over whole responses
    "crossvit_tiny_240": 240,  # two widths that look at each other
    "cs3darknet_s": 96,  # stages that are split and joined
    "dla46_c": 96,  # trees of layers
    "dpn48b": 96,  # sums and concatenations side by side
    "edgenext_xx_small": 96,  # attention over channels between convolutions
    "efficientformerv2_s0": 224,  # attention with heads that talk
    "efficientnetv2_rw_t": 96,  # gates, fused blocks
    "efficientvit_b0": 96,  # linear attention at several scales
    "fasternet_t0": 96,  # modules that choose their forward
    "fastvit_t8": 96,  # branches that are merged later
    "focalnet_tiny_srf": 96,  # gated contexts
    "gcresnext26ts": 96,  # contexts of the whole image
    "gmlp_ti16_224": 224,  # gates over positions
    "halonet26t": 256,  # attention over blocks with a halo
    "hiera_tiny_224": 224,  # pooled queries
    "inception_next_atto": 96,  # channels split among kernels
    "lambda_resnet26t": 256,  # lambda layers
    "levit_128s": 224,  # batch norm in attention
    "mambaout_femto": 96,  # gated convolutions, channels last
    "maxxvit_rmlp_nano_rw_256": 256,  # attention in windows and in grids
    "mixnet_s": 96,  # several kernels in one layer
    "mobilenetv4_conv_small": 96,  # depthwise layers at both ends
    "mobilenetv4_hybrid_medium": 96,  # attention that shares keys and values
    "nest_tiny": 224,  # blocks of images as a dim
    "pit_ti_224": 224,  # pooling between transformers
    "pvt_v2_b0": 96,  # keys and values of smaller images
    "regnetz_005": 96,  # gates in inverted bottlenecks
    "repvit_m0_9": 96,  # mixers of branches
    "rexnet_100": 96,  # sums over a part of the channels
    "selecsls42b": 96,  # concatenations across blocks
    "skresnet18": 96,  # kernels that are selected
    "starnet_s1": 96,  # products of branches
    "tiny_vit_5m_224": 224,  # windows, and convolutions between them
    "tnt_s_patch16_224": 224,  # a transformer within a transformer
    "twins_svt_small": 224,  # local and global attention in turn
}
_DEEP: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (224, {"depth": 2, "embed_dim": 96, "num_heads": 6}),  # a bias without keys
    "cait_xxs24_224": (224, {"depth": 2}),  # heads that talk, attention of the class alone
    "deit3_small_patch16_224": (224, {"depth": 2}),  # scales of layers
    "eva02_tiny_patch14_224": (224, {"depth": 2}),  # rotations and gates
    "resnet50_clip": (224, {}),  # attention in place of pooling
    "swin_tiny_patch4_window7_224": (224, {"depths": (1, 2, 2, 1)}),  # windows that shift
    "volo_d1_224": (224, {}),  # attention of outlooks
    "vit_relpos_small_patch16_224": (224, {"depth": 2}),  # biases by position
}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
_SEQUENCE = _TINY | {"intermediate_size": 128, "max_position_embeddings": 40}
_DECODER = _SEQUENCE | {"num_key_value_heads": 2, "use_cache": False, "head_dim": 16}
_HALVES = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_SEQ2SEQ = _HALVES | {"vocab_size": 99, "pad_token_id": 0, "use_cache": False}
_VISION = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128} | {
    "image_size": 64, "patch_size": 16
}  # fmt: skip
_SOUND = _TINY | {
    "intermediate_size": 128,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
# The class of the model, its type, and its configuration.
_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("SequenceClassification", "bert", _SEQUENCE),
    "roberta": ("MaskedLM", "roberta", _SEQUENCE),
    "electra": ("TokenClassification", "electra", _SEQUENCE | {"embedding_size": 32}),
    "albert": ("SequenceClassification", "albert", _SEQUENCE | {"embedding_size": 32}),
    "deberta-v2": (
        "SequenceClassification",
        "deberta-v2",
        _SEQUENCE | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "distilbert": (
        "SequenceClassification",
        "distilbert",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "vocab_size": 99, "max_position_embeddings": 40},
    ),
    "gpt2": (
        "CausalLM",
        "gpt2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 40, "use_cache": False} | _IDS,
    ),
    "gpt_neox": ("CausalLM", "gpt_neox", _SEQUENCE | {"use_cache": False}),
    "bloom": (
        "CausalLM",
        "bloom",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "use_cache": False},
    ),
    "opt": (
        "CausalLM",
        "opt",
        _TINY | {"ffn_dim": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 40, "use_cache": False},
    ),
    "llama": ("CausalLM", "llama", _DECODER),
    "qwen2": ("CausalLM", "qwen2", _DECODER),
    "qwen3": ("CausalLM", "qwen3", _DECODER),
    "mistral": ("CausalLM", "mistral", _DECODER | {"sliding_window": 8}),
    "gemma": ("CausalLM", "gemma", _DECODER | {"pad_token_id": 0}),
    "gemma2": ("CausalLM", "gemma2", _DECODER | {"pad_token_id": 0, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi": ("CausalLM", "phi", _DECODER),
    "mixtral": ("CausalLM", "mixtral", _DECODER | {"num_local_experts": 4, "experts_implementation": "eager"}),
    "mixtral_batched": (
        "CausalLM",
        "mixtral",
        _DECODER | {"num_local_experts": 4, "experts_implementation": "batched_mm"},
    ),
    "mamba": (
        "CausalLM",
        "mamba",
        {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 8, "use_cache": False},
    ),
    "t5": (
        "Seq2SeqLM",
        "t5",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 99,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": ("Seq2SeqLM", "bart", _SEQ2SEQ | {"decoder_start_token_id": 2, "max_position_embeddings": 40}),
    "whisper": (
        "SpeechSeq2Seq",
        "whisper",
        _SEQ2SEQ
        | {"num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 40, "decoder_start_token_id": 2}
        | _IDS,
    ),
    "wav2vec2": ("CTC", "wav2vec2", _SOUND),
    "wavlm": ("CTC", "wavlm", _SOUND),  # attention as one function of torch, on weights of its own
    "xlm": (  # values in asserts
        "MaskedLM",
        "xlm",
        {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "max_position_embeddings": 40},
    ),
    "vit": ("ImageClassification", "vit", _VISION),
    "dinov2": ("ImageClassification", "dinov2", _VISION),
    "clip": (
        "",
        "clip",
        {"text_config": _SEQUENCE | {"eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 48},
    ),
    "segformer": (
        "SemanticSegmentation",
        "segformer",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32},
    ),
    "detr": ("ObjectDetection", "detr", _HALVES | {"num_queries": 10}),
    "convnext": ("ImageClassification", "convnext", {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}),
    "swinv2": (
        "ImageClassification",
        "swinv2",
        {"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "image_size": 64, "window_size": 4},
    ),
}


def extra_cases(library: str) -> list[Case]:
    """The networks of ``timm`` or ``transformers``; none where that is not installed."""
    if find_spec(library) is None:
        return []
    if library == "timm":
        sizes = {name: (size, dict[str, Any]()) for name, size in _TIMM.items()} | _DEEP
        return [Case(n, "timm", _timm(n, options), Shape(s, s + 32), _image) for n, (s, options) in sizes.items()]
    return [Case(name, "transformers", _transformer(*row), *_called(name)) for name, row in _TRANSFORMERS.items()]


def _timm(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm: Any = import_module("timm")
        net: nn.Module = timm.create_model(name, pretrained=False, num_classes=100, **options)
        return net

    return build


def _transformer(task: str, kind: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers: Any = import_module("transformers")
        more: dict[str, Any] = {}
        if kind == "detr":
            sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "out_features": ["stage2"]}
            more = {"backbone_config": transformers.ResNetConfig(**sizes), "use_timm_backbone": False}
        config = transformers.AutoConfig.for_model(kind, **options | more)
        for part in (config, *(own for own in vars(config).values() if isinstance(own, transformers.PreTrainedConfig))):
            rates = [
                k for k, v in vars(part).items() if isinstance(v, float) and ("drop" in k or k == "mask_time_prob")
            ]
            vars(part).update(dict.fromkeys(rates, 0.0))  # removing channels moves the random numbers that hit others
        net: nn.Module = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel").from_config(config)
        return net

    return build


def _called(name: str) -> tuple[Shape, Callable[..., Arguments]]:
    """What a network of transformers takes."""
    images = {"vit": 64, "dinov2": 64, "segformer": 64, "convnext": 64, "swinv2": 64, "detr": 64}
    if name in images:
        return Shape(images[name], images[name] + 32), _image
    others: dict[str, tuple[Shape, Callable[..., Arguments]]] = {
        "t5": (Shape(16, 24), _two_texts),
        "bart": (Shape(16, 24), _two_texts),
        "clip": (Shape(16, 24), _text_and_image),
        "whisper": (Shape(64, 64), _speech),
        "wav2vec2": (Shape(800, 1200), _sound),
        "wavlm": (Shape(800, 1200), _sound),
    }
    return others.get(name, (Shape(16, 24), _text))


def _image(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return (torch.randn([batch, 3, size, size], generator=generator, dtype=torch.float64),)


def _ids(batch: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, 99, (batch, size), generator=generator)


def _text(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return (_ids(batch, size, generator),)


def _two_texts(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    """A text, its mask, and the text to be made of it."""
    mask = torch.ones(batch, size, dtype=torch.int64)
    mask[0, -3:] = 0
    return _ids(batch, size, generator), mask, _ids(batch, size - 4, generator)


def _text_and_image(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return _ids(batch, size, generator), torch.randn([batch, 3, 64, 64], generator=generator, dtype=torch.float64)


def _speech(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    """A spectrum, no mask, and the text that belongs to it."""
    return torch.randn([batch, 8, size], generator=generator, dtype=torch.float64), None, _ids(batch, 9, generator)


def _sound(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return (torch.randn([batch, size], generator=generator, dtype=torch.float64),)
