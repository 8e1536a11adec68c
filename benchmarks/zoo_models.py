"""The networks of the scoreboard: how each is built, and what it is called with.

Those of torchvision come from its own registry, so that none is forgotten; sizes are chosen by prefix of the name.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a network is called with.

    Attributes:
        size: height and width of the image, or length of the text.
        other: another one, to see whether the result takes it.
        near: a third one, for networks that take another path at ``other`` and are refused there; 0 for none.
        batch: images in the example.
        frames: of a video clip; 0 for an image.
        lesson: images in the step of training: two where there is batch norm.
    """

    size: int = 96
    other: int = 128
    near: int = 0
    batch: int = 2
    frames: int = 0
    lesson: int = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One network.

    Attributes:
        name: of the network.
        family: the table in which it stands.
        build: makes it, with random weights.
        shape: of what it is called with.
        arguments: makes that, from batch, size and a generator.
        targets: what it is given in addition to train, from the batch and the size.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    shape: Shape
    arguments: Callable[[Shape, int, int, torch.Generator], Arguments]
    targets: Callable[[int, int], Arguments] | None = None

    def example(self, seed: int, batch: int = 0, size: int = 0) -> Arguments:
        """Random arguments in float64; the batch and the size of the case unless others are given."""
        generator = torch.Generator().manual_seed(seed)
        return self.arguments(self.shape, batch or self.shape.batch, size or self.shape.size, generator)

    def lesson(self, seed: int) -> Arguments:
        """What it is trained on, with targets where it takes them."""
        batch = self.shape.lesson
        return self.example(seed, batch) + (self.targets(batch, self.shape.size) if self.targets else ())


# The first prefix that fits. Small images, as float64 on one core is slow; the table states the size.
_SHAPES: tuple[tuple[str, Shape], ...] = (
    ("inception_v3", Shape(299, 331)),  # its auxiliary head does not fit into less
    ("vit_b", Shape(224, 256)),
    ("vit_l_32", Shape(128, 160)),  # a multiple of its patches
    ("vit_", Shape(112, 128)),
    ("maxvit", Shape(224, 256)),
    ("swin_v2", Shape(256, 224)),
    ("swin3d", Shape(64, 96, batch=1, frames=16, lesson=1)),
    ("swin", Shape(224, 256, 192)),  # at 256 its last stage has room to shift its windows
    ("mvit", Shape(128, 160, batch=1, frames=16, lesson=1)),
    ("s3d", Shape(224, 256, batch=1, frames=16)),
    ("r3d", Shape(64, 96, frames=8)),
    ("mc3", Shape(64, 96, frames=8)),
    ("r2plus1d", Shape(64, 96, frames=8)),
    ("raft", Shape(128, 160, batch=1)),
)
# Detection networks enlarge their images by themselves; these options keep that within reason.
_SMALL = {"min_size": 128, "max_size": 192}
# Those in two stages look again at each of their proposals.
_FEW = {"rpn_post_nms_top_n_train": 32, "rpn_post_nms_top_n_test": 32, "box_detections_per_img": 4}


def torchvision_cases() -> list[Case]:
    """All networks of torchvision that are not quantized."""
    from torchvision import models

    places: dict[str, tuple[Any, Callable[..., Arguments]]] = {
        "classification": (models, _image),
        "segmentation": (models.segmentation, _image),
        "video": (models.video, _image),
        "optical flow": (models.optical_flow, _two_images),
        "detection": (models.detection, _images),
    }
    return [
        Case(
            name, family, _builder(name, family), _shape(name), arguments, *([_boxes] if family == "detection" else [])
        )
        for family, (place, arguments) in places.items()
        for name in models.list_models(place)
    ]


def _shape(name: str) -> Shape:
    return next((shape for prefix, shape in _SHAPES if name.startswith(prefix)), Shape())


def _builder(name: str, family: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        known = inspect.signature(models.get_model_builder(name)).parameters
        options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in known else {}
        if name in {"googlenet", "inception_v3"}:
            options["init_weights"] = False  # theirs takes a minute, and is replaced by ours
        if name.startswith("vit_"):
            options["image_size"] = _shape(name).size
        if family == "detection" and not name.startswith("ssd"):
            options |= _SMALL | (_FEW if "rcnn" in name else {})
        with _smaller_clips(_shape(name).size):
            net: nn.Module = models.get_model(name, weights=None, **options)
        return net

    return build


@contextmanager
def _smaller_clips(size: int) -> Iterator[None]:
    """Let the builders of MViT, which take no other size than 224, make networks for smaller images."""
    from torchvision.models.video import mvit

    whole = mvit.MViT

    def smaller(**options: Any) -> nn.Module:  # noqa: ANN401 - those of MViT
        net: nn.Module = whole(**options | {"spatial_size": (size, size)})
        return net

    with patch.object(mvit, "MViT", smaller):
        yield


def _random(shape: list[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _image(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    frames = [shape.frames] if shape.frames else []
    return (_random([batch, 3, *frames, size, size], generator),)


def _two_images(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return tuple(_random([batch, 3, size, size], generator) for _ in range(2))


def _images(shape: Shape, batch: int, size: int, generator: torch.Generator) -> Arguments:
    return ([_random([3, size, size], generator) for _ in range(batch)],)


def _boxes(batch: int, size: int) -> Arguments:
    """One object on each image, with all that any detection network learns from."""
    box = torch.tensor([[0.2, 0.2, 0.8, 0.8]], dtype=torch.float64) * size
    points = torch.tensor([[[0.5 * size, 0.5 * size, 1.0]] * 17])  # torchvision takes no float64 there
    target = {
        "boxes": box,
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": torch.ones(1, size, size, dtype=torch.uint8),
        "keypoints": points,
    }
    return ([dict(target) for _ in range(batch)],)
