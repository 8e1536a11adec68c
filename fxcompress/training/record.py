"""What was cut out of a network, as a tensor: the part of a state_dict that tells a fresh network how to become it.

A tensor, and no object, because that is all that safe loaders of weights let through. It holds JSON packed by zlib::

    {"v": 1, "s": {name: shape}, "m": [indices, ...], "k": {name: {dim: position in m}}, "c": cuts, "w": N, "b": biases,
     "j": [(place, operand, dim), ...], "o": only what leaves the model's code as it is}
"""

import dataclasses
import json
import zlib
from typing import Any

import torch
from torch import Tensor

from fxcompress.errors import CheckpointError
from fxcompress.provenance import Narrowing, Provenance

VERSION = 1
"""Of the record that this release writes, and the newest that it reads."""


def encode(provenance: Provenance) -> Tensor:
    """The record of a network in training, uint8 (n,); number formats, inputs and the fingerprint are left out.

    >>> provenance = Provenance({"weight": (4, 3)}, {"weight": {0: (0, 2)}})
    >>> decode(encode(provenance)) == provenance
    True
    """
    masks: dict[tuple[int, ...], int] = {}
    kept = {
        name: {str(dim): masks.setdefault(index, len(masks)) for dim, index in sorted(dims.items())}
        for name, dims in sorted(provenance.kept.items())
        if dims
    }
    about = {
        "v": VERSION, "s": provenance.shapes, "m": list(masks), "k": kept,
        "c": provenance.cuts, "w": provenance.weights, "b": provenance.biases,
        "j": [dataclasses.astuple(join) for join in provenance.joins], "o": provenance.own_code,
    }  # fmt: skip
    packed = zlib.compress(json.dumps(about, separators=(",", ":")).encode(), 6)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def decode(record: object) -> Provenance:
    """What :func:`encode` made the record of.

    Raises:
        CheckpointError: it is damaged, or of a newer release.
    """
    if not isinstance(record, Tensor) or record.dtype != torch.uint8:
        raise CheckpointError(f"the record of what was cut must be a uint8 tensor, and is a {type(record).__name__}")
    try:
        about: dict[str, Any] = json.loads(zlib.decompress(record.cpu().numpy().tobytes()))
        if about["v"] > VERSION:
            raise CheckpointError(
                f"the state_dict was made by a newer fxcompress (its record has version {about['v']}, this one reads "
                f"up to {VERSION}); upgrade it: pip install --upgrade fxcompress"
            )
        masks = [tuple(index) for index in about["m"]]
        return Provenance(
            shapes={name: tuple(shape) for name, shape in about["s"].items()},
            kept={name: {int(dim): masks[i] for dim, i in dims.items()} for name, dims in about["k"].items()},
            cuts=tuple((node, operand) for node, operand in about["c"]),
            weights=about["w"],
            biases=tuple(about["b"]),
            joins=tuple(Narrowing(*join) for join in about.get("j", ())),
            own_code=about.get("o", False),
        )
    except (LookupError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise CheckpointError(f"the record of what was cut is damaged: {error}; use another checkpoint") from error
