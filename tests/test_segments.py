"""Where segments meet, by columns of their numbers; and that they are found once for a graph, whatever dies in it."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.channels import analysis
from fxcompress.channels.segments import Segments, _columns, trace_segments
from tests.nets import ResidualNet, lose, set_bits

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_columns_are_those_that_numpy_finds(rows: int) -> None:
    flat = np.random.default_rng(rows).integers(0, 5, (rows, 200))
    expected, places = np.unique(flat, axis=1, return_inverse=True)
    for count in (5, 1 << 40):  # the second is too large for one number
        columns, inverse = _columns(flat, count)
        assert np.array_equal(columns, expected)
        assert np.array_equal(inverse, places.reshape(-1))


def test_what_dies_leaves_segments_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are traced once for each graph, and the size is what it is with all of them traced anew."""
    traced = 0

    def counting(*args: Any) -> Segments:  # noqa: ANN401
        nonlocal traced
        traced += 1
        return trace_segments(*args)

    monkeypatch.setattr(analysis, "trace_segments", counting)
    torch.manual_seed(0)
    net = fxc.compress(ResidualNet(), torch.zeros(2, 3, 10, 10))
    net.step()
    net.size()
    traced, sizes = 0, []
    for channel in (0, 2, 5):
        set_bits(net, "block1.conv1.weight", [channel])
        nn.init.zeros_(net.get_parameter("block1.bn1.bias"))
        net.step()
        sizes.append(net.size().item())
        assert traced == 0
        net.refresh()
        assert net.size().item() == sizes[-1]
        assert traced > 0
        traced = 0
    assert len(set(sizes)) == 3


@pytest.mark.parametrize("seed", range(4))
def test_segments_are_those_of_the_graph_that_is_left(seed: int) -> None:
    """Also where branches go, before the network has been rewritten and after it."""
    torch.manual_seed(seed)
    net = fxc.compress(ResidualNet(), torch.zeros(2, 3, 10, 10))
    for number in range(3):
        net.size()
        lose(net, 3 * seed + number, 0.3)
        before = net.size().item()
        net.refresh()
        assert net.size().item() == pytest.approx(before, rel=1e-6)
        net.prune()
        assert net.size().item() == pytest.approx(before, rel=1e-6)
