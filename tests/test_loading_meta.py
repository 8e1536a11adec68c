"""Files are loaded into models that were built on the meta device."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import StorageError, UnsupportedModelError
from tests.exactness import Fingerprint


class Net(nn.Module):
    """Reads a table at positions that are a buffer; with weight norm, a tied weight and a recurrent layer."""

    pos: Tensor

    def __init__(self, *, looped: bool = False, rotary: bool = False) -> None:
        super().__init__()
        self.looped = looped
        self.embedding, self.table = nn.Embedding(20, 8), nn.Parameter(torch.randn(10, 8))
        self.register_buffer("pos", torch.arange(6).flip(0))
        self.rnn, self.norm = nn.GRU(8, 8, batch_first=True), nn.BatchNorm1d(8)
        self.body = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.last, self.tied = nn.Linear(8, 20), nn.Linear(8, 20, bias=False)
        self.tied.weight = self.embedding.weight
        self.last.bias.requires_grad_(False)
        if rotary:
            self.register_buffer("frequencies", torch.arange(8.0), persistent=False)
            self.body.scale = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.table[self.pos]
        for _ in range(x.shape[1] // 6 if self.looped else 1):
            h = torch.tanh(h)
        h = torch.relu(self.body(self.norm(self.rnn(h)[0].mean(1))))
        return self.last(h) + self.tied(h)  # type: ignore[no-any-return]


def on_meta(*, looped: bool = False, rotary: bool = False) -> Net:
    with torch.device("meta"):
        return Net(looped=looped, rotary=rotary)


@pytest.mark.parametrize("keep_code", [False, True])
@pytest.mark.parametrize("looped", [False, True])
def test_a_model_on_the_meta_device_gets_its_values_from_the_file(
    tmp_path: Path, *, looped: bool, keep_code: bool
) -> None:
    torch.manual_seed(0)
    model, x = Net(looped=looped), torch.randint(0, 20, (4, 6))
    with torch.no_grad():
        for tensor in (model.table.T, model.last.weight.T, model.embedding.weight.T):
            tensor[:3] = 0
    final = fxc.compress(model, x, keep_code=keep_code).finalize().eval()
    assert final.get_parameter("table").shape == (6, 5)  # positions go up to 5
    fxc.save(final, tmp_path / "net.fxc")
    bare = on_meta(looped=looped)
    visit = Fingerprint(bare)
    loaded = fxc.load(tmp_path / "net.fxc", bare)
    visit.check()
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert loaded.get_parameter("embedding.weight") is loaded.get_parameter("tied.weight")
    assert not loaded.get_parameter("last.bias").requires_grad
    assert torch.equal(loaded(x), final(x))


def test_values_that_no_file_holds_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 20, (4, 6))
    fxc.save(fxc.compress(Net(rotary=True), x).finalize(), tmp_path / "net.fxc")
    with pytest.raises(StorageError, match=r"in no file: frequencies, body\.scale\n.*persistent=False.*on the CPU"):
        fxc.load(tmp_path / "net.fxc", on_meta(rotary=True))
    bare = on_meta(rotary=True)
    bare.frequencies, bare.body.scale = torch.arange(8.0), torch.ones(8)
    assert fxc.load(tmp_path / "net.fxc", bare)(x).shape == (4, 20)


def test_it_must_be_the_same_model(tmp_path: Path) -> None:
    fxc.save(fxc.compress(nn.Linear(4, 4), torch.zeros(1, 4)).finalize(), tmp_path / "net.fxc")
    with pytest.raises(StorageError, match=r"another network: its original had weight of shape \(4, 4\)"):
        fxc.load(tmp_path / "net.fxc", nn.Linear(4, 3, device="meta"))
    with pytest.raises(UnsupportedModelError, match="is on the meta device and has no values"):
        fxc.compress(nn.Linear(4, 3, device="meta"), torch.zeros(1, 4))
