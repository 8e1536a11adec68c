"""What the tests of exactness share: making channels dead, comparing outputs, looking for traces of a visit."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.channels.analysis import Analysis
from fxcompress.channels.plan import Plan
from fxcompress.channels.sites import SiteAtoms
from fxcompress.errors import PathError

TOLERANCE = 1e-9


def removable_units(analysis: Analysis) -> np.ndarray:
    """The roots of the units that may go."""
    return np.unique(analysis.units[~analysis.unit_pinned])


def atoms_of(analysis: Analysis, units: np.ndarray) -> np.ndarray:
    """Which atoms belong to the units, bool (atoms,)."""
    return np.isin(analysis.units, units)


def kill(analysis: Analysis, dead: np.ndarray) -> None:
    """Zero what makes the dead atoms: rows of weights, and all that is no weight; never a column."""
    parameters = dict(analysis.module.named_parameters(remove_duplicate=False))
    weights = {sites.weight_name for sites in analysis.sites}
    with torch.no_grad():
        for sites in analysis.sites:
            if sites.weight_name in parameters:
                _kill_rows(parameters[sites.weight_name], sites, analysis, dead[sites.rows])
        for name, parameter in parameters.items():
            if name not in weights:
                for dim, atoms in analysis.atoms[name].items():
                    parameter.index_fill_(dim, torch.from_numpy(np.flatnonzero(dead[atoms.numpy()])), 0.0)


def make_constant(analysis: Analysis, dead: np.ndarray) -> None:
    """Zero the rows of weights that make the dead atoms, and nothing else: what follows is constant, and not zero."""
    parameters = dict(analysis.module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for sites in analysis.sites:
            if sites.weight_name in parameters:
                _kill_rows(parameters[sites.weight_name], sites, analysis, dead[sites.rows])


def _kill_rows(weight: Tensor, sites: SiteAtoms, analysis: Analysis, rows: np.ndarray) -> None:
    site = sites.site
    if site.transposed and site.groups > 1:
        by_group = weight.view(site.groups, -1, *weight.shape[1:])
        for group, row in np.argwhere(rows.reshape(site.groups, -1)).tolist():
            by_group[group, :, row] = 0
        return
    dim, _ = sites.dims(analysis.atoms[sites.weight_name])
    weight.index_fill_(dim, torch.from_numpy(np.flatnonzero(rows)), 0.0)


def forced(analysis: Analysis, units: np.ndarray) -> Plan:
    """A plan that takes units out, dead or not."""
    return Plan(~atoms_of(analysis, units))


def tensors(tree: Any) -> Iterator[Tensor]:  # noqa: ANN401 - a tree of tensors
    """All tensors of nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from tensors(item)


def difference(a: Any, b: Any) -> float:  # noqa: ANN401 - trees of tensors
    """The largest difference between two outputs, relative to the largest entry of each tensor."""
    worst = 0.0
    left, right = list(tensors(a)), list(tensors(b))
    assert len(left) == len(right)
    for x, y in zip(left, right, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert torch.equal(x.isnan(), y.isnan())
        if x.numel():
            scale = float(x.detach().nan_to_num().abs().max())
            worst = max(worst, float((x - y).detach().nan_to_num().abs().max()) / max(scale, 1e-3))
    return worst


def outputs(net: nn.Module, inputs: tuple[Tensor, ...], *, training: bool = False, calls: int = 1) -> Any:  # noqa: ANN401
    """What a copy of a network returns for a copy of the inputs, the last time that it is called."""
    net = copy.deepcopy(net).train(training)
    with torch.no_grad():
        return [net(*(x.clone() for x in inputs)) for _ in range(calls)][-1]


def runs_on(net: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the original runs: images of another size need not fit together, nor may all memory be written to."""
    try:
        outputs(net, inputs)
    except RuntimeError:
        return False
    return True


class Fingerprint:
    """All of a network (and its optimizer) that a visitor could have changed."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.net = net
        self.optimizer = optimizer
        self.before = self._read()

    def _read(self) -> dict[str, Any]:
        net = self.net
        found: dict[str, Any] = {f"state {k}": _bytes(v) for k, v in net.state_dict().items()}
        found |= {f"grad {k}": None if p.grad is None else _bytes(p.grad) for k, p in net.named_parameters()}
        found |= {f"id {k}": (id(p), p._version, p.requires_grad) for k, p in net.named_parameters()}
        for name, module in net.named_modules():
            hooks = [list(v) for k, v in sorted(module.__dict__.items()) if k.endswith("_hooks") and v]
            plain = {k: v for k, v in module.__dict__.items() if isinstance(v, bool | int | float | str | tuple)}
            found[f"module {name}"] = (module.training, hooks, sorted(module.__dict__), repr(plain))
        if self.optimizer is not None:
            found["optimizer"] = repr(self.optimizer.state_dict())
            found["held"] = [[id(p) for p in g["params"]] for g in self.optimizer.param_groups]
        return found

    def check(self) -> None:
        """Fail when something has changed."""
        after = self._read()
        assert [k for k in after if after[k] != self.before.get(k)] == []
        assert after.keys() == self.before.keys()


def _bytes(tensor: Tensor) -> tuple[torch.Size, torch.dtype, bytes]:
    if tensor.is_meta:
        return tensor.shape, tensor.dtype, b""
    plain = tensor.detach().cpu()
    return plain.shape, plain.dtype, plain.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def compared_on(net: nn.Module, pruned: nn.Module, others: Iterable[Tensor]) -> int:
    """Compare two networks on each input that the first runs on, and the second does not refuse; on how many."""
    compared = 0
    for x in others:
        if runs_on(net, (x,)):
            try:
                found = outputs(pruned, (x,))
            except PathError:
                continue
            assert difference(outputs(net, (x,)), found) <= TOLERANCE
            compared += 1
    return compared
