"""Pictures are files, and nothing else: what the caller draws with pyplot goes on as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.report.figures import draw_layers
from fxcompress.report.layers import layer_widths


def test_a_picture_of_layers_leaves_pyplot_alone(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    backend = matplotlib.get_backend()
    plt.switch_backend("svg")
    try:
        before = plt.get_fignums(), plt.rcParams.copy()
        net = fxc.compress(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.zeros(1, 8))
        draw_layers(layer_widths(net.finalize()), tmp_path / "layers.png")
        assert matplotlib.get_backend() == "svg"
        assert (plt.get_fignums(), plt.rcParams) == before
    finally:
        plt.switch_backend(backend)
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
