"""What comes out of training computes what was trained: random networks, from their quantizers to the file."""

import copy
import tempfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import fxcompress as fxc
from fxcompress.quantizer import Quantizer
from tests.exactness import difference, outputs
from tests.nets import lose
from tests.networks import Example, compressed, examples

EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


def with_few_bits(example: Example) -> fxc.CompressedModule:
    """With bit depths from 0 to 6, which is far from what the weights were."""
    net = compressed(example)
    generator = torch.Generator().manual_seed(example.seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, Quantizer):
                module.bits.copy_(6 * torch.rand(module.bits.shape, generator=generator, dtype=module.bits.dtype))
                module.bits[torch.rand(module.bits.shape, generator=generator) < 0.3] = 0.0
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias[torch.rand(module.bias.shape, generator=generator) < 0.5] = 0.0
    net.step()
    return net


@EXAMPLES
@given(examples())
def test_finalized_networks_compute_the_same(example: Example) -> None:
    net = with_few_bits(example)
    expected = outputs(net, example.inputs)
    for options in ({"prune": False}, {"fold": False}, {}):
        assert difference(expected, outputs(net.finalize(**options), example.inputs)) <= 1e-9


@EXAMPLES
@given(examples())
def test_removed_step_by_step_it_loads_without_a_word(example: Example) -> None:
    """The numbers of a slice depend on the steps, and ``load`` cuts at once: that is no other network."""
    fresh, net = copy.deepcopy(example.net), compressed(example)
    for step in range(3):
        lose(net, example.seed + step, 0.3)
        net.prune()
    final = net.finalize()
    with tempfile.TemporaryDirectory() as folder:
        fxc.save(final, Path(folder) / "net.fxc")
        loaded = fxc.load(Path(folder) / "net.fxc", fresh, example.inputs)
    assert difference(outputs(final, example.inputs), outputs(loaded, example.inputs)) == 0
