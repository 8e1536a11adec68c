"""What torch.fx notes of functions that it does not look into, wherever the code of a graph calls one."""

import copy
import gc

import torch
from torch import Tensor, nn
from torch.fx import _symbolic_trace

import fxcompress as fxc


class Rows(nn.Module):
    """Cannot be traced with symbols; its graph holds checks, which torch.fx does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.stack([self.first(row).relu() for row in x]))  # type: ignore[no-any-return]


def test_what_torch_notes_of_a_graph_goes_with_it() -> None:
    """torch.fx goes through its list at each trace: with every copy, and every pruning in training, it would grow."""
    places = _symbolic_trace._wrapped_fns_to_patch
    x = torch.randn(3, 4)
    fxc.compress(Rows(), x)  # which imports what is needed
    gc.collect()
    before = len(places)
    net = fxc.compress(Rows(), x)
    net(x)
    gc.collect()
    once = len(places)
    assert once > before  # or there is nothing to see here
    for _ in range(3):
        copy.deepcopy(net)(x)
        net.prune()
        net.recompile()
        net(x)
    gc.collect()
    assert len(places) == once
    del net
    gc.collect()
    assert len(places) == before


def test_checks_are_seen_as_what_they_are_in_a_network_of_networks() -> None:
    x = torch.randn(3, 4)
    inner = fxc.prune(Rows(), x).module
    assert torch.equal(fxc.prune(nn.Sequential(inner), x).module(x), inner(x))
