"""Nodes are described as the user knows them: layers by their paths, ops by their names, modules and lines."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.trace.graph.described import NOWHERE, Place, place_of_node
from fxcompress.trace.model.skeleton import skeleton


class Block(nn.Module):
    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.conv, self.scale, self.looks = nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4, 1, 1)), looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and x.shape[1] != 4:  # which torch.fx cannot trace: the model is run
            return x
        h = F.hardswish(self.conv(x))
        h += x
        return h[:, :2].repeat(1, 2, 1, 1) * self.scale


class Net(nn.Module):
    def __init__(self, *, looks: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.blocks = nn.ModuleList([Block(looks=looks)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for block in self.blocks:
            x = block(block(x))
        return x.mean((2, 3))


X = torch.randn(2, 3, 8, 8)


def line(code: str) -> int:
    """The line of this file that holds some code."""
    return next(i for i, text in enumerate(Path(__file__).read_text("utf-8").splitlines(), 1) if code in text)


def at(code: str) -> str:
    return f"at tests/test_described.py:{line(code)}"


def texts(module: fx.GraphModule) -> dict[str, str]:
    return {node.name: str(place_of_node(node)) for node in module.graph.nodes}


def wanted() -> set[str]:
    inside = "in blocks.0"
    return {
        "input x", "Conv2d features.0", "ReLU features.1", "Conv2d blocks.0.conv", "parameter blocks.0.scale",
        f"hardswish {inside} {at('F.hardswish(')}", f"add_ {inside} {at('h += x')}",
        f"indexing {inside} {at('h[:, :2]')}", f"mean {at('x.mean(')}",
    }  # fmt: skip


@pytest.mark.parametrize("looks", [False, True])
def test_layers_by_their_paths_and_ops_by_their_lines(*, looks: bool) -> None:
    module = prepare(Net(looks=looks), X).module
    assert wanted() <= set(texts(module).values())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert set(texts(other).values()) >= {"Conv2d blocks.0.conv", "ReLU features.1"}


def test_layers_of_both_graphs_are_known_by_their_class() -> None:
    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, training=self.training))

    module = prepare(Dropping(looks=True), X).module
    for own in (module, copy.deepcopy(module), skeleton(module)):
        assert own.train_graph is not None
        found = {str(place_of_node(node)) for graph in own.graphs.values() for node in graph.nodes}
        assert {"Conv2d features.0", "Conv2d blocks.0.conv"} <= found
        assert not any(text.startswith("layer") for text in found)


@pytest.mark.parametrize("looks", [False, True])
def test_layers_with_quantizers_are_still_layers(*, looks: bool) -> None:
    """The function that takes the quantized weight stands for the layer."""
    assert wanted() <= set(texts(fxc.compress(Net(looks=looks), X)).values())


def test_what_is_not_known_is_left_out() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.relu, (x,))
    layer = graph.call_module("somewhere.else", (y,))
    found = [str(place_of_node(node)) for node in (x, y, layer)]
    assert found == [
        "input x",
        "relu (node relu)",
        "layer somewhere.else",
    ]
    assert (str(Place("add_3")), str(NOWHERE)) == ("node add_3", "")


def test_a_place_in_a_piece_and_as_json() -> None:
    place = Place("add_3", "layer1.0", "elsewhere/resnet.py", 102, "add")
    assert str(place.within("body")) == "add in body.layer1.0 at elsewhere/resnet.py:102"
    assert str(Place("add", "", "", 0, "add").within("body")) == "add in body"
    conv = Place("conv1", "conv1", "elsewhere/resnet.py", 12, "Conv2d", "conv1").within("body")
    assert (str(conv), conv.in_full) == ("Conv2d body.conv1", "Conv2d body.conv1 at elsewhere/resnet.py:12")
    assert Place(**json.loads(json.dumps(dataclasses.asdict(place)))) == place


def test_files_are_named_from_where_python_finds_them() -> None:
    found = str(Path(nn.__file__).with_name("anything.py"))
    assert str(Place("add", "", found, 3, "add")) == "add at torch/nn/anything.py:3"


def test_reports_name_no_nodes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        net.get_parameter("0.weight")[1] = 0
    (kept,) = fxc.prune(net, X).report.kept
    assert str(kept).startswith("0.weight[1] stays: in evaluation its constant value is ")
    assert str(kept).endswith(" where Conv2d 2 reads it")
    assert "such as an input of the network (Conv2d 0)" in str(fxc.ChannelGraph.of(net, X))


def test_reasons_in_a_piece_are_named_from_outside() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 2, 1), nn.Flatten())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x)
            return y if y.mean() > 0 else 2 * y

    net = Deciding()
    with torch.no_grad():
        net.get_parameter("body.0.weight")[1] = 0
        net.get_parameter("body.2.weight")[1] = 0
    first, last = map(str, fxc.prune(net, X).report.kept)
    assert first.endswith(" where Conv2d body.2 reads it")
    assert last == "body.2.weight[1] stays: it is an output of the network"


def test_the_one_channel_of_a_layer_stays_as_that() -> None:
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Sigmoid(), nn.Conv2d(1, 2, 1))
    nn.init.zeros_(net.get_parameter("0.weight"))
    assert [kept.reason for kept in fxc.prune(net, X).report.kept] == ["a layer keeps at least one channel"]
