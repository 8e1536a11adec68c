"""A removal changes no size, also where a layer is left with one channel, whose dim looks like any dim of size 1."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.nets import set_bits

Path = Callable[[Tensor, Tensor], Tensor]

IMAGES: dict[str, Path] = {
    "mean": lambda h, g: h.mean((2, 3)) + g.mean((-2, -1)),
    "maximum": lambda h, g: torch.cat([h.amax((2, 3)), g.flatten(2).max(2)[0]], 1),
    "spread": lambda h, g: torch.cat([*torch.var_mean(h, (2, 3)), g.std((2, 3))], 1),
    "sum": lambda h, g: h.sum((2, 3)) * g.norm(dim=(2, 3)),
    "product": lambda h, g: h.prod(3).prod(2) + g.logsumexp((2, 3)),
    "one dim": lambda h, g: (h.mean(3) + g.amax(3)).transpose(1, 2),
    "kept dims": lambda h, g: h.mean((2, 3), keepdim=True).flatten(1) + g.amax((2, 3), keepdim=True).squeeze((2, 3)),
    "pooled": lambda h, g: F.adaptive_avg_pool2d(h, 1).flatten(1) * F.adaptive_max_pool2d(g, 1).flatten(1),
    "pixels by hand": lambda h, g: h.flatten(2).transpose(1, 2).mean(1) + g.flatten(2).permute(2, 0, 1).amax(0),
    "pooled, then flat": lambda h, g: F.max_pool2d(h, 2).flatten(1) + F.avg_pool2d(g, 2).flatten(1),
    "beside each other": lambda h, g: torch.cat([h, g], 1).mean((2, 3)),
    "stacked": lambda h, g: torch.stack([h, g], 4).sum(-1).mean((2, 3)),
    "padded": lambda h, g: F.pad(h, (1, 1)).mean((2, 3)) + F.interpolate(g, scale_factor=2.0).mean((2, 3)),
    "gate": lambda h, g: (h * g.mean((2, 3)).sigmoid().view(2, -1, 1, 1)).mean((2, 3)),
    "gate of all channels": lambda h, g: (h * g.mean(1, keepdim=True).sigmoid()).mean((2, 3)),
    "spatial attention": lambda h, g: torch.cat([h.mean(1, keepdim=True), g.amax(1, keepdim=True)], 1),
    "sum over channels": lambda h, g: h.sum(1, keepdim=True).flatten(1) + g.mean(1).flatten(1),
    "normalized": lambda h, g: F.normalize(h, dim=1).mean((2, 3)) + F.instance_norm(g).amax((2, 3)),
    "pooling by attention": lambda h, g: (h.flatten(2) @ g.flatten(2).mean(1)[..., None].softmax(1)).squeeze(2),
}  # fmt: skip
TOKENS: dict[str, Path] = {
    "mean": lambda h, g: h.mean(1) + g.amax(1),
    "mean over channels": lambda h, g: h.mean(-1) + g.sum(-1),
    "gate of all channels": lambda h, g: h * g.mean(-1, keepdim=True) + g.max(-1, keepdim=True)[0],
    "attention": lambda h, g: F.scaled_dot_product_attention(h, g, g).mean(1),
    "heads": lambda h, g: (
        F.scaled_dot_product_attention(*(x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (h, g, g)))
        .transpose(1, 2)
        .flatten(2)
    ),
    "mean over heads": lambda h, g: h.unflatten(-1, (2, 4)).mean(2) + g.unflatten(-1, (2, 4)).amax(2),
    "sum over dims of heads": lambda h, g: h.unflatten(-1, (2, 4)).sum(3) * g.unflatten(-1, (2, 4)).amax(3),
    "outer product": lambda h, g: (h.unsqueeze(-1) * g.unsqueeze(-2)).sum(-1),
    "products": lambda h, g: (h * g).sum(-1) + F.cosine_similarity(h, g, -1),
    "einsum": lambda h, g: torch.einsum("ntc,nsc->nts", h, g),
    "linear attention": lambda h, g: h @ (h.transpose(1, 2) @ g),
    "other samples": lambda h, g: h - g.mean((0, 1)),
    "one token": lambda h, g: h[:, 0] + g[:, :1].mean(1),
}  # fmt: skip


class Net(nn.Module):
    """Two layers, a path from both, and a layer that reads it."""

    def __init__(self, path: Path, x: Tensor) -> None:
        super().__init__()
        self.path = path
        images = x.ndim == 4
        self.a, self.b = (nn.Conv2d(5, 8, 3) if images else nn.Linear(5, 8) for _ in range(2))
        made = path(self.a(x), self.b(x))
        self.out = nn.Conv2d(made.shape[1], 4, 1) if made.ndim == 4 else nn.Linear(made.shape[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.path(self.a(x).relu(), self.b(x).relu()))  # type: ignore[no-any-return]


def sizes(net: fxc.CompressedModule) -> list[float]:
    """All that a removal must leave as it is."""
    found = [net.size(objective).item() for objective in ("eq4", "eq5", "macs", "activations")]
    return [*found, net.stored_size(), net.fractional_size(), net.macs_left(), net.weights_left()]


CASES = [*((path, (2, 5, 8, 8)) for path in IMAGES.values()), *((path, (2, 6, 5)) for path in TOKENS.values())]
NAMES = [*(f"images: {name}" for name in IMAGES), *(f"tokens: {name}" for name in TOKENS)]


@pytest.mark.parametrize(("path", "shape"), CASES, ids=NAMES)
def test_a_removal_down_to_one_channel_changes_no_size(path: Path, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    model = Net(path, x.float()).double()
    for left in itertools.product((1, 8), repeat=2):
        net = fxc.compress(model, x)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith(".bits"):
                    parameter.uniform_(1, 7)
        for name, count in zip("ab", left, strict=True):
            dead = [i for i in range(8) if i != 2][: 8 - count]
            set_bits(net, f"{name}.weight", dead)
            nn.init.zeros_(net.get_parameter(f"{name}.bias"))
        net.step()
        before = sizes(net)
        net.prune()
        assert sizes(net) == pytest.approx(before, rel=1e-12, abs=1e-12)
