"""Tables of embeddings have quantizers: their columns are channels, which die, go, and are stored like any others."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.objectives import OBJECTIVES
from fxcompress.quantizer import Quantizer

pytestmark = pytest.mark.usefixtures("double")

V, D, H = 20, 8, 6


class Language(nn.Module):
    """Tokens and places, a residual layer, and a layer for the next token, which may be tied to the table."""

    def __init__(self, *, tied: bool, bias: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.words, self.places = nn.Embedding(V, D, padding_idx=0), nn.Embedding(16, D)
        self.inner, self.outer, self.norm = nn.Linear(D, H), nn.Linear(H, D), nn.RMSNorm(D)
        self.last = nn.Linear(D, V, bias=bias)
        if tied:
            self.last.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = x + self.outer(torch.relu(self.inner(x)))
        x = self.norm(x)
        return x @ self.words.weight.T if self.by_hand else self.last(x)  # type: ignore[no-any-return]


class Bags(nn.Module):
    """Sums and means of rows, by modules and by a function, with weights for each and in bags of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.means = nn.EmbeddingBag(V, D, mode="sum"), nn.EmbeddingBag(V, D, padding_idx=1)
        self.table, self.inner, self.last = nn.Parameter(torch.randn(V, D)), nn.Linear(D, H), nn.Linear(H, 3)

    def forward(self, tokens: Tensor, starts: Tensor, shares: Tensor) -> Tensor:
        x = self.sums(tokens, starts, per_sample_weights=shares) + self.means(tokens.view(4, -1))
        x = x + F.embedding(tokens.view(4, -1), self.table).mean(1)
        return self.last(torch.relu(self.inner(x)))  # type: ignore[no-any-return]


def words(count: int = 4, length: int = 6) -> tuple[Tensor, ...]:
    return (torch.randint(V, (count, length)),)


def bags() -> tuple[Tensor, ...]:
    return torch.randint(V, (12,)), torch.arange(0, 12, 3), torch.rand(12)


STREAM = ("words", "places", "outer", "sums", "means", "table")
"""What writes to the residual stream."""
Case = tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], tuple[str, ...]]
CASES: dict[str, Case] = {
    "own": (lambda: Language(tied=False), words, ("words.weight", "places.weight")),
    "tied": (lambda: Language(tied=True), words, ("words.weight", "places.weight")),
    "tied, bias": (lambda: Language(tied=True, bias=True), words, ("words.weight", "places.weight")),
    "tied by hand": (lambda: Language(tied=True, by_hand=True), words, ("words.weight", "places.weight")),
    "bags": (Bags, bags, ("sums.weight", "means.weight", "table")),
}


def kill(net: fxc.CompressedModule, columns: int) -> None:
    """No bits and no bias for the first channels of the residual stream, wherever they are made."""
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, Quantizer) and name.split(".")[0].removesuffix("_quantizer") in STREAM:
                module.bits[:columns] = 0
        if "outer.bias" in dict(net.named_parameters()):
            net.get_parameter("outer.bias")[:columns] = 0
    net.step()


@pytest.mark.parametrize("name", CASES)
def test_all_weights_have_quantizers_by_column(name: str) -> None:
    make, inputs, tables = CASES[name]
    net = fxc.compress(make(), inputs())
    assert net.unquantized() == ()
    for table in tables:
        quantizer = net.get_submodule(f"{table}_quantizer")
        assert isinstance(quantizer, Quantizer)
        assert (quantizer.channel_dim, quantizer.bits.numel()) == (1, D)


@pytest.mark.parametrize("name", CASES)
def test_dead_columns_go_and_nothing_changes(name: str, tmp_path: Path) -> None:
    make, inputs, tables = CASES[name]
    model, given = make(), inputs()
    net = fxc.compress(model, given)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3))
    for round_ in (2, 3):
        optimizer.zero_grad()
        (net(*given).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        kill(net, 3 if round_ == 2 else 2)
        before = net.eval()(*given)
        assert net.prune(optimizer).modified
        torch.testing.assert_close(net(*given), before, rtol=1e-9, atol=1e-12)
        net.train()
    assert {net.get_parameter(table).shape[1] for table in tables} == {D - 5}
    finished = net.eval().finalize()
    assert torch.equal(finished(*given), net(*given))
    kinds = [type(module) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    assert [type(m) for m in finished.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)] == kinds
    fxc.save(finished, tmp_path / "net.fxc")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that the graph is another one
        loaded = fxc.load(tmp_path / "net.fxc", model=make())
    assert torch.equal(loaded(*given), finished(*given))


@pytest.mark.parametrize("name", CASES)
def test_pressure_takes_columns(name: str) -> None:
    """Trained for size alone, tables lose bits and columns; what is removed then never changes the output."""
    make, inputs, tables = CASES[name]
    given = inputs()
    net = fxc.compress(make(), given, bits=1.0)
    optimizer = torch.optim.Adam(net.param_groups(lr=1e-3, bits_lr=0.05))
    removed = False
    for _ in range(60):
        optimizer.zero_grad()
        (1e-3 * net(*given).square().mean() + net.size()).backward()
        optimizer.step()
        net.step()
        before = net.eval()(*given)
        removed |= net.prune(optimizer).modified
        torch.testing.assert_close(net(*given), before, rtol=1e-9, atol=1e-12)
        net.train()
    assert removed
    assert min(net.get_parameter(table).shape[1] for table in tables if table in dict(net.named_parameters())) < D


def test_removal_as_it_goes_and_at_the_end_train_alike() -> None:
    torch.manual_seed(1)
    given, model = words(), Language(tied=True)
    outputs = []
    for often in (True, False):
        net = fxc.compress(copy.deepcopy(model), given, bits=2.0)
        optimizer = torch.optim.Adam(net.param_groups(lr=1e-2, bits_lr=0.03))
        target = torch.randint(V, (4, 6), generator=torch.Generator().manual_seed(2))
        for _ in range(80):
            optimizer.zero_grad()
            (F.cross_entropy(net(*given).flatten(0, 1), target.flatten()) + 0.5 * net.size()).backward()
            optimizer.step()
            net.step()
            if often:
                net.prune(optimizer)
        net.prune(optimizer)
        outputs.append((net.eval()(*given), tuple(net.get_parameter("words.weight").shape)))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-9, atol=1e-12)
    assert outputs[0][1] == outputs[1][1]


@pytest.mark.parametrize("tied", [False, True])
def test_objectives_by_hand(*, tied: bool) -> None:
    """A weight counts once, by the bits of its column; and a layer that is tied to a table multiplies with it."""
    given = words()
    net = fxc.compress(Language(tied=tied), given)
    named = {n.removesuffix(".weight_quantizer.bits"): p for n, p in net.named_parameters() if n.endswith(".bits")}
    with torch.no_grad():
        for bits in named.values():
            bits.copy_(torch.rand(bits.shape) * 4 + 0.5)
    net.step()
    weights = V * D + 16 * D + 2 * D * H + (0 if tied else V * D)
    own = {name: bits.detach().sum() for name, bits in named.items()}
    tables = V * own["words"] + 16 * own["places"]
    eq4 = tables + D * own["inner"] + H * own["outer"] + (0 if tied else D * own["last"])
    # What feeds a channel of the stream: both tables, and behind the layers the second of these as well.
    words_, places, outer = (named[n].detach() for n in ("words", "places", "outer"))
    stream, behind = (words_ + places) / 2, (words_ + places + outer) / 3
    read = H * stream.sum() + D * own["inner"] + (0 if tied else V * behind.sum())
    assert net.weights == weights
    torch.testing.assert_close(net.size(objective="eq4").detach(), eq4 / weights)
    torch.testing.assert_close(net.size(objective="eq5").detach(), (eq4 + read) / weights)
    tokens = 4 * 6
    pairs = D * own["inner"] + H * own["outer"] + H * stream.sum() + D * own["inner"]
    pairs += V * own["words"] if tied else D * own["last"] + V * behind.sum()
    macs = tokens * (2 * D * H + V * D)
    torch.testing.assert_close(net.size(objective="macs").detach(), tokens * pairs / macs)
    written = tokens * (own["words"] + own["inner"] + own["outer"]) + 6 * own["places"]
    values = tokens * (D + H + D) + 6 * D
    if not tied:
        written, values = written + tokens * own["last"], values + tokens * V
    torch.testing.assert_close(net.size(objective="activations").detach(), written / values)


@pytest.mark.parametrize("name", CASES)
def test_what_could_go_counts_for_nothing(name: str) -> None:
    make, inputs, _ = CASES[name]
    net = fxc.compress(make(), inputs())
    kill(net, 3)
    before = [net.size(objective).item() for objective in OBJECTIVES] + [net.stored_size(), float(net.channels_left())]
    assert net.prune().modified
    after = [net.size(objective).item() for objective in OBJECTIVES] + [net.stored_size(), float(net.channels_left())]
    assert after == pytest.approx(before, rel=1e-9)


def test_the_graph_says_who_makes_a_column() -> None:
    graph = fxc.ChannelGraph.of(Language(tied=True), words())
    made, read = graph.explain("words", D - 1).split("read by")
    for maker in STREAM[:3]:
        assert f"{maker}.weight[7]" in made
    assert "words.weight[7]" in read  # by the layer that is tied to it
    with pytest.raises(IndexError, match="no channel 8"):
        graph.explain("words", D)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("case", CASES)
def test_every_objective_presses_on_tables(case: str, name: str) -> None:
    make, inputs, tables = CASES[case]
    net = fxc.compress(make(), inputs(), objective=name)
    net.size().backward()
    for table in tables:
        grad = net.get_parameter(f"{table}_quantizer.bits").grad
        assert grad is not None
        assert bool((grad > 0).all())


class LookedUp(nn.Module):
    """Channels say which rows of a table are read."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.made = kind, nn.Linear(4, 6)
        self.table = nn.Embedding(2, 5) if kind == "rows" else nn.EmbeddingBag(2, 5, mode=kind.split(maxsplit=1)[0])
        self.out = nn.Linear(30 if kind == "rows" else 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = (self.made(x) > 0).long()
        if "offsets" in self.kind:
            found = self.table(rows.flatten(), torch.arange(len(x), device=x.device) * 6)
        elif "weights" in self.kind:
            found = self.table(rows, per_sample_weights=self.made(x))
        else:
            found = self.table(rows)
        result: Tensor = self.out(found.flatten(1))
        return result


@pytest.mark.parametrize("kind", ["rows", "sum", "mean", "max", "sum offsets", "mean offsets", "sum weights"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dead", ["nothing", "rows", "readers"])
def test_channels_that_say_which_rows_are_read(kind: str, samples: int, dead: str) -> None:
    torch.manual_seed(0)
    net = LookedUp(kind).double()
    with torch.no_grad():
        if dead == "rows":
            net.made.weight[:2] = 0
            net.made.bias[:2] = 0
        elif dead == "readers" and kind == "rows":
            net.out.weight.view(3, 6, 5)[:, [1, 3]] = 0
    small = fxc.prune(net, torch.randn(samples, 4, dtype=torch.float64)).module
    assert small.get_parameter("made.weight").shape[0] == (4 if dead == "readers" and kind == "rows" else 6)
    for count in (1, 2, 5):
        x = torch.randn(count, 4, dtype=torch.float64)
        torch.testing.assert_close(small(x), net(x))
