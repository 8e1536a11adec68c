"""A network that is converted after ``compress`` takes its example inputs along."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.quantizer import Quantizer
from tests.nets import Pick

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Takes an image, and an index by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 5),
        )
        self.table = nn.Embedding(4, 5)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.body(x) + self.table(index)  # type: ignore[no-any-return]


INDEX = torch.tensor([0, 1, 2, 3])
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "graph": (Two, {"x": X, "index": INDEX}),
    "pieces": (Pick, {"x": X}),
}
CONVERSIONS: dict[str, Callable[[nn.Module], object]] = {
    "double": lambda net: net.double(),
    "half": lambda net: net.half(),
    "to": lambda net: net.to(torch.bfloat16),
    "inside of another module": lambda net: nn.ModuleList([net]).double(),
}


def kill(net: nn.Module) -> None:
    """Let two channels of the first convolution die."""
    with torch.no_grad():
        first = next(module for module in net.modules() if isinstance(module, Quantizer))
        first.bits[:2] = 0
        for name, parameter in net.named_parameters():
            if name.endswith(("0.bias", "1.bias")):
                parameter[:2] = 0


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_converted_network_goes_on(kind: str, conversion: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    net = fxc.compress(make(), inputs)
    net.size()  # what is known from now on is of the network as it was
    CONVERSIONS[conversion](net)
    dtype = next(net.parameters()).dtype
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    assert net(**given).dtype == dtype
    kill(net)
    net.step()
    before = net(**given)
    (before.sum() + net.size()).backward()
    assert net.prune().channels == 2
    torch.testing.assert_close(net(**given), before, rtol=0.02, atol=0.02)
    assert net.settings.inputs.kwargs["x"].dtype == dtype
    final = net.finalize()
    assert final.get_parameter("body.0.weight").shape[0] == 6
    assert final(**given).dtype == dtype


@pytest.mark.cpu
def test_nothing_is_analysed_anew_where_nothing_is_converted() -> None:
    net = fxc.compress(Two(), MODELS["graph"][1])
    before = net.liveness
    net.float().to("cpu")
    assert net.liveness is before
    net.double()
    assert net.liveness is not before


def test_a_file_is_loaded_into_a_model_of_another_precision(tmp_path: Path) -> None:
    final = fxc.compress(Two(), MODELS["graph"][1]).finalize().eval()
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Two().double())
    torch.testing.assert_close(loaded(X, INDEX), final(X, INDEX))
