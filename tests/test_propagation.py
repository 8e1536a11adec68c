"""What is known of a network in training, found from what was known a few steps ago."""

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.channels import constants
from fxcompress.channels.constants import Propagation, propagate
from fxcompress.channels.values import Step
from fxcompress.training.census import seeds
from tests.nets import ResidualNet


class Attends(nn.Module):
    """Has other graphs in training, a norm over channels, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y + torch.randn_like(y) if self.training else y)  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (ResidualNet(), torch.randn(2, 3, 10, 10)),
        (Attends(), torch.randn(2, 5, 8)),
        (nn.GRU(4, 6), torch.randn(3, 2, 4)),
    ],
)
def test_the_same_is_known_as_from_the_start(model: nn.Module, x: Tensor, training: bool) -> None:  # noqa: FBT001
    census = fxc.compress(model, x).liveness.census
    generator = torch.Generator().manual_seed(0)
    spans = census.bits | census.biases
    zeros = {name: torch.zeros(span.stop - span.start, dtype=torch.bool) for name, span in spans.items()}
    for trail in census.analysis.trails.values():
        again = Propagation(trail, training=training)
        for share in (0.1, 0.5, 0.9, 0.0, 0.0, 1.0, 0.3):  # what is zero may come back
            for flags in list(zeros.values())[:: 2 if share == 0.3 else 1]:
                flags.copy_(torch.rand(flags.shape, generator=generator) < share)
            start = seeds(trail, {name: flags.numpy().copy() for name, flags in zeros.items()})
            found, expected = again.run(start), propagate(trail, start, training=training)
            assert found.maps.keys() == expected.maps.keys()
            for key, known in expected.maps.items():
                torch.testing.assert_close(found.maps[key], known, rtol=0, atol=0, equal_nan=True)


def test_rules_that_are_told_the_same_are_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Step] = []
    ask = constants._ask

    def noted(step: Step, *rest: object) -> object:
        asked.append(step)
        return ask(step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(constants, "_ask", noted)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)]
    census = fxc.compress(nn.Sequential(*layers), torch.randn(2, 8)).liveness.census
    (trail,) = census.analysis.trails.values()
    again = Propagation(trail, training=True)
    zeros = {name: torch.zeros(8, dtype=torch.bool).numpy() for name in census.bits | census.biases}
    counts = []
    for _ in range(2):
        asked.clear()
        again.run(seeds(trail, zeros))
        counts.append(len(asked))
    asked.clear()
    again.run(seeds(trail, zeros | {"5.0.bias": torch.ones(8, dtype=torch.bool).numpy()}))
    assert counts[0] == len(trail.tape)
    assert not counts[1]
    assert 0 < len(asked) < 6
