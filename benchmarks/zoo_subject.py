"""A network of the scoreboard: built, with channels that are dead, and pruned."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import fxcompress as fxc
from benchmarks.timing import CLOCKS, Stopwatch
from benchmarks.zoo_models import Arguments, Case
from benchmarks.zoo_report import Report
from fxcompress.channels.analysis import Analysis
from tests.exactness import tensors

TOLERANCE = 1e-9
CONTROL = 1e-6  # a thousand times of that; some networks begin with branches of a hundred-thousandth
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(slots=True)
class Subject:
    """A network some channels of which are dead.

    Attributes:
        net: the network.
        arguments: what it is called with.
        analyses: of it, or of the modules of it that are pruned, by their names.
        dead: which atoms are dead, by the same names.
        pruned: what is left of it.
        reasons: why dead channels stayed, by the weight that makes them.
    """

    net: nn.Module
    arguments: Arguments
    analyses: dict[str, Analysis]
    dead: dict[str, np.ndarray]
    pruned: nn.Module
    reasons: dict[str, str]


def build(case: Case) -> nn.Module:
    """A network without dropout, the same ones each time, in float64, in evaluation mode."""
    torch.manual_seed(0)
    net = case.build()
    for module in net.modules():
        if isinstance(module, DROPOUT):
            module.p = 0.0  # removing channels moves the random numbers that hit the others
        if isinstance(getattr(module, "drop_rate", None), float):
            module.__dict__["drop_rate"] = 0.0  # the same by a function, in timm
    return randomise(net).double().eval()


def randomise(net: nn.Module) -> nn.Module:
    """Random statistics of norms, and random numbers in place of constants: what is compared must not be trivial."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.get_buffer("running_mean").normal_(std=0.5)
                module.get_buffer("running_var").uniform_(0.5, 1.5)
        for parameter in net.parameters():
            first = parameter.flatten()[0]
            if bool((parameter == first).all()):
                parameter.uniform_(0.5, 1.5) if first > 0 else parameter.normal_(std=0.1)
    return net


def outputs(net: nn.Module, arguments: Arguments) -> list[torch.Tensor]:
    """All tensors that a network returns for copies of the arguments."""
    with torch.no_grad():
        return list(tensors(net(*copy.deepcopy(arguments))))


def timed_prune(net: nn.Module, arguments: Arguments, watch: Stopwatch, report: Report) -> fxc.PruneResult:
    """Prune, and report how long it took; the shortest time counts."""
    before = _versions(net)
    phase = f"run {len(watch.laps['cpu'])}"
    with watch.phase(phase):
        result = fxc.prune(net, arguments)
    report.add(**{clock: min(watch.laps[clock].values()) for clock in CLOCKS})
    report.add(removed=1 - result.report.parameters[1] / max(result.report.parameters[0], 1))
    if _versions(net) != before or net.training:
        raise ValueError("the original was changed")
    return result


def _versions(net: nn.Module) -> dict[str, tuple[int, int]]:
    """What changes with a tensor that is replaced or written to."""
    return {name: (id(t), t._version) for name, t in net.state_dict(keep_vars=True).items()}  # noqa: SLF001 - torch's
