"""Optimizer surgery: cut the state of any torch optimizer together with its parameters, while training goes on.

The paper (Csefalvay & Imber, arXiv 2301.13142) takes channels out during training, so the momenta of what is left must
survive. All changes are worked out before the first one is made: a refusal leaves the optimizer as it was.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, Optimizer

from fxcompress.errors import OptimizerError
from fxcompress.training.factored import rescale_factors
from fxcompress.training.held import check_own_tensors, with_held
from fxcompress.training.state_shapes import check_shapes, follows

__all__ = [
    "PreparedResize",
    "Replacement",
    "check_optimizer",
    "check_optimizers",
    "kept_entries",
    "prepare_resize",
]


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """One parameter and what takes its place.

    Attributes:
        old: the parameter that the optimizer holds.
        new: its replacement; None when the parameter is gone altogether.
        indices: for each cut dim the indices of ``old`` that stay, int64 (kept,), on any device.
    """

    old: nn.Parameter
    new: nn.Parameter | None
    indices: Mapping[int, Tensor] = field(default_factory=dict)


def kept_entries(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """A copy of the kept entries, laid out like ``tensor``, and in shared memory where that is.

    Args:
        tensor: of any shape.
        indices: for each dim to cut, the indices that stay, int64 (kept,).
    """
    result = tensor.clone()
    for dim, index in indices.items():
        result = result.index_select(dim, index.to(tensor.device))
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.ndim == rank and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout):
            result = result.contiguous(memory_format=layout)
            break
    else:
        result = result.contiguous() if result.layout == torch.strided else result
    if tensor.layout == torch.strided and tensor.is_cpu and tensor.is_shared():
        result.share_memory_()
    return result


def check_optimizer(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Check that the optimizer holds nothing but ``parameters``, the network's. It need not hold all of them.

    Raises:
        TypeError: it is no optimizer.
        OptimizerError: it holds others, as it does when it was built from the network before that was compressed; or
            it spreads its state over processes.

    >>> net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> check_optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net.parameters())
    >>> check_optimizer(torch.optim.SGD(other.parameters(), lr=0.1), net.parameters())
    Traceback (most recent call last):
    ...
    fxcompress.errors.OptimizerError: the optimizer holds 2 parameters that are not the network's, the first of shape \
(2, 2) in param_groups[0]; build the optimizer from the parameters of the network that is pruned, after compress()
    """
    _check_kind(optimizer)
    if isinstance(getattr(optimizer, "optim", None), Optimizer):  # ZeroRedundancyOptimizer, and those built like it
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps parameters and state in an optimizer of its own (optimizer.optim), "
            "perhaps a part of them in each process, which cannot be cut; use that kind of optimizer directly"
        )
    known = {id(parameter) for parameter in parameters}
    held = [(number, held) for number, group in enumerate(optimizer.param_groups) for held in group["params"]]
    strangers = [(number, parameter) for number, parameter in held if id(parameter) not in known]
    if strangers:
        number, first = strangers[0]
        some = "1 parameter that is" if len(strangers) == 1 else f"{len(strangers)} parameters that are"
        raise OptimizerError(
            f"the optimizer holds {some} not the network's, the first of shape {tuple(first.shape)} in "
            f"param_groups[{number}]; build the optimizer from the parameters of the network that is pruned, after "
            "compress()"
        )


def check_optimizers(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Check each as :func:`check_optimizer` does. One may train something else along with the network, all of it.

    That is: where no parameter of the network that requires a gradient is missing from all of them, those that hold
    some may hold others too, such as those of a second network or of a loss. An optimizer that was built from the
    network as it was before it was compressed, or cut, misses some.

    Raises:
        TypeError, OptimizerError: as :func:`check_optimizer`.
    """
    known, each = {id(parameter): parameter for parameter in parameters}, list(optimizers)
    for optimizer in each:
        _check_kind(optimizer)
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in each]
    missing = {key for key, parameter in known.items() if parameter.requires_grad}.difference(*held)
    for optimizer, own in zip(each, held, strict=True):
        joint = not missing and own & known.keys()
        others = [p for group in optimizer.param_groups for p in group["params"]] if joint else []
        check_optimizer(optimizer, [*known.values(), *others])


def _check_kind(optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        hint = "; pass the one that it holds as .optimizer" if isinstance(inner, Optimizer) else ""
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}{hint}")


@dataclass(frozen=True, slots=True, eq=False)
class PreparedResize:
    """A change to an optimizer that has been worked out in full, and not yet made. ``commit`` cannot fail."""

    optimizer: Optimizer
    _groups: tuple[dict[str, list[Any]], ...]
    _state: dict[Any, Any]
    _held: "tuple[PreparedResize, ...]" = ()

    def commit(self) -> None:
        """Make the change, in the optimizer's own dicts and lists, which schedulers and others hold on to."""
        for held in self._held:
            held.commit()
        for group, lists in zip(self.optimizer.param_groups, self._groups, strict=True):
            for key, values in lists.items():
                group[key][:] = values
        self.optimizer.state.clear()
        self.optimizer.state.update(self._state)


def prepare_resize(optimizer: Optimizer, replacements: Iterable[Replacement]) -> PreparedResize:
    """Work out how to put new parameters in the place of old ones, and the optimizer's state cut to their shapes.

    State tensors shaped like their parameter, or like it with some dims at size 1, keep the same indices as the
    parameter; Adafactor's factors are scaled as well (:mod:`fxcompress.training.factored`). Scalars, step counts and
    everything else that is no tensor move along as they are, and containers are searched. So does the state of an
    optimizer that this one holds, as SAM and Lookahead do. Groups, also those left empty, hyperparameters and hooks
    stay, so schedulers and gradient scalers go on. Parameters that the optimizer does not hold are passed over.

        param_groups[0]["params"] = [conv.weight (8, 3, 3, 3)]               [conv.weight (7, 3, 3, 3)]
        state[conv.weight] = {step: 10, exp_avg: (8, 3, 3, 3), ...}    ->    {step: 10, exp_avg: (7, 3, 3, 3), ...}

    Args:
        optimizer: any torch optimizer whose state belongs to one parameter each; not LBFGS once it has made a step.
        replacements: one for each changed parameter.

    Returns:
        the change, which is yet to be made.

    Raises:
        OptimizerError: some state cannot be cut, a new parameter has not the shape that its indices ask for, or a
            parameter is replaced twice.

    >>> net = nn.Linear(2, 3)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    >>> net(torch.ones(1, 2)).sum().backward(); optimizer.step()
    >>> change = Replacement(net.weight, nn.Parameter(net.weight[[0, 2]].detach()), {0: torch.tensor([0, 2])})
    >>> prepare_resize(optimizer, [change]).commit()
    >>> optimizer.state[change.new]["momentum_buffer"].shape
    torch.Size([2, 2])
    """
    of = _by_parameter(replacements)
    outer, *held = (_prepare(one, of) for one in with_held(optimizer))
    return replace(outer, _held=tuple(held))


def _prepare(optimizer: Optimizer, of: Mapping[Any, Replacement]) -> PreparedResize:
    _refuse_lbfgs(optimizer, of)
    check_own_tensors(optimizer, list(of))
    cut = [parameter for parameter, change in of.items() if change.new is not None and change.indices]
    check_shapes(optimizer, cut, _REMEDY)
    state: dict[Any, Any] = {}
    for key, value in optimizer.state.items():
        change = of.get(key)
        if change is None:
            state[key] = value
        elif change.new is not None:
            cut = state[change.new] = _cut_state(value, change, type(optimizer).__name__, "state")
            if isinstance(optimizer, Adafactor):
                rescale_factors(value, cut, change.indices)
    return PreparedResize(optimizer, tuple(_cut_group(group, of) for group in optimizer.param_groups), state)


def _by_parameter(replacements: Iterable[Replacement]) -> dict[Any, Replacement]:
    of: dict[Any, Replacement] = {}
    for change in replacements:
        old, new = change.old, change.new
        if old in of:
            raise OptimizerError(f"a parameter of shape {tuple(old.shape)} is replaced twice; replace it once")
        expected = tuple(len(change.indices.get(dim, range(size))) for dim, size in enumerate(old.shape))
        if new is not None and tuple(new.shape) != expected:
            raise OptimizerError(
                f"a parameter of shape {tuple(old.shape)} is replaced by one of shape {tuple(new.shape)}, but its "
                f"indices keep {expected}"
            )
        of[old] = change
    return of


def _refuse_lbfgs(optimizer: Optimizer, of: Mapping[Any, Replacement]) -> None:
    # All parameters' history lies in flat vectors in the state of the first one, which may itself not be cut.
    held = any(parameter in of for group in optimizer.param_groups for parameter in group["params"])
    if isinstance(optimizer, LBFGS) and optimizer.state and held:
        raise OptimizerError(
            "LBFGS keeps one flat history for all parameters, which cannot be cut; prune before its first step, or "
            "build a new LBFGS after pruning"
        )


def _cut_group(group: Mapping[str, Any], of: Mapping[Any, Replacement]) -> dict[str, list[Any]]:
    """The new content of the group's lists: its parameters, and their names where the optimizer was given names."""
    params = [of[parameter].new if parameter in of else parameter for parameter in group["params"]]
    lists = {key: group[key] for key in ("param_names",) if key in group} | {"params": params}
    return {key: [v for v, new in zip(values, params, strict=True) if new is not None] for key, values in lists.items()}


def _cut_state(value: Any, change: Replacement, optimizer: str, path: str) -> Any:  # noqa: ANN401
    if isinstance(value, Tensor):
        return _cut_tensor(value, change, optimizer, path)
    if isinstance(value, dict):
        return {key: _cut_state(item, change, optimizer, f"{path}[{key!r}]") for key, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(_cut_state(item, change, optimizer, f"{path}[{n}]") for n, item in enumerate(value))
    if any(isinstance(item, Tensor) for item in _contents(value)):
        raise OptimizerError(
            f"cannot cut the state of {optimizer}: {path} is a {type(value).__name__} that holds tensors, and what "
            f"they mean is unknown; {_REMEDY}"
        )
    return value


def _contents(value: object) -> Iterator[object]:
    if isinstance(value, Collection) and not isinstance(value, str | bytes):
        yield from value
    yield from getattr(value, "__dict__", {}).values()


def _cut_tensor(tensor: Tensor, change: Replacement, optimizer: str, path: str) -> Tensor:
    shape, of_parameter = tuple(tensor.shape), tuple(change.old.shape)
    if follows(tensor, change.old):
        cut = {dim: index for dim, index in change.indices.items() if shape[dim] == of_parameter[dim]}
        return _cut_values(tensor, cut, optimizer, path)
    if tensor.numel() == 1:
        return tensor
    raise OptimizerError(
        f"cannot cut the state of {optimizer}: {path} has shape {shape}, which does not follow from the shape "
        f"{of_parameter} of its parameter; {_REMEDY}"
    )


def _cut_values(tensor: Tensor, indices: Mapping[int, Tensor], optimizer: str, path: str) -> Tensor:
    try:
        return kept_entries(tensor, indices)
    except (RuntimeError, TypeError) as error:  # tensor subclasses, such as those of 8-bit optimizers
        raise OptimizerError(
            f"cannot cut the state of {optimizer}: {path} is a {type(tensor).__name__} that cannot be indexed "
            f"({error}); {_REMEDY}"
        ) from error


_REMEDY = "prune before the first step, use another optimizer, or build a new one after pruning"
