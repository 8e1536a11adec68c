"""Files of finalized networks: bit for bit, small, atomic, and clear about what is wrong with one."""

import json
import sys
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import fxcompress as fxc
from fxcompress.errors import StorageError, TraceError
from fxcompress.provenance import Grid, Provenance, attach, provenance_of
from fxcompress.quantizer import Quantizer
from fxcompress.storage.file import FORMAT, read, save
from fxcompress.storage.states import write_states
from fxcompress.storage.streams import checksum
from tests.deployed import Modes
from tests.nets import set_bits

pytestmark = pytest.mark.cpu


def finalized(model: nn.Module, *, bits: float = 4.0) -> fx.GraphModule:
    """The model with all conv and linear weights on a grid, as ``finalize()`` leaves it; every 4th channel dead."""
    module = fx.symbolic_trace(model)
    grids: dict[str, Grid] = {}
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            continue
        transposed = isinstance(layer, nn.ConvTranspose2d)
        groups = layer.groups if isinstance(layer, nn.ConvTranspose2d) else 1
        quantizer = Quantizer.for_weight(layer.weight, bits=bits, channel_dim=int(transposed), groups=groups)
        with torch.no_grad():
            quantizer.bits[::4] = 0.0
            quantizer.exponent.add_(torch.rand(len(quantizer.exponent)))
            layer.weight.copy_(quantizer(layer.weight))
        grid = Grid(tuple(quantizer.bits.tolist()), tuple(quantizer.exponent.tolist()), int(transposed), groups)
        grids[f"{name}.weight"] = grid
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    attach(module, Provenance(shapes, grids=grids, weights=99))
    return module


def block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def small() -> nn.Module:
    return nn.Sequential(*block(3, 8), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 5))


def assert_same_state(saved: dict[str, Tensor], module: nn.Module) -> None:
    state = module.state_dict()
    assert list(saved) == list(state)
    for name, value in state.items():
        assert saved[name].dtype == value.dtype, name
        assert saved[name].shape == value.shape, name
        raw, expected = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (saved[name], value))
        assert torch.equal(raw, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    module = finalized(small().to(dtype))
    size = save(module, tmp_path / "net.fxc")
    assert size == (tmp_path / "net.fxc").stat().st_size
    saved = read(tmp_path / "net.fxc")
    assert_same_state(saved.tensors, module)
    before = provenance_of(module)
    assert before is not None
    assert saved.provenance.shapes == before.shapes
    assert saved.provenance.weights == 99
    for name, grid in before.grids.items():
        found = saved.provenance.grids[name]
        assert (found.channel_dim, found.groups) == (grid.channel_dim, grid.groups)
        assert found.exponent == pytest.approx(grid.exponent, abs=1e-6)
        assert all(bits in {0.0, 2.0, 3.0, 4.0} for bits in found.bits)
        assert [b == 0 for b in found.bits] == [b == 0 for b in grid.bits]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_again_it_is_the_same_file(tmp_path: Path, dtype: torch.dtype) -> None:
    module = finalized(small().to(dtype))
    save(module, tmp_path / "first")
    attach(module, read(tmp_path / "first").provenance)
    save(module, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_float64_grids_from_a_file_are_found_again(tmp_path: Path) -> None:
    """Here log2 and exp2 do not give the scale back to the last bit, but near enough to find it."""
    module = finalized(small().double())
    save(module, tmp_path / "first")
    attach(module, read(tmp_path / "first").provenance)
    save(module, tmp_path / "second")
    assert set(read(tmp_path / "second").provenance.grids) == {"0.weight", "3.weight", "5.weight"}
    assert_same_state(read(tmp_path / "second").tensors, module)


def test_provenance_of_a_cut_network(tmp_path: Path) -> None:
    module = finalized(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)))
    whole = provenance_of(module)
    assert whole is not None
    shapes = {**whole.shapes, "0.weight": (9, 3, 1, 1), "0.bias": (9,), "1.weight": (4, 9, 1, 1), "gone": (7, 7)}
    shapes.pop("1.bias")  # a bias that a pass has added
    six: tuple[int, ...] = (0, 2, 3, 5, 7, 8)
    kept: dict[str, dict[int, tuple[int, ...]]] = {
        "0.weight": {0: six},
        "0.bias": {0: six},
        "1.weight": {1: six},
        "gone": {0: (1, 2), 1: (0,)},
    }
    provenance = Provenance(shapes, kept, (("add", "relu"), ("add_1", "conv")), whole.grids, 12)
    attach(module, provenance)
    save(module, tmp_path / "net")
    saved = read(tmp_path / "net")
    assert_same_state(saved.tensors, module)
    assert saved.provenance.shapes == shapes
    assert saved.provenance.kept == kept
    assert saved.provenance.cuts == provenance.cuts
    assert saved.provenance.weights == 12


def test_every_dtype_and_empty_and_scalar_tensors(tmp_path: Path) -> None:
    module = finalized(small())
    for name in (
        "bool",
        "int8",
        "int64",
        "uint8",
        "uint16",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "complex64",
        "complex128",
    ):
        module.register_buffer(f"a_{name}", torch.arange(6).reshape(2, 3).to(getattr(torch, name)))
    module.register_buffer("step", torch.tensor(7))
    module.register_buffer("empty", torch.zeros(0, 4))
    module.register_buffer("empty_too", torch.zeros(0, 4))
    module.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).T)
    module.register_buffer("conjugate", torch.ones(2, dtype=torch.complex64).mul(1j).conj())
    save(module, tmp_path / "net")
    tensors = read(tmp_path / "net").tensors
    assert tensors["conjugate"].tolist() == [-1j, -1j]
    assert tensors["empty"] is not tensors["empty_too"]  # both without memory, so at the same address
    del module.conjugate
    assert_same_state({name: value for name, value in tensors.items() if name != "conjugate"}, module)


def test_masks_and_tables_of_indices_take_at_most_the_bits_of_their_range(tmp_path: Path) -> None:
    plain = save(finalized(small()), tmp_path / "net")
    module = finalized(small())
    mask = torch.rand(100, 100) < 0.5
    for dtype in (torch.bool, torch.float32, torch.int64):
        module.register_buffer(f"a_{dtype}".replace(".", "_"), mask.to(dtype))
    module.register_buffer("table", torch.randint(-30, 33, (10_000,)))
    size = save(module, tmp_path / "net")
    assert_same_state(read(tmp_path / "net").tensors, module)
    once = size - plain - 6 * 10_000 / 8  # the three masks are the same
    assert 10_000 / 8 < once + 100 < 10_000 / 8 + 400


@pytest.mark.parametrize("first", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path, *, first: bool) -> None:
    def tied() -> nn.Module:
        layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
        layers[1].weight = layers[0].weight
        return nn.Sequential(*layers)

    names = ["0.weight", "1.weight"]
    module = finalized(tied(), bits=8.0)
    provenance = provenance_of(module)
    assert provenance is not None
    grid = provenance.grids["1.weight"]  # the later of the two that finalized() has put the same tensor on
    attach(module, Provenance(provenance.shapes, grids={names[not first]: grid}))
    size = save(module, tmp_path / "net")
    assert size < 64 * 64 + 2_000
    saved = read(tmp_path / "net")
    assert saved.tensors["0.weight"] is saved.tensors["1.weight"]
    assert list(saved.provenance.grids) == [names[not first]]
    attach(module, Provenance(provenance.shapes, grids=dict.fromkeys(names, grid)))
    save(module, tmp_path / "net")
    assert set(read(tmp_path / "net").provenance.grids) == set(names)


def test_edited_weight_is_stored_as_it_is(tmp_path: Path) -> None:
    module = finalized(small())
    with torch.no_grad():
        module.get_parameter("0.weight")[1, 0, 0, 0] += 0.1
    save(module, tmp_path / "net")
    saved = read(tmp_path / "net")
    assert_same_state(saved.tensors, module)
    assert set(saved.provenance.grids) == {"3.weight", "5.weight"}


def test_wide_codes_and_double_scales(tmp_path: Path) -> None:
    """Grids beyond the usual types: minima that need int32, a float64 exponent with float64 digits."""
    layer = nn.Linear(4, 3, dtype=torch.float64)
    exponent = torch.tensor([-20.123456789, -3.3333333333, 0.1], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-90_000, 90_000, (3, 4)) * exponent.exp2()[:, None])
    module = fx.symbolic_trace(nn.Sequential(layer))
    attach(
        module,
        Provenance({"0.weight": (3, 4), "0.bias": (3,)}, grids={"0.weight": Grid((18.0,) * 3, (*exponent.tolist(),))}),
    )
    save(module, tmp_path / "net")
    saved = read(tmp_path / "net")
    assert_same_state(saved.tensors, module)
    assert set(saved.provenance.grids) == {"0.weight"}


def test_header_does_not_dominate_a_small_network(tmp_path: Path) -> None:
    """Eight layers: what is not weights, norms and scales stays below 1.2 KB."""
    channels = [3, 16, 16, 24, 24, 32, 32, 40]
    layers = [layer for pair in pairwise(channels) for layer in block(*pair)]
    module = finalized(nn.Sequential(*layers, nn.Linear(40, 10)))
    size = save(module, tmp_path / "net")
    state, provenance = module.state_dict(), provenance_of(module)
    assert provenance is not None
    plain = sum(v.numel() * v.element_size() for n, v in state.items() if n not in provenance.grids)
    codes = sum((state[n] != 0).flatten(1).any(1).sum() * state[n][0].numel() * 4 / 8 for n in provenance.grids)
    tables = 6 * sum(len(grid.bits) for grid in provenance.grids.values())
    assert size - plain - codes - tables < 1_200


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    save(finalized(small()), tmp_path / "net")
    streams = load_file(tmp_path / "net")
    assert set(streams) == {"uint8", "int64", "float32"}


def test_reader_owns_its_memory(tmp_path: Path) -> None:
    save(finalized(small()), tmp_path / "net")
    saved = read(tmp_path / "net")
    (tmp_path / "net").write_bytes(b"")
    pointers = {value.untyped_storage().data_ptr() for value in saved.tensors.values()}
    assert len(pointers) == len(saved.tensors)
    assert all(value.isfinite().all() for value in saved.tensors.values())


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net"
    save(finalized(small()), path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device; nothing was changed"):
        save(finalized(small()), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot write .*: there is no folder .*absent; make it first"):
        save(finalized(small()), tmp_path / "absent" / "net")


def test_module_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot save this .*\n  save what finalize\(\) returned, .* in pieces"):
        save(fx.symbolic_trace(small()), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_state_without_values_is_refused(tmp_path: Path) -> None:
    module = finalized(small())
    with pytest.raises(StorageError, match=r"cannot save '0.weight', a torch.strided tensor on meta"):
        save(module.to("meta"), tmp_path / "net")


def test_disordered_indices_are_refused(tmp_path: Path) -> None:
    module = finalized(nn.Sequential(nn.Linear(3, 2)))
    attach(module, Provenance({"0.weight": (4, 3)}, {"0.weight": {0: (2, 1)}}))
    with pytest.raises(StorageError, match=r"indices that '0.weight' of shape \(4, 3\) keeps along dim 0 are not in"):
        save(module, tmp_path / "net")


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for action in (lambda: save(finalized(small()), tmp_path / "net"), lambda: read(tmp_path / "net")):
        with pytest.raises(StorageError, match=r'pip install "fxcompress\[file\]"'):
            action()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 8
    path.write_bytes(content)


def other_type(path: Path) -> None:
    """One byte of the header, which no checksum covers, says that floats are integers."""
    content = path.read_bytes()
    assert content.count(b'"F32"') == 1
    path.write_bytes(content.replace(b'"F32"', b'"I32"'))


def overwrite(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 something else altogether")


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def checkpoint(path: Path) -> None:
    write_states(path, {"a": 1})


def newer(path: Path) -> None:
    save_file({"uint8": torch.zeros(3)}, path, {"fxcompress": str(FORMAT + 1)})


def older(path: Path) -> None:
    save_file({"uint8": torch.zeros(3)}, path, {"fxcompress": "1 9 0"})


def no_index(path: Path) -> None:
    save_file({"uint8": torch.zeros(3)}, path, {"fxcompress": str(FORMAT)})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "there is no file .*; check the path"),
        (truncate, "is damaged, or not a file of fxcompress"),
        (overwrite, "is damaged, or not a file of fxcompress"),
        (flip, "is damaged: the checksum is wrong; fetch the file again"),
        (other_type, "is damaged: the float32 stream holds int32; fetch the file again"),
        (foreign, "was not written by fxcompress"),
        (checkpoint, "was written by torch.save, as checkpoints are: load_checkpoint reads those"),
        (newer, f"has format {FORMAT + 1} and this fxcompress reads format {FORMAT}; upgrade it"),
        (older, "has format 1, of an fxcompress before the first release; save the network again"),
        (no_index, "is damaged: not enough values"),
    ],
)
def test_bad_file_is_explained(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "net"
    save(finalized(small()), path)
    harm(path)
    with pytest.raises(StorageError, match=message):
        read(path)


def test_streams_must_fit_the_index(tmp_path: Path) -> None:
    """A file whose checksum is right and whose streams are too short or too long."""
    path = tmp_path / "net"
    save(finalized(small()), path)
    with safe_open(path, "pt") as opened:
        version, length, _ = opened.metadata()["fxcompress"].split(" ")
    for name, change, message in [("float32", -1, "the float32 stream ends early"), ("int64", 1, "1 values are left")]:
        streams = load_file(path)
        streams[name] = streams[name].repeat(2)[: len(streams[name]) + change].contiguous()
        save_file(streams, tmp_path / "other", {"fxcompress": f"{version} {length} {checksum(streams)}"})
        with pytest.raises(StorageError, match=message):
            read(tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("i", [["", [2, "x"], "float32"]], "'x' is no size and no position"),
        ("i", [["", [2, 2**63], "float32"]], "9223372036854775808 is no size"),
        ("i", [["", [2, 3], "load"]], "'load' is no dtype"),
        ("i", [[1, [2, 3], "float32"]], "1 is no name"),
        ("h", ["x"], r"\['x'\] is no name"),
        ("w", -1, "-1 is no size"),
        ("j", [["eval:add", 1]], "not enough values"),
        ("b", [None], "None is no name"),
    ],
)
def test_an_index_of_other_kinds_of_values_is_damage(key: str, value: object, message: str, tmp_path: Path) -> None:
    """Found where the file is read, with a checksum that is right, and not where the network is built."""
    path = tmp_path / "net"
    save(finalized(small()), path)
    with safe_open(path, "pt") as opened:
        version, length, _ = opened.metadata()["fxcompress"].split(" ")
    streams = load_file(path)
    index = json.loads(zlib.decompress(streams["uint8"][: int(length)].numpy().tobytes()))
    packed = torch.frombuffer(bytearray(zlib.compress(json.dumps(index | {key: value}).encode())), dtype=torch.uint8)
    streams["uint8"] = torch.cat([packed, streams["uint8"][int(length) :]])
    save_file(streams, path, {"fxcompress": f"{version} {len(packed)} {checksum(streams)}"})
    with pytest.raises(StorageError, match=message):
        read(path)


class Optional(nn.Module):
    """Computes something else with a mask than without one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        h = self.first(x).relu() * scale
        return self.last(h if mask is None else h * mask)  # type: ignore[no-any-return]


@pytest.mark.parametrize("given", [(3.0,), ()])
def test_inputs_that_the_file_cannot_say_are_asked_for(given: tuple[float, ...], tmp_path: Path) -> None:
    inputs = (torch.randn(3, 4), torch.rand(6), *given)
    final = fxc.prune(Optional(), inputs).module.eval()
    fxc.save(final, tmp_path / "net.fxc")
    if given:
        with pytest.raises(StorageError, match="not all of its inputs were tensors: pass example_inputs"):
            fxc.load(tmp_path / "net.fxc", Optional())
    loaded = fxc.load(tmp_path / "net.fxc", Optional(), inputs if given else None)
    assert torch.equal(loaded(*inputs), final(*inputs))


def test_a_dtype_that_an_older_safetensors_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(streams: object, about: object) -> bytes:
        del streams, about
        raise KeyError(torch.uint16)

    monkeypatch.setattr("safetensors.torch.save", write)
    net = fxc.compress(nn.Linear(3, 2), torch.randn(1, 3)).finalize()
    with pytest.raises(StorageError, match=r"safetensors has no torch.uint16, which the network holds; upgrade it"):
        fxc.save(net, tmp_path / "net.fxc")
    assert not (tmp_path / "net.fxc").exists()


def test_a_weight_that_does_not_lie_row_by_row_is_loaded_as_it_lay(tmp_path: Path) -> None:
    """Kernels may add up in another order: so may those of a weight in channels_last."""

    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3))
        net[0].weight = nn.Parameter(torch.randn(6, 8).t())
        return net

    x = torch.randn(4, 6)
    final = fxc.compress(make(), x).finalize()
    fxc.save(final, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", make(), x)
    assert loaded.get_parameter("0.weight").stride() == final.get_parameter("0.weight").stride() == (1, 8)


class Headed(nn.Module):
    """A network with a new last layer."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("keep_code", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_a_result_under_a_new_head_is_a_part_of_another_original(
    trained: bool,  # noqa: FBT001
    keep_code: bool,  # noqa: FBT001
    tmp_path: Path,
) -> None:
    """What is cut out of the whole later is not cut out of the result alone."""

    def body() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 6))

    x = torch.randn(3, 4)
    net = fxc.compress(body(), x, keep_code=keep_code)
    set_bits(net, "0.weight", [1, 5])
    first = net.finalize().eval()
    fxc.save(first, tmp_path / "body.fxc")
    whole = Headed(first)
    if trained:
        both = fxc.compress(whole, x, keep_code=keep_code)
        set_bits(both, "body.2.weight", [0, 3])
        final: nn.Module = both.finalize().eval()
    else:
        with torch.no_grad():
            whole.head.weight[:, [0, 3]] = 0
        final = fxc.prune(whole, x, keep_code=keep_code).module.eval()
    assert final.get_submodule("head").weight.shape == (2, 4)
    size = fxc.save(final, tmp_path / "all.fxc")
    original = Headed(fxc.load(tmp_path / "body.fxc", body()))
    loaded = fxc.load(tmp_path / "all.fxc", original)
    assert torch.equal(loaded(x), final(x))
    grids = provenance_of(loaded)
    assert grids is not None
    assert {"body.0.weight", "body.2.weight"} <= grids.grids.keys()
    assert fxc.save(loaded, tmp_path / "again.fxc") == size


def in_a_row(net: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - a module with these attributes
    return net.last(net.between(net.first(x)))  # type: ignore[no-any-return]


class Both(nn.Module):
    """Two networks one after the other; no piece is found in it, as code outside has names that their layers have."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.between = first, last, nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return in_a_row(self, x)


def test_results_inside_of_a_module_that_was_never_one(tmp_path: Path) -> None:
    def result() -> nn.Module:
        net = fxc.compress(Modes(), torch.randn(2, 8))
        set_bits(net, "first.weight", [1, 5, 6])
        return net.finalize().eval()

    x = torch.randn(3, 8)
    both = Both(result(), result()).eval()
    fxc.save(both, tmp_path / "net.fxc")
    loaded = fxc.load(tmp_path / "net.fxc", Both(Modes(), Modes()), x)
    assert torch.equal(loaded(x), both(x))
    assert loaded.get_submodule("last.first").weight.shape == (13, 8)
    other = Modes()
    other.forward = lambda x: other.last(other.first(x).tanh())  # type: ignore[method-assign]
    with pytest.raises(TraceError, match=r"no piece of .* was found in the model"):
        fxc.load(tmp_path / "net.fxc", Both(Modes(), other), x)
