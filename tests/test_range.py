"""What a step leaves of a channel's range when its bits change."""

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.quantizer import Quantizer
from tests.nets import ResidualNet, batch


def quantizers(net: nn.Module) -> list[Quantizer]:
    return [module for module in net.modules() if isinstance(module, Quantizer)]


def ranges(net: nn.Module) -> Tensor:
    """log2 of the range, of all channels: e + b - 1; of those with less than two bits, what it was at two."""
    return torch.cat([q.exponent.detach() + q.bits.detach().clamp(min=2) - 1 for q in quantizers(net)])


def net_of(*, keep_range: bool = True) -> fxc.CompressedModule:
    torch.manual_seed(0)
    return fxc.compress(ResidualNet().double(), batch()[0], keep_range=keep_range)


def press(net: nn.Module, generator: torch.Generator, by: float) -> None:
    """What an optimizer may do to bits in a step: move each by up to ``by``, more often down."""
    with torch.no_grad():
        for q in quantizers(net):
            q.bits.add_(by * (torch.rand(q.bits.shape, generator=generator, dtype=q.bits.dtype) - 0.7))


def test_the_range_stays_while_bits_come_and_go() -> None:
    net, generator = net_of(), torch.Generator().manual_seed(1)
    before = ranges(net)
    for _ in range(30):
        press(net, generator, 1.0)
        net.step()
        assert all(bool((q.bits >= 0).all()) for q in quantizers(net))
        assert torch.allclose(ranges(net), before, atol=1e-9)
    assert any(bool((q.bits == 0).any()) for q in quantizers(net))


def test_what_the_optimizer_does_to_exponents_stays() -> None:
    net = net_of()
    before = ranges(net)
    with torch.no_grad():
        for q in quantizers(net):
            q.exponent.sub_(0.25)
            q.bits.sub_(1.5)
    net.step()
    assert torch.allclose(ranges(net), before - 0.25)


@pytest.mark.parametrize("bits", [3.0, 5.0])
def test_a_bit_less_costs_digits_not_the_largest_weights(bits: float) -> None:
    errors = {}
    for keep in (True, False):
        net = net_of(keep_range=keep)
        weights = {
            n: p.detach().clone() for n, p in net.named_parameters() if f"{n}_quantizer.bits" in net.state_dict()
        }
        assert weights
        for q in quantizers(net):
            q.bits.data.fill_(bits)
        net.step()
        with torch.no_grad():
            found = [(net.get_submodule(f"{n}_quantizer")(w) - w).norm() / w.norm() for n, w in weights.items()]
        errors[keep] = float(max(found))
    assert errors[True] < 0.5 * 2 ** (3 - bits)
    assert errors[False] > 0.5


def test_exponents_are_left_alone_where_that_is_asked_for() -> None:
    net = net_of(keep_range=False)
    before = [q.exponent.detach().clone() for q in quantizers(net)]
    press(net, torch.Generator().manual_seed(1), 3.0)
    net.step()
    assert all(torch.equal(q.exponent, e) for q, e in zip(quantizers(net), before, strict=True))


def test_bits_that_were_set_from_outside() -> None:
    """After refresh() they count as where the next step starts from."""
    net = net_of()
    for q in quantizers(net):
        q.bits.data.fill_(4.0)
    before = [q.exponent.detach().clone() for q in quantizers(net)]
    net.refresh()
    net.step()
    assert all(torch.equal(q.exponent, e) for q, e in zip(quantizers(net), before, strict=True))


def test_bits_stay_where_powers_of_two_are_finite() -> None:
    """A step of plain gradient descent may take them anywhere; the next gradient would be NaN."""
    net = net_of().float()
    for q in quantizers(net):
        q.bits.data.fill_(1000.0)
    net.step()
    (net(batch()[0].float()).square().sum() + net.size()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
    assert all(bool((q.bits <= 24).all()) for q in quantizers(net))


def test_the_task_widens_a_range_by_the_exponent() -> None:
    """In the paper's form clipped weights drive bits up, as that widens the range too."""
    most = {}
    for keep in (True, False):
        torch.manual_seed(0)
        net, (x, target) = net_of(keep_range=keep), batch()
        optimizer = torch.optim.Adam(net.param_groups(1e-3))
        for _ in range(60):
            loss = nn.functional.cross_entropy(net(x), target) + 1e-3 * net.size()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            net.step()
        most[keep] = [float(q.bits.detach().max()) for q in quantizers(net)]
    assert all(kept < free for kept, free in zip(most[True], most[False], strict=True))
