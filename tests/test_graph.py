"""The dependency graph, counted by hand on small networks."""

from collections import OrderedDict
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from tests.nets import ResidualNet


class Chain(nn.Sequential):
    """conv (3 -> 8), batch norm, relu, conv (8 -> 4)."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 1), nn.Conv2d(15, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), x, self.b(x)], 1))  # type: ignore[no-any-return]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.grouped(self.conv(x))))  # type: ignore[no-any-return]


def graph_of(model: nn.Module) -> fxc.ChannelGraph:
    return fxc.ChannelGraph.of(model, torch.zeros(2, 3, 10, 10))


def count(graph: fxc.ChannelGraph) -> int:
    return sum(group.removable for group in graph.groups)


@pytest.mark.parametrize(
    ("model", "removable", "elements"),
    [
        # each: a row of the first conv with its bias, the norm's weight and bias, a column of the second conv
        (Chain, 8, 27 + 1 + 2 + 4 * 9),
        # 5 of one layer and 7 of the other; those of the input are no groups
        (Concat, 12, 3 + 1 + 2),
        # whole groups: 2 inputs, and 3 outputs
        (Grouped, 4, 2 * (3 + 1) + 3 * (18 + 1) + 3 * 2),
    ],
)
def test_counts(model: type[nn.Module], removable: int, elements: int) -> None:
    graph = graph_of(model())
    assert count(graph) == removable
    assert {group.parameters for group in graph.groups if group.removable} == {elements}


def test_counts_of_a_residual_network() -> None:
    graph = graph_of(ResidualNet(8))
    # the stem and what is added to it are one set of 8; each block has 8 of its own
    assert count(graph) == 8 + 8 + 8
    group = graph.find("stem.0", 5)
    assert group.producers == tuple((f"{name}.weight", 5) for name in ("stem.0", "block1.conv2", "block2.conv2"))
    assert group.consumers == tuple((f"{name}.weight", 5) for name in ("block1.conv1", "block2.conv1", "fc"))
    assert group == graph.find("block1.conv2", 5) == graph.find("block2.bn2", 5)
    assert graph.find("block1.conv1", 5).producers == (("block1.conv1.weight", 5),)
    assert not graph.find("fc", 0).removable


def test_share() -> None:
    graph = graph_of(Chain())
    weights = 27 * 8 + 8 + 16 + 4 * 8 * 9
    assert graph.share == pytest.approx(weights / (weights + 4))  # the last bias stays


def test_members_are_a_partition() -> None:
    for model in (Chain, Concat, Grouped, ResidualNet):
        graph = graph_of(model())
        members = [member for group in graph.groups for member in group.members]
        assert len(members) == len(set(members))
        assert [group.index for group in graph.groups] == list(range(len(graph.groups)))


def test_explain() -> None:
    graph = graph_of(Chain())
    assert graph.explain("0", 3) == (
        "0[3] belongs to group 3, 66 parameters\n"
        "  made by     0.weight[3]\n"
        "  read by     3.weight[3]\n"
        "  goes with   0.bias[3], 1.weight[3], 1.bias[3], 1.running_mean[3], 1.running_var[3]\n"
        "  it can be removed as soon as it is zero wherever it is read"
    )
    assert graph.explain("3", 1).endswith("it stays: it is an output of the network")


def test_explain_an_op_without_a_rule() -> None:
    class Scattered(Chain):
        def forward(self, x: Tensor) -> Tensor:
            y = self[0](x)
            return self[3](y.masked_scatter(y > 0, y))  # type: ignore[no-any-return]

    graph = graph_of(Scattered())
    assert graph.unknown_ops == {"aten.masked_scatter.default": ("masked_scatter",)}
    assert "it stays: aten.masked_scatter.default has no rule (masked_scatter at tests/" in graph.explain("0", 3)
    assert "no rule for aten.masked_scatter.default: it keeps " in str(graph)


@pytest.mark.parametrize(
    ("name", "channel", "error", "text"),
    [
        ("nothing", 0, KeyError, "no module or parameter 'nothing'"),
        ("2", 0, KeyError, "'2' is a ReLU without parameters, so it has no channels of its own: name the layer before"),
        ("", 0, KeyError, "'' has no weight or bias of its own: name a parameter in it, such as '0.weight'"),
        ("0", 8, IndexError, r"0\.weight has no channel 8: its shape is \(8, 3, 3, 3\)"),
        ("0", -1, IndexError, r"0\.weight has no channel -1"),
        ("0", "3", TypeError, "channel='3' is a str; it must be a whole number"),
        ("0", 1.0, TypeError, "channel=1.0 is a float"),
    ],
)
def test_find_says_what_is_wrong(name: str, channel: Any, error: type[Exception], text: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=text):
        graph_of(Chain()).find(name, channel)


@pytest.mark.parametrize("channel", [3, np.int64(3), torch.tensor(3)])
def test_find_takes_whole_numbers_of_all_kinds(channel: Any) -> None:  # noqa: ANN401
    assert graph_of(Chain()).find("0", channel).producers == (("0.weight", 3),)


def test_the_only_channel_of_a_layer_stays() -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 1, 1)))
    with pytest.raises(IndexError, match=r"channel 0 of 2\.weight is the only one, so it stays"):
        graph.explain("2", 0)


def test_what_is_not_listed_is_counted() -> None:
    first, *table = str(graph_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)))).splitlines()[1:]
    listed = [int(line.split()[0]) for line in table if line.split() and line.split()[0].isdigit()]
    assert sum(listed) == int(first.split()[0])
    assert "not listed, as no layer makes or reads them: positions of kernels" in table[-1]


def test_find_knows_transposed_convolutions() -> None:
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 2), nn.Conv2d(4, 2, 1)))
    assert graph.find("1", 3).producers == (("1.weight", 3),)
    assert graph.find("1", 3).consumers == (("2.weight", 3),)
    assert graph.find("0", 5).consumers == (("1.weight", 5),)


def test_a_weight_that_is_read_as_it_lies() -> None:
    class Product(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    graph = fxc.ChannelGraph.of(nn.Sequential(Product(5, 7), nn.ReLU(), Product(7, 3)), torch.zeros(2, 5))
    assert count(graph) == 7
    assert graph.find("0", 6).producers == (("0.weight", 6),)
    assert graph.find("0", 6).consumers == (("2.weight", 6),)


def test_a_counter_is_left_as_it_is() -> None:
    class Counting(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.get_buffer("calls").add_(1)
            return self[3](self[0](x))  # type: ignore[no-any-return]

    model, x = Counting(), torch.zeros(2, 3, 10, 10)
    graph_of(model)
    result = fxc.prune(model, x).module
    assert int(model.get_buffer("calls")) == int(result.get_buffer("calls")) == 0
    result(x)
    assert (int(model.get_buffer("calls")), int(result.get_buffer("calls"))) == (0, 1)


def test_networkx() -> None:
    graph = graph_of(ResidualNet(8))
    network = graph.to_networkx()
    assert isinstance(network, nx.DiGraph)
    kinds = nx.get_node_attributes(network, "kind")
    assert set(kinds.values()) == {"tensor", "bundle"}
    assert network.nodes["stem.0.weight"] == {"kind": "tensor", "shape": (8, 3, 3, 3), "parameters": 216}
    (trunk,) = network.successors("stem.0.weight")
    assert network.nodes[trunk]["groups"] == tuple(graph.find("stem.0", i).index for i in range(8))
    assert network.nodes[trunk]["removable"]
    assert network.nodes[trunk]["reasons"] == ()
    assert set(network.predecessors(trunk)) == {"stem.0.weight", "block1.conv2.weight", "block2.conv2.weight"}
    assert set(network.successors(trunk)) == {"block1.conv1.weight", "block2.conv1.weight", "fc.weight"}
    assert network.edges["stem.0.weight", trunk]["role"] == "producer"
    assert network.edges[trunk, "fc.weight"]["role"] == "consumer"
    assert nx.is_directed_acyclic_graph(network) is False  # the trunk is read and added to again and again


def test_print() -> None:
    text = str(graph_of(Chain()))
    assert text.splitlines()[0] == "Chain on (2, 3, 10, 10) float32"
    assert "8 of them removable" in text
    assert any(line.split()[:4] == ["8", "528", "0", "3"] and line.endswith("-") for line in text.splitlines())
    assert "it is an output of the network" in text


def test_columns_of_the_table_begin_where_their_titles_do() -> None:
    name = "a_module_with_a_name_that_is_longer_than_most"
    layers = {f"{name}_{n}": nn.Linear(8, 8) for n in range(3)}
    lines = str(fxc.ChannelGraph.of(nn.Sequential(OrderedDict(layers)), torch.randn(2, 8))).splitlines()
    header = next(line for line in lines if "made by" in line)
    row = next(line for line in lines if line.endswith(f"{name}_1  -"))
    assert header.index("made by") == row.index(f"{name}_0")
    assert header.index("read by") == row.index(f"{name}_1")


def test_inputs_are_inferred(caplog: pytest.LogCaptureFixture) -> None:
    graph = fxc.ChannelGraph.of(Chain())
    assert count(graph) == 8
    assert "no example_inputs given; took (2, 3, 224, 224) float32 (inferred)" in caplog.text
