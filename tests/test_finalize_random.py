"""What comes out of training computes what was trained: random networks, from their quantizers to the file."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

import fxcompress as fxc
from fxcompress.errors import UnsupportedModelError
from fxcompress.quantizer import Quantizer
from tests.exactness import difference, outputs
from tests.networks import Example, examples

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def compressed(example: Example) -> fxc.CompressedModule:
    """With bit depths from 0 to 6, which is far from what the weights were."""
    try:
        net = fxc.compress(example.net, example.inputs)
    except UnsupportedModelError:  # no layer of which the weight can be quantized
        assume(False)
        raise
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
    net = compressed(example)
    expected = outputs(net, example.inputs)
    for options in ({"prune": False}, {"fold": False}, {}):
        assert difference(expected, outputs(net.finalize(**options), example.inputs)) <= 1e-9
