"""What a network weighs does not depend on when its dead channels went, also where some must stay for their number."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.test_prune_random import sizes


class Recurrent(nn.Module):
    """Layers and directions, each of which loses as many units as the others."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM], layers: int) -> None:
        super().__init__()
        self.layer = kind(4, 6, num_layers=layers, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])  # type: ignore[no-any-return]


class Heads(nn.Module):
    """Two heads, each of which loses as many dims as the other."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


MODELS = {
    "gru": lambda: Recurrent(nn.GRU, 1),
    "lstm": lambda: Recurrent(nn.LSTM, 1),
    "gru with two layers": lambda: Recurrent(nn.GRU, 2),
    "heads": Heads,
}


def channels(net: fxc.CompressedModule) -> dict[str, list[float]]:
    """What may die, by the weight: the bits of its channels, which tell them apart; of recurrent layers, candidates."""
    found = {}
    for name, bits in net.named_parameters():
        if name.endswith("weight_quantizer.bits") and not name.startswith(("head", "out")):
            found[name.removesuffix("_quantizer.bits")] = bits.tolist()
        elif "weight_ih" in name and name.endswith(".bits"):
            units = net.get_parameter(name.replace("_ih_", "_hh_").removesuffix("_quantizer.bits")).shape[1]
            found[name.removesuffix("_quantizer.bits")] = bits[2 * units : 3 * units].tolist()
    return found


def kill(net: fxc.CompressedModule, weight: str, bits: float) -> None:
    """The channel with these bits, which may have other neighbours by now, loses them."""
    units = channels(net)[weight]
    if bits not in units:  # it has been taken out for another reason
        return
    names = [weight, weight.replace("_ih_", "_hh_")] if "_ih_" in weight else [weight]
    place = units.index(bits) + (2 * len(units) if "_ih_" in weight else 0)
    with torch.no_grad():
        for name in names:
            net.get_parameter(f"{name}_quantizer.bits")[place] = 0.0
            net.get_parameter(name.replace("weight", "bias"))[place] = 0.0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(6))
def test_sizes_do_not_depend_on_when_channels_were_removed(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    late = fxc.compress(MODELS[name]().double(), torch.randn(2, 5, 4, dtype=torch.float64))
    with torch.no_grad():
        for parameter_name, parameter in late.named_parameters():
            if parameter_name.endswith("bits"):
                parameter.uniform_(2, 6)
    late.step()
    early = copy.deepcopy(late)
    for _ in range(4):
        alive = [(weight, bits) for weight, all_bits in channels(late).items() for bits in all_bits if bits]
        for weight, bits in chance.sample(alive, 2):
            kill(late, weight, bits)
            kill(early, weight, bits)
        late.step()
        early.step()
        if chance.random() < 0.7:
            early.prune()
        assert sizes(early) == pytest.approx(sizes(late), rel=1e-12)
    late.prune()
    early.prune()
    assert sizes(early) == pytest.approx(sizes(late), rel=1e-12)
    assert [p.shape for p in early.parameters()] == [p.shape for p in late.parameters()]
