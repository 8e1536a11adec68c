"""The table of what is left: the same in training, at the end and in the file, and right for tied and odd weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.cli import main
from fxcompress.errors import FxCompressError, StorageError
from fxcompress.report.summary import WeightSummary
from tests.nets import ResidualNet, set_bits

pytestmark = pytest.mark.cpu
X = torch.zeros(2, 3, 10, 10)


def shrunk() -> fxc.CompressedModule:
    """With channels that are gone, and bits that differ."""
    net = fxc.compress(ResidualNet(), X, bits=4)
    set_bits(net, "block1.conv1.weight", [1, 4])
    set_bits(net, "block1.conv2.weight", [0, 2], 2.5)
    net.step()
    net.prune()
    return net


def test_the_same_in_training_at_the_end_and_in_the_file(tmp_path: Path) -> None:
    net = shrunk()
    final = net.finalize()
    size = fxc.save(final, tmp_path / "net.fxc")
    training, end, file = fxc.summary(net), fxc.summary(final), fxc.summary(tmp_path / "net.fxc")
    assert training.weights == end.weights
    assert (training.quantized, end.quantized, file.quantized) == (net.weights,) * 3
    assert (training.before, end.before, file.before) == (net.weights,) * 3
    assert training.fractional == pytest.approx(net.fractional_size())
    assert end.fractional == pytest.approx(net.fractional_size())
    assert training.stored == pytest.approx(net.stored_size())
    assert end.stored == pytest.approx(net.stored_size())
    assert (file.title, file.file, file.fractional) == ("net.fxc", size, None)
    assert (training.file, end.file) == (None, None)
    for one, other in zip(end.weights, file.weights, strict=True):
        assert (one.name, one.before, one.now) == (other.name, other.before, other.now)
        assert other.stored <= one.stored, "codes that may occur, and those that do"
    assert (end.others, end.others_stored) == (file.others, file.others_stored)


def test_a_weight_says_what_it_was_and_is() -> None:
    net = shrunk()
    found = {weight.name: weight for weight in fxc.summary(net).weights}
    cut, uneven = found["block1.conv1.weight"], found["block1.conv2.weight"]
    assert cut.now == tuple(net.get_parameter("block1.conv1.weight").shape)
    assert cut.now[0] == cut.before[0] - 2
    bits = net.get_parameter("block1.conv2.weight_quantizer.bits").detach()
    assert (uneven.bits, uneven.least, uneven.most) == pytest.approx((float(bits.mean()), float(bits.min()), 4.0))
    assert uneven.least in {0.0, 2.5}
    columns = net.get_parameter("block1.conv2.weight")[0].numel()
    whole = bits.ceil()
    assert uneven.stored == -(-int(whole.sum() * columns + 40 * (whole > 0).sum()) // 8)


def test_printed_it_is_a_table_with_a_line_for_each_weight() -> None:
    found = fxc.summary(shrunk().finalize())
    heading, empty, columns, *rows, others = str(found).splitlines()
    assert heading.startswith(f"ResidualNet: {sum(torch.Size(w.now or ()).numel() for w in found.weights):,} of ")
    assert (empty, columns.split()) == ("", ["weight", "at", "first", "now", "bits", "from", "to", "bytes"])
    assert [row.split()[0] for row in rows] == [weight.name for weight in found.weights]
    assert len({len(row) for row in (columns, *rows)}) == 1
    assert others == f"and {found.others} biases, norms and buffers of {found.others_stored:,} bytes"


class Branch(nn.Module):
    """A branch that can go, a table that is tied to a layer, and a weight that nothing quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        out.weight = self.table.weight
        self.out = out
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)
        self.plain = nn.Parameter(torch.randn(5, 6))
        self.register_buffer("index", torch.arange(6).reshape(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x)
        h = h + self.two(self.one(h).relu())
        return self.out(h + self.plain.exp() + self.get_buffer("index").reshape(-1))  # type: ignore[no-any-return]


def test_weights_that_are_gone_tied_or_in_floats(tmp_path: Path) -> None:
    net = fxc.compress(Branch(), torch.randint(9, (2, 5)))
    set_bits(net, "two.weight", list(range(6)))
    with torch.no_grad():
        net.get_parameter("two.bias").zero_()
    net.step()
    final = net.finalize()
    fxc.save(final, tmp_path / "net.fxc")
    for found in (fxc.summary(final), fxc.summary(tmp_path / "net.fxc")):
        weights = {weight.name: weight for weight in found.weights}
        assert weights["one.weight"] == WeightSummary("one.weight", (8, 6), None, None, None, None, 0)
        assert weights["plain"] == WeightSummary("plain", (5, 6), (5, 6), None, None, None, 120)
        assert len(weights.keys() & {"table.weight", "out.weight"}) == 1
        assert found.others == 1, "the index; a tied weight and biases that are gone do not count"
        assert "one.weight  " in str(found)
        assert "gone" in str(found)
        assert "floats" in str(found)


def test_a_network_without_bits() -> None:
    found = fxc.summary(fxc.prune(ResidualNet(), X).module)
    assert (found.fractional, found.stored) == (None, None)
    assert found.before == sum(torch.Size(weight.before).numel() for weight in found.weights)
    assert all(weight.bits is None for weight in found.weights)
    assert "%" not in str(found)


def test_weights_that_are_frozen_are_told_apart() -> None:
    model = ResidualNet()
    frozen = model.get_parameter("block1.conv1.weight").requires_grad_(False)
    net = fxc.compress(model, X)
    found = fxc.summary(net)
    assert found.before == net.weights + frozen.numel()
    assert f"{found.before:,} of {found.before:,} weights, {net.weights:,} of which were quantized, 25.00%" in str(
        found
    )


def test_weights_that_have_left_their_grid_are_in_floats(tmp_path: Path) -> None:
    """As after training on what ``finalize`` gave: a file would hold them so."""
    final = shrunk().finalize()
    name = "block1.conv2.weight"
    before = fxc.summary(final)
    with torch.no_grad():
        final.get_parameter(name).mul_(1.001)
    after = fxc.summary(final)
    fxc.save(final, tmp_path / "net.fxc")
    for found in (after, fxc.summary(tmp_path / "net.fxc")):
        (weight,) = (weight for weight in found.weights if weight.name == name)
        assert (weight.bits, weight.stored) == (None, 4 * final.get_parameter(name).numel())
    assert before.fractional is not None
    assert after.fractional is not None
    assert after.fractional > before.fractional


def test_bad_input(tmp_path: Path) -> None:
    net = shrunk()
    for wrapped in (nn.Sequential(net, nn.Flatten()), torch.compile(net)):
        assert isinstance(wrapped, nn.Module)
        with pytest.raises(FxCompressError, match=r"wraps the network in training: pass what compress\(\) returned"):
            fxc.summary(wrapped)
    with pytest.raises(TypeError, match=r"a PruneResult holds the network as its .module: pass summary\(result.module"):
        fxc.summary(fxc.prune(ResidualNet(), X))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"summary takes a network, or the path of a file .*, not a dict"):
        fxc.summary({})  # type: ignore[arg-type]
    with pytest.raises(FxCompressError, match="nothing is known of what this Linear was made from: pass what compress"):
        fxc.summary(nn.Linear(2, 2))
    with pytest.raises(StorageError, match="there is no file"):
        fxc.summary(tmp_path / "nowhere.fxc")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "net.fxc")
    fxc.save(shrunk().finalize(), path)
    assert main(["inspect", path]) == 0
    assert capsys.readouterr().out.strip() == str(fxc.summary(path))
    assert main(["inspect", path, "--explain", "stem.0", "1"]) == 1
    assert "a file holds no graph" in capsys.readouterr().err
