"""Code that looks at values only to raise an error has a graph, without the look; all other code that does has none.

PYTEST_DONT_REWRITE: the functions here assert as those of a user do.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import PathError, TraceError
from tests.exactness import difference

Look = Callable[[Tensor], Any]


class Net(nn.Module):
    """Looks at what its first layer makes."""

    def __init__(self, look: Look, *, sizes: bool) -> None:
        super().__init__()
        self.first, self.last, self.look, self.sizes = nn.Linear(5, 8), nn.Linear(8, 2), look, sizes

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        if self.sizes and x.shape[0] > 100:  # so that it is traced by running
            h = h * 2
        self.look(h)
        found: Tensor = self.last(h)
        return found


def asserted(h: Tensor) -> None:
    assert not torch.isnan(h).any(), "not a number"


def asserted_both(h: Tensor) -> None:
    assert torch.isfinite(h).all() and h.abs().max() < 1e6, f"large: {h.max()}"  # noqa: PT018


def asserted_either(h: Tensor) -> None:
    assert h.shape[1] == 3 or h.min() >= 0


def raised(h: Tensor) -> None:
    if torch.isnan(h).any() or torch.isinf(h).any():
        raise ValueError(f"bad values in a tensor of {h.shape}")


def raised_unless(h: Tensor) -> None:
    finite = torch.isfinite(h).all()
    if not finite:
        message = "bad " + "values"
        raise ValueError(message)


def raised_on_the_other_side(h: Tensor) -> Tensor:
    if h.min() >= 0:
        return h * 2
    raise ValueError("negative")


def of_sizes_too(h: Tensor) -> None:
    assert h.shape[0] < 50
    assert h.sum() >= 0


def by_torch(h: Tensor) -> None:
    torch._assert((h >= 0).all(), "negative")


def in_a_function(h: Tensor) -> None:
    asserted(h)
    raised(h)


def as_a_number(h: Tensor) -> None:
    assert h.max().item() <= 1e6


def as_a_number_with_sizes(h: Tensor) -> None:
    assert h.dim() + h.abs().max().item() * 2 <= 1e6 + h.size(1), f"too large: {h.max()}"
    if not 0 <= h.min().item() < h.shape[1] * 1e6:
        raise ValueError("out of range")


LEFT_OUT: list[Look] = [
    asserted, asserted_both, asserted_either, raised, raised_unless, raised_on_the_other_side, of_sizes_too, by_torch,
    in_a_function, as_a_number, as_a_number_with_sizes,
]  # fmt: skip


def caught(h: Tensor) -> Tensor:
    try:
        assert h.max() <= 1
    except AssertionError:
        return h * 2
    return h


def caught_outside(h: Tensor) -> Tensor:
    try:
        asserted(h)
    except AssertionError:
        return h * 0
    return h


def decided(h: Tensor) -> Tensor:
    return h * 2 if h.max() > 1 else h


def decided_before_it_raises(h: Tensor) -> None:
    if h.max() > 1:
        if h.min() < -1:
            raise ValueError("wide")
        h.mul_(2)


def told(h: Tensor) -> None:
    if h.max() > 1e6:
        print("large")


def kept(h: Tensor) -> Tensor:
    largest = h.max().item()
    assert largest <= 1e6
    return h / largest


def given_to_a_function(h: Tensor) -> None:
    assert min(h.max().item(), 3) <= 5


def compared_to_decide(h: Tensor) -> Tensor:
    return h * 2 if h.max().item() > 1 else h


def kept_in_an_assignment(h: Tensor) -> Tensor:
    assert (largest := h.max().item()) <= 1e6  # noqa: RUF018
    return h / largest


REFUSED: list[Look] = [
    kept, given_to_a_function, compared_to_decide, kept_in_an_assignment,
    caught, caught_outside, decided, decided_before_it_raises, told,
]  # fmt: skip


def dead(look: Look, *, sizes: bool) -> Net:
    torch.manual_seed(0)
    net = Net(look, sizes=sizes).double()
    with torch.no_grad():
        for parameter in net.first.parameters():
            parameter[1:5] = 0
    return net


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("look", LEFT_OUT)
def test_checks_of_values_are_left_out(look: Look, *, sizes: bool) -> None:
    net, x = dead(look, sizes=sizes), torch.randn(3, 5).double()
    result = fxc.prune(net, x).module
    assert difference(net(x), result(x)) <= 1e-12
    if look is not by_torch:  # which stays, with what it asks for
        assert result.get_parameter("first.weight").shape == (4, 5)
    kept = fxc.prune(net, x, keep_code=True).module
    assert difference(net(x), kept(x)) <= 1e-12
    assert difference(net(x), fxc.compress(net, x, bits=24)(x)) <= 1e-5


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("look", REFUSED)
def test_what_goes_on_by_values_is_refused(look: Look, *, sizes: bool) -> None:
    with pytest.raises(TraceError):
        fxc.prune(dead(look, sizes=sizes), torch.randn(3, 5).double())


def test_checks_of_sizes_stay() -> None:
    result = fxc.prune(dead(of_sizes_too, sizes=False), torch.randn(3, 5).double()).module
    with pytest.raises(PathError):
        result(torch.randn(60, 5).double())


def test_the_user_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def own(h: Tensor) -> None:
        assert (h >= 0).all()

    for _ in range(2):
        fxc.prune(dead(own, sizes=False), torch.randn(3, 5).double())
    told = [record for record in caplog.records if "check of values" in record.getMessage()]
    assert len(told) == 1
    assert "test_asserts.py" in told[0].getMessage()
