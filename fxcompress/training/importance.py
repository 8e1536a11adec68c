"""What a task would lose with each set of channels that goes together, to first order.

Source: Molchanov et al., Importance Estimation for Neural Network Pruning, arXiv 1906.10771, equation 8, summed over
all parameters that such a set holds: ``(w dL/dw)**2``.
"""

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.quantizer import Quantizer
from fxcompress.training.census import Census
from fxcompress.training.network import SizedNetwork
from fxcompress.training.sized import SizedModule


class Importance:
    """Asks the gradients of a network of one shape.

    Args:
        net: the network, whose gradients are read by :meth:`now`.

    Attributes:
        unit: (R,) int64, for all bits one after the other the number of the set that a channel goes with, or -1 where
            it must stay.
        dtype: in which it is summed.
    """

    def __init__(self, net: SizedNetwork) -> None:
        self._adding: list[tuple[nn.Parameter, int, Tensor]] = []
        parts = list[np.ndarray]()
        first = 0
        for part in net.fxc_parts().values():
            assert isinstance(part, SizedModule)
            parts.append(self._units(part, first))
            first += part.liveness.census.analysis.space.size
        self.unit = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        held = [parameter for parameter, _, _ in self._adding]
        double = any(parameter.dtype == torch.float64 for parameter in held)
        self.dtype = torch.float64 if double else torch.float32  # squares of halves would overflow
        device = held[0].device if held else None
        self._sets = torch.from_numpy(self.unit + 1).to(device)  # 0 for what must stay
        self._none = torch.zeros(first + 1, dtype=self.dtype, device=device)

    def _units(self, part: SizedModule, first: int) -> np.ndarray:
        """The sets of the channels of one graph, numbered from ``first``; what adds to each is noted."""
        census = part.liveness.census
        analysis = census.analysis
        unit = np.full(len(census.free_rows), -1)
        for maker in analysis.makers:
            span = census.span_of(maker)
            if span is not None:
                stays = analysis.unit_pinned[maker.rows] | (maker.rows == 0)
                unit[span.start : span.stop] = np.where(stays, -1, analysis.units[maker.rows] + first)
        quantizers = tuple(f"{name}." for name, module in part.named_modules() if isinstance(module, Quantizer))
        for name, parameter in part.named_parameters():
            if name.startswith(quantizers) or name not in analysis.atoms:
                continue
            for dim, atoms in analysis.atoms[name].items():
                units = torch.from_numpy(analysis.units[atoms.numpy()].reshape(-1) + first + 1)
                self._adding.append((parameter, dim, units.to(parameter.device)))
        return _mortal(census, np.where(census.free_rows, unit, -1))

    @torch.no_grad()
    def now(self) -> Tensor:
        """By the gradients that there are now, for each of all bits that of the set that it goes with, (R,)."""
        found, squares = self._none.clone(), dict[int, Tensor]()
        for parameter, dim, sets in self._adding:
            if parameter.grad is None:
                continue
            if id(parameter) not in squares:
                squares[id(parameter)] = (parameter * parameter.grad).to(self.dtype).square_()
            square = squares[id(parameter)]
            others = [d for d in range(square.ndim) if d != dim]
            found.index_add_(0, sets, square.sum(others) if others else square)
        found[0] = 0
        return found[self._sets]


def _mortal(census: Census, unit: np.ndarray) -> np.ndarray:
    """The sets without those that training could not remove; of some, tried on every other one and on the rest.

    Args:
        census: of the network.
        unit: (R,) the number of the set of each channel, or -1.
    """
    _, order = np.unique(unit, return_inverse=True)
    found = unit.copy()
    for rest in (0, 1):
        tried = (unit >= 0) & (order % 2 == rest)
        found[np.isin(unit, unit[tried & ~census.would_go(tried)]) & tried] = -1
    return found
