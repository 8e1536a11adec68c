"""A finalized network as an ONNX file with integers in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import ExampleInputError, ExportError
from fxcompress.export.integers import WeightCodes
from fxcompress.provenance import Grid
from fxcompress.quantizer import Quantizer, channels_of, from_rows
from tests.deployed import NETS, finished
from tests.nets import ResidualNet

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]


def session(path: Path) -> Callable[..., list[Tensor]]:
    """What the file computes."""
    held = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in held.get_inputs()]
    return lambda *batch: [
        torch.from_numpy(each)
        for each in held.run(None, {name: x.numpy() for name, x in zip(names, batch, strict=True)})
    ]


def constants(path: Path) -> dict[str, np.ndarray]:
    """All tensors in the file, by name."""
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


def weights_in(path: Path) -> dict[str, np.ndarray]:
    """Those that the file computes from integers."""
    return {name: codes * scale for name, (codes, scale) in parts_in(path).items()}


def parts_in(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of the same, put together from those of each width."""
    held, found = constants(path), {}
    for name in [key.removesuffix("_scale") for key in held if key.endswith("_scale")]:
        scale = held[f"{name}_scale"]
        codes = [held[key].astype(scale.dtype) for bits in (4, 8, 16) if (key := f"{name}_codes{bits}") in held]
        if codes:
            dim = int(np.argmax(scale.shape))
            order = held.get(f"{name}_order", slice(None))
            whole = np.concatenate(codes, dim)
            found[name] = (np.moveaxis(np.moveaxis(whole, dim, 0)[order], 0, dim), scale)
    return found


def same_channels(codes: np.ndarray, found: np.ndarray) -> bool:
    """Whether they are the same, channel by channel, but for the sign of whole channels."""
    if codes.shape != found.shape:
        return False
    wide = codes.astype(np.int64)
    return all(
        np.array_equal(b, a) or np.array_equal(b, np.clip(-a, -128, 127)) for a, b in zip(wide, found, strict=True)
    )


def codes_in(path: Path) -> list[np.ndarray]:
    """Weights of layers that compute in integers; those that are stored from 128 up, with their sign."""
    arrays = [value for value in constants(path).values() if value.ndim > 1]
    return [a for a in arrays if a.dtype == np.int8] + [a.astype(int) - 128 for a in arrays if a.dtype == np.uint8]


def normed(*, training: bool = False) -> tuple[nn.Module, Tensor]:
    """A trained network whose norms scale by numbers of both signs, in 8 bits."""
    torch.manual_seed(0)
    net = ResidualNet().train(training)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.normal_(norm.bias)
        norm.get_buffer("running_var").uniform_(0.5, 2)
    x = torch.randn(4, 3, 10, 10)
    return fxc.compress(net, x).finalize(), x


@pytest.mark.parametrize("name", list(NETS))
def test_the_file_computes_what_the_network_does(name: str, tmp_path: Path) -> None:
    final, x = finished(name)
    before = {key: value.clone() for key, value in final.state_dict().items()}
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x)
    run = session(tmp_path / "net.onnx")
    for batch in (x, torch.cat([x, x, x]), torch.randn_like(x)):
        torch.testing.assert_close(run(batch)[0], final(batch), rtol=1e-5, atol=1e-5)
    assert written.bytes == (tmp_path / "net.onnx").stat().st_size
    assert written.difference < 1e-5
    assert not written.floats, written
    assert {bits for widths in written.integers.values() for bits in widths} <= {4, 8}
    assert all(torch.equal(before[key], value) for key, value in final.state_dict().items())


@pytest.mark.parametrize("name", ["rms", "heads"])
def test_weights_are_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    final, x = finished(name)
    fxc.export_onnx(final, tmp_path / "net.onnx", x)
    own = [value.numpy() for value in final.state_dict().values() if value.dim() > 1]
    stored = weights_in(tmp_path / "net.onnx")
    assert len(stored) >= 3
    for found in stored.values():
        assert any(np.array_equal(found, each) or np.array_equal(found.T, each) for each in own)


def test_a_norm_scales_the_channels_of_a_weight(tmp_path: Path) -> None:
    """The exporter multiplies weights by what norms scale with; the integers stay the same."""
    final, x = normed()
    written = fxc.export_onnx(final, tmp_path / "net.onnx")
    assert not written.floats
    assert list(written.inputs.values()) == [("batch", 3, 10, 10)]
    assert not any("running" in name for name in constants(tmp_path / "net.onnx"))
    final.eval()
    torch.testing.assert_close(session(tmp_path / "net.onnx")(x)[0], final(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "stored"), [(3.0, 4), (7.5, 8), (12.0, 16), (20.0, None)])
def test_the_smallest_integers_that_hold_the_codes(bits: float, stored: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 33)
    net = fxc.compress(nn.Sequential(nn.Linear(33, 65), nn.ReLU(), nn.Linear(65, 5)), x)
    with torch.no_grad():
        for quantizer in (m for m in net.modules() if isinstance(m, Quantizer)):
            quantizer.exponent.sub_(bits - quantizer.bits)
            quantizer.bits.fill_(bits)
    final = net.finalize()
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x)
    assert written.integers == ({} if stored is None else {"0.weight": (stored,), "2.weight": (stored,)})
    assert list(written.floats) == ([] if stored else ["0.weight", "2.weight"])
    assert ("16 bits" in str(written)) == (stored in {None, 16})
    torch.testing.assert_close(session(tmp_path / "net.onnx")(x)[0], final(x), rtol=1e-5, atol=1e-5)


def test_channels_of_different_widths(tmp_path: Path) -> None:
    """Each is stored in the fewest bits, and the weight is put together in its order."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 9)
    net = fxc.compress(nn.Sequential(nn.Conv2d(4, 90, 5), nn.ReLU(), nn.ConvTranspose2d(90, 60, 3)), x)
    with torch.no_grad():
        for quantizer in (m for m in net.modules() if isinstance(m, Quantizer)):
            bits = torch.tensor([3.0, 8.0, 11.0]).repeat(30)[: len(quantizer.bits)]
            quantizer.exponent.sub_(bits - quantizer.bits)
            quantizer.bits.copy_(bits)
    final = net.finalize()
    whole = 2 * sum(p.numel() for p in final.parameters() if p.dim() > 1)
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x)
    assert written.integers == {"0.weight": (4, 8, 16), "2.weight": (4, 8, 16)}
    assert "2 of 4 and 8 and 16 bits" in str(written)
    assert written.bytes < 0.75 * whole
    for name, found in weights_in(tmp_path / "net.onnx").items():
        assert np.array_equal(found, final.get_parameter(name).detach().numpy())
    torch.testing.assert_close(session(tmp_path / "net.onnx")(x)[0], final.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_file_tells_nothing_of_the_code(tmp_path: Path) -> None:
    final, x = finished("sum")
    for calibration in (None, [x]):
        fxc.export_onnx(final, tmp_path / "net.onnx", x, calibration=calibration)
        assert b".py" not in (tmp_path / "net.onnx").read_bytes()


def test_a_weight_that_was_edited_stays_in_floats(tmp_path: Path) -> None:
    final, x = finished("rms")
    with torch.no_grad():
        final.get_parameter("embed.weight")[0, 0] += 1e-3
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x)
    assert list(written.floats) == ["embed.weight"]
    assert "not on its grid" in str(written)
    torch.testing.assert_close(session(tmp_path / "net.onnx")(x)[0], final(x), rtol=1e-5, atol=1e-5)


def test_activations_in_integers(tmp_path: Path) -> None:
    """Layers multiply the codes that were trained, and the outputs are near."""
    final, x = normed()
    path = tmp_path / "net.onnx"
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 3, 10, 10), torch.zeros(32)), 8)
    written = fxc.export_onnx(final, path, x, calibration=loader)
    assert written.activations
    assert not written.floats
    assert 0 < written.difference < 0.1
    exact = fxc.export_onnx(final, tmp_path / "floats.onnx", x)
    assert exact.integers == written.integers
    codes = [codes for codes, _ in parts_in(tmp_path / "floats.onnx").values()]
    held = codes_in(path)
    assert len(held) == len(codes)
    for each in codes:
        assert any(same_channels(each, value) for value in held)
    optimized = runtime.SessionOptions()
    optimized.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    optimized.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    runtime.InferenceSession(str(path), optimized, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert ops.count("QLinearConv") == sum(isinstance(m, nn.Conv2d) for m in final.modules())
    assert "Conv" not in ops


@pytest.mark.parametrize(("bits", "kind"), [(8.0, np.uint8), (7.0, np.int8)])
def test_integers_do_not_overflow(bits: float, kind: type, tmp_path: Path) -> None:
    """Processors without dot products of bytes add two products of an unsigned and a signed byte in 16 bits."""
    torch.manual_seed(0)
    x = torch.rand(64, 128)
    first, last = nn.Linear(128, 64), nn.Linear(64, 8)
    with torch.no_grad():
        for layer in (first, last):
            layer.weight.uniform_(0.8, 1)
            layer.weight[:, ::7] *= -1
    net = fxc.compress(nn.Sequential(first, nn.ReLU(), last), x)
    for quantizer in (m for m in net.modules() if isinstance(m, Quantizer)):
        quantizer.bits.data.fill_(bits)
        quantizer.exponent.data.fill_(1 - bits)
    final = net.finalize()
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x, calibration=[x])
    assert written.difference < 0.02
    assert {value.dtype for value in constants(tmp_path / "net.onnx").values() if value.ndim > 1} == {np.dtype(kind)}
    assert sorted(np.abs(each).max() for each in codes_in(tmp_path / "net.onnx")) == [2 ** (bits - 1)] * 2


def test_layers_of_more_than_8_bits_stay_in_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 20)
    net = fxc.compress(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), x)
    wide = net.get_submodule("0.weight_quantizer")
    assert isinstance(wide, Quantizer)
    with torch.no_grad():
        wide.bits[3] = 12
        wide.exponent[3] -= 4
    final = net.finalize()
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x, calibration=[x])
    assert written.integers == {"0.weight": (16,), "2.weight": (8,)}
    assert "computed in floats: 0.weight (its codes have more than 8 bits)" in str(written)
    assert "2.weight" not in str(written)
    assert "computed in floats" not in str(fxc.export_onnx(final, tmp_path / "plain.onnx", x))
    held = weights_in(tmp_path / "net.onnx")
    weight = final.get_parameter("0.weight").detach().numpy()
    assert any(np.array_equal(each, weight) or np.array_equal(each.T, weight) for each in held.values())


@pytest.mark.parametrize(("bits", "dtype"), [(12.0, torch.float32), (8.0, torch.float64)])
def test_where_no_layer_computes_in_integers_that_is_said(
    bits: float, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(16, 20, dtype=dtype)
    final = fxc.compress(nn.Linear(20, 5, dtype=dtype), x, bits=bits).finalize()
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x, calibration=[x])
    assert not written.activations
    assert "activations in floats" in str(written)
    assert "no layer of Linear computes in integers" in caplog.text
    assert written.difference < 1e-6


def test_numbers_that_no_session_takes(tmp_path: Path) -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    final = fxc.compress(nn.Linear(8, 4, dtype=torch.bfloat16), x).finalize()
    with pytest.raises(ExportError, match=r"called with \(2, 8\) bfloat16: .* export a copy in 32-bit floats"):
        fxc.export_onnx(final, tmp_path / "net.onnx", x)


def test_a_calibration_that_fails_is_not_called_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ValueError("no such op")

    monkeypatch.setattr("fxcompress.export.activations.quantize_static", fail)
    final, x = finished("rms")
    with pytest.raises(ExportError, match="activations cannot be quantized: no such op"):
        fxc.export_onnx(final, tmp_path / "net.onnx", x, calibration=[x])


def test_a_saved_network_gives_the_same_file(tmp_path: Path) -> None:
    final, x = finished("sum")
    fxc.save(final, tmp_path / "net.fxc")
    torch.manual_seed(1)
    loaded = fxc.load(tmp_path / "net.fxc", ResidualNet())
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for net, path in zip((final, loaded), paths, strict=True):
        fxc.export_onnx(net, path, x)
    first, second = (weights_in(path) for path in paths)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


class Named(nn.Module):
    """Takes keyword arguments and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(40, 16), nn.Linear(16, 6)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        h = self.table(ids)
        h = h if mask is None else h * mask[..., None]
        return {"tokens": h, "scores": self.out(h.mean(1))}


def test_tables_keywords_and_dicts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(40, (1, 7)), "mask": torch.rand(1, 7).round()}
    final = fxc.compress(Named(), inputs).finalize().eval()
    written = fxc.export_onnx(final, tmp_path / "net.onnx")
    assert set(written.integers) == {"table.weight", "out.weight"}
    more = {"ids": torch.randint(40, (5, 7)), "mask": torch.rand(5, 7).round()}
    for found, expected in zip(session(tmp_path / "net.onnx")(*more.values()), final(**more).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = fxc.export_onnx(final, tmp_path / "net.onnx", inputs, calibration=[more])
    assert again.integers == written.integers
    with pytest.raises(ExampleInputError, match="holds 1 tensors, and the network takes 2"):
        fxc.export_onnx(final, tmp_path / "net.onnx", inputs, calibration=[{"ids": more["ids"]}])


class OfADict(nn.Module):
    """Takes a dict as its one argument, and not as keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, given: dict[str, Any]) -> Tensor:
        result: Tensor = self.first(given["a"]) * self.last(given["more"][0])
        return result


def test_a_dict_in_the_last_place_is_no_keywords(tmp_path: Path) -> None:
    def inputs(count: int) -> tuple[dict[str, Any]]:
        return ({"a": torch.randn(count, 6), "more": [torch.randn(count, 5)]},)

    final = fxc.compress(OfADict(), inputs(2)).finalize().eval()
    fxc.export_onnx(final, tmp_path / "net.onnx", inputs(2), calibration=[inputs(4)])
    fxc.export_onnx(final, tmp_path / "net.onnx", inputs(2))
    (given,) = inputs(5)
    (found,) = session(tmp_path / "net.onnx")(given["a"], given["more"][0])
    torch.testing.assert_close(found, final(given), rtol=1e-5, atol=1e-5)


class WithANumber(nn.Module):
    """Returns a number that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, None, int]:
        return self.out(x), None, 3


def test_what_is_returned_beside_tensors_is_named(tmp_path: Path) -> None:
    final = fxc.compress(WithANumber(), torch.randn(2, 6)).finalize()
    with pytest.raises(ExportError, match=r"cannot export this WithANumber: (.|\n)*it returns int beside tensors"):
        fxc.export_onnx(final, tmp_path / "net.onnx")


class Masked(nn.Module):
    """An attention that a mask of zeros leaves nothing, and a lookup by lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        h = self.table(ids)[:, None] + torch.arange(ids.shape[1]).view(1, 1, -1, 1) * 0.1
        h = nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=mask[:, None, None, :].bool())[:, 0]
        result: Tensor = self.out(h.sum(1) / lengths[:, None])
        return result


class Stateful(nn.Module):
    """Takes and returns the state of a recurrent layer, the samples of which lie along its second dim."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(9, 6), nn.GRU(6, 6, 2, batch_first=True), nn.Linear(6, 9)

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        found, after = self.cell(self.table(tokens), state)
        return self.head(found), after


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_samples_of_a_state_are_free_and_its_layers_are_not(samples: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randint(9, (samples, 5)), torch.zeros(2, samples, 6)
    net = fxc.compress(Stateful(), inputs).finalize().eval()
    told = str(fxc.export_onnx(net, tmp_path / "net.onnx"))
    assert "(batch, 5)" in told
    assert "(2, batch, 6)" in told
    for count in (1, 2, 4):
        given = torch.randint(9, (count, 5)), torch.randn(2, count, 6)
        for found, expected in zip(session(tmp_path / "net.onnx")(*given), net(*given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_tried_is_no_mask_of_zeros(tmp_path: Path) -> None:
    inputs = (torch.randint(20, (2, 8)), torch.ones(2, 8, dtype=torch.int64), torch.tensor([8, 8]))
    final = fxc.compress(Masked(), inputs).finalize().eval()
    written = fxc.export_onnx(final, tmp_path / "net.onnx")
    assert written.difference < 1e-5


@pytest.mark.parametrize(
    ("make", "options", "error", "match"),
    [
        (lambda: nn.Linear(3, 3), {}, ExportError, "nothing is known of the weights"),
        (lambda: fxc.compress(nn.Linear(3, 3), torch.zeros(2, 3)), {}, ExportError, "finalize"),
        (None, {"calibration": torch.zeros(2, 8)}, TypeError, "calibration is a Tensor"),
        (None, {"calibration": []}, ExportError, "holds no batch"),
        (None, {"example_inputs": torch.zeros(2, 5)}, ExampleInputError, "does not run"),
    ],
)
def test_errors_leave_what_was_there(
    make: Callable[[], nn.Module] | None, options: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    path.write_text("before")
    with pytest.raises(error, match=match):
        fxc.export_onnx(make() if make else finished("rms")[0], path, **options)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_are_alike(tmp_path: Path) -> None:
    """The layers of an encoder are copies of one another until they are trained."""
    final = fxc.compress(NETS["heads"][0](), torch.zeros(2, 6, 16)).finalize()
    written = fxc.export_onnx(final, tmp_path / "net.onnx")
    assert not written.floats
    assert len(written.integers) == 8


class Experts(nn.Module):
    """Multiplies with all experts at once; an exporter may turn their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(24, 4)
        self.weight = nn.Parameter(torch.randn(3, 24, 16))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x)).expand(3, -1, -1)
        return self.last((h @ self.weight.transpose(1, 2)).sum(0))  # type: ignore[no-any-return]


def test_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    final = fxc.compress(Experts(), x).finalize()
    written = fxc.export_onnx(final, tmp_path / "net.onnx", x)
    assert set(written.integers) == {"first.weight", "last.weight", "weight"}
    torch.testing.assert_close(session(tmp_path / "net.onnx")(x)[0], final(x), rtol=1e-5, atol=1e-5)


def test_swapped_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="swapped"):
        fxc.export_onnx(str(tmp_path / "net.onnx"), finished("rms")[0])  # type: ignore[arg-type]


@st.composite
def weights(draw: st.DrawFn) -> tuple[np.ndarray, Grid]:
    """A weight of random codes and scales in one of the layouts, and its grid."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    batch = tuple(sorted(draw(st.sets(st.sampled_from(range(len(shape))), max_size=len(shape) - 2)) - {dim}))
    channels = channels_of(shape, dim, 1, batch)
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    bits = draw(st.integers(1, 12))
    codes = generator.integers(-(1 << (bits - 1)), 1 << (bits - 1), (channels, int(np.prod(shape)) // channels))
    exponent = generator.uniform(-8, 0, channels)
    matrix = torch.from_numpy(codes).float() * torch.exp2(torch.from_numpy(exponent)).float()[:, None]
    grid = Grid((float(bits),) * channels, tuple(exponent.tolist()), dim, 1, batch)
    return from_rows(matrix, shape, dim, 1, batch).numpy(), grid


@given(weights(), st.data())
def test_integers_of_what_an_exporter_makes_of_a_weight(case: tuple[np.ndarray, Grid], data: st.DataObject) -> None:
    """Under its name in any layout; under another one turned, with its channels in another order, scaled."""
    weight, grid = case
    known = WeightCodes({"w": torch.from_numpy(weight)}, {"w": grid})
    found = known.of("w", weight)
    assert found is not None
    assert np.array_equal((found.codes * found.scale).astype(weight.dtype), weight)
    if not weight.any() or weight.size == channels_of(weight.shape, grid.channel_dim, 1, grid.batch_dims):
        return
    if grid.batch_dims:  # as those of experts, turned
        if weight.ndim == 3 and len(grid.batch_dims) == 1:
            made = weight.transpose(data.draw(st.permutations(range(3))))
            other = known.of("val_2", np.ascontiguousarray(made))
            assert other is not None
            assert np.array_equal((other.codes * other.scale).astype(made.dtype), made)
        return
    rows = np.moveaxis(weight, grid.channel_dim, 0)
    order = data.draw(st.permutations(range(len(rows))))
    factors = np.random.default_rng(len(rows)).uniform(-2, 2, len(rows)).astype(weight.dtype)
    factors = factors if data.draw(st.booleans()) else np.ones_like(factors)
    scaled = rows[order] * factors.reshape(-1, *[1] * (rows.ndim - 1))
    made = np.moveaxis(scaled, 0, data.draw(st.integers(0, rows.ndim - 1)))
    other = known.of("val_3", made)
    assert other is not None
    np.testing.assert_allclose(other.codes * other.scale, made, rtol=1e-6)


@given(st.integers(0, 2**32))
def test_any_other_constant_stays(seed: int) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.integers(-8, 8, (6, 10)).astype(np.float32) * np.float32(0.25)
    known = WeightCodes({"w": torch.from_numpy(weight)}, {"w": Grid((4.0,) * 6, (-2.0,) * 6)})
    noise = generator.standard_normal((6, 10)).astype(np.float32)
    assert known.of("other", noise) is None
    assert known.of("w", noise) is None
    one = weight.copy()
    one[2, 3] += np.float32(0.01)
    assert known.of("other", one) is None


class Heads(nn.Module):
    """Has names for what it returns, and other graphs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
        y = self.body(x).relu() * scale
        if self.training:
            y = y + torch.randn_like(y)
        return {"linear": self.first(y), "second": self.second(y)}  # "linear" is what torch calls the first layer's


def test_inputs_and_outputs_have_the_names_of_the_model(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(4, 6), "scale": torch.ones(4, 1)}
    final = fxc.compress(Heads(), inputs).finalize().eval()
    written = fxc.export_onnx(final, tmp_path / "net.onnx")
    assert written.inputs == {"x": ("batch", 6), "scale": ("batch", 1)}
    assert written.outputs == ("linear", "second")
    held = runtime.InferenceSession(str(tmp_path / "net.onnx"))
    x, scale = torch.randn(7, 6), torch.rand(7, 1)
    found = held.run(["second", "linear"], {"x": x.numpy(), "scale": scale.numpy()})
    expected = final(x, scale=scale)
    torch.testing.assert_close(torch.from_numpy(found[0]), expected["second"])
    torch.testing.assert_close(torch.from_numpy(found[1]), expected["linear"])
