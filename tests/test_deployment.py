"""A finalized network leaves by the ways that torch has: torch.export, torch.onnx and torch.jit.trace."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.deployed import NETS, finished

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("name", list(NETS)),
]
Exported = Callable[[Tensor], Tensor]


def check(exported: Exported, final: nn.Module, *batches: Tensor) -> None:
    for batch in batches:
        torch.testing.assert_close(exported(batch), final(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_torch_export_with_a_batch_of_any_size(name: str, *, narrow: bool) -> None:
    final, x = finished(name, narrow=narrow)
    program = torch.export.export(final, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    check(program.module(), final, x, torch.cat([x, x, x]))


@pytest.mark.parametrize("narrow", [False, True])
def test_torch_jit_trace(name: str, *, narrow: bool) -> None:
    final, x = finished(name, narrow=narrow)
    check(torch.jit.trace(final, x), final, x)


@pytest.mark.sampled(2)
@pytest.mark.cpu
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("narrow", [False, True])
def test_onnx_runtime(name: str, tmp_path: Path, *, narrow: bool, dynamo: bool) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    final, x = finished(name, narrow=narrow)
    free = ({0: torch.export.Dim("batch")},) if dynamo else None
    torch.onnx.export(final, (x,), str(tmp_path / "net.onnx"), dynamo=dynamo, verbose=False, dynamic_shapes=free)
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {entry.name: batch.numpy()})[0])

    check(run, final, x, *([torch.cat([x, x, x])] if dynamo else []))
