"""What a batch is: what the network is called with, and what the loss compares its output with."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.data import Dataset

from fxcompress.trace.basics.trees import replace

_FORMS = (
    "a batch must be (input, ..., target), or a dict with the arguments of forward by their names and what the loss "
    "needs besides, such as {'pixel_values': ..., 'labels': ...}"
)

NO_BATCH = (
    "the loader gave no batch, although it has a length: can it be gone through only once? "
    "Pass a DataLoader or a list, which can be gone through in each epoch"
)

_MORE = (
    "what else it needs goes into the target: of a batch (input, (labels, weights)) it gets (labels, weights), of a "
    "batch that is a dict all that forward does not take, as a dict"
)
_TAUGHT = (
    "write what is to be done with the teacher's answer: loss_fn=lambda output, target, answer: "
    "F.cross_entropy(output, target) + F.kl_div(output.log_softmax(1), answer.softmax(1), reduction='batchmean')"
)
_OPTIONS = frozenset({"weight", "size_average", "reduce", "reduction", "margin", "log_input"})
"""Third arguments of torch's own losses, none of which is the answer of a teacher."""
_BY_PLACE = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, taken apart.

    Attributes:
        args: positional arguments of the network.
        kwargs: keyword arguments of the network.
        target: the second argument of the loss.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any

    @classmethod
    def of(cls, batch: object, names: frozenset[str]) -> "Batch":
        """Take a batch apart.

        The last item of a tuple or list is the target, all others are arguments. Of a dict, the entries that forward
        has a name for are its arguments; the target is what is left: one entry as it is, several as a dict. Where
        forward takes them all, as models of Hugging Face take their labels, the target is the whole batch.

        Args:
            batch: from a loader.
            names: of the arguments of forward.

        Raises:
            TypeError: it is something else.
            ValueError: forward takes nothing of it.

        >>> Batch.of({"pixels": 1, "labels": 2}, frozenset({"pixels"}))
        Batch(args=(), kwargs={'pixels': 1}, target=2)
        """
        if isinstance(batch, Mapping):
            kwargs = {key: value for key, value in batch.items() if key in names}
            rest = {key: value for key, value in batch.items() if key not in names} or dict(batch)
            if not kwargs:
                raise ValueError(
                    f"the batch is a dict of {_listed(batch)}, and forward takes {_listed(names)}: name the entries "
                    "that the network is to get as forward names them"
                )
            return cls((), kwargs, rest if len(rest) > 1 else next(iter(rest.values())))
        if not isinstance(batch, tuple | list):
            raise TypeError(f"{_FORMS}; got a {type(batch).__name__}")
        if len(batch) < 2:
            raise TypeError(f"{_FORMS}; got a {type(batch).__name__} of length {len(batch)}")
        return cls(tuple(batch[:-1]), {}, batch[-1])

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*replace(lambda t: t.to(device, non_blocking=True), [self.args, self.kwargs, self.target]))

    def first(self, samples: int) -> tuple[Any, ...] | dict[str, Any]:
        """The arguments with the first samples alone, as example inputs."""
        args, kwargs = replace(lambda t: t[:samples] if t.ndim else t, [self.args, self.kwargs])
        inputs: tuple[Any, ...] | dict[str, Any] = kwargs or args
        return inputs


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing by name"


def argument_names(module: nn.Module) -> frozenset[str]:
    """The names that a module's forward gives to its arguments."""
    if isinstance(module, fx.GraphModule):
        targets = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
        return frozenset(name for name in targets if not name.startswith("*"))
    variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return frozenset(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind not in variadic)


def count_batches(loader: Iterable[Any]) -> int:
    """The number of batches of a loader.

    Raises:
        TypeError: it does not say, can be gone through only once, or is a dataset, which gives samples.
        ValueError: there are none.
    """
    remedy = "pass a DataLoader of a dataset that has a length, or a list of batches"
    if isinstance(loader, Iterator):
        raise TypeError(f"{type(loader).__name__} can be gone through only once, and each epoch does; {remedy}")
    if not isinstance(loader, Sized):
        raise TypeError(f"{type(loader).__name__} has no length; {remedy}")
    if isinstance(loader, Dataset):
        raise TypeError(
            f"{type(loader).__name__} is a dataset, whose items are samples; pass DataLoader(dataset, batch_size=...), "
            "or with batch_size=None if its items are batches"
        )
    try:
        count = len(loader)
    except TypeError as error:  # a DataLoader of a stream
        raise TypeError(f"the {type(loader).__name__} has no length ({error}); {remedy}") from error
    if count == 0:
        raise ValueError("the loader is empty: it has no batches (drop_last=True leaves none of a small dataset)")
    return count


def first_batch(loader: Iterable[Any]) -> Any:  # noqa: ANN401 - whatever the user's loader gives
    """The first batch of a loader.

    Raises:
        ValueError: there is none.
    """
    for batch in loader:
        return batch
    raise ValueError(NO_BATCH)


def check_loss(loss: Callable[..., Any], *, taught: bool = False) -> None:
    """Check that a loss can be called with (output, target), or (output, target, answer) where there is a teacher.

    Raises:
        TypeError: it cannot, or takes the teacher's answer for an option of its own.
    """
    if not taught:
        check_callable("loss_fn", loss, ("output", "target"), _MORE)
        return
    check_callable("loss_fn", loss, ("output", "target", "answer"), _TAUGHT)
    third = _third(loss)
    if third in _OPTIONS:
        raise TypeError(
            "loss_fn is called as loss_fn(output, target, answer), as there is a teacher, and would take the answer "
            f"for its {third}=\n  {_TAUGHT}"
        )


def _third(loss: Callable[..., Any]) -> str:
    """The name of what a loss calls its third argument; none where its code is not Python."""
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):
        return ""
    names = [p.name for p in signature.parameters.values() if p.kind in _BY_PLACE]
    return names[2] if len(names) > 2 else ""


def check_callable(name: str, function: object, arguments: tuple[str, ...], remedy: str) -> None:
    """Check that a function of the user's can be called as it will be, before the first step is made.

    Args:
        name: of the argument that it was passed as.
        function: the same.
        arguments: what it will be called with.
        remedy: what to do where it takes something else.

    Raises:
        TypeError: it cannot.
    """
    listed = f"({', '.join(arguments)})"
    if isinstance(function, type) and issubclass(function, nn.Module):
        raise TypeError(f"{name} is the class {function.__name__}; pass an object of it: {function.__name__}()")
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no function, or one that is not written in Python
        if callable(function):
            return
        raise TypeError(f"{name} is a {type(function).__name__}; it must be a function of {listed}") from None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"{name} is called as {name}{listed}, which its signature {signature} does not allow: {error}\n  {remedy}"
        ) from error


def scalar_loss(loss: object) -> Tensor:
    """What a loss has returned, if one can train on it.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has several entries, or no gradient.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned a {type(loss).__name__}; it must return a tensor with one entry")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn returned shape {tuple(loss.shape)}; it must return one number, such as the mean")
    if not loss.requires_grad:
        raise ValueError(
            f"loss_fn returned {loss.item():.4g} without a gradient, so nothing would be learnt: it must be computed "
            "from the output by what has gradients (no detach(), item(), argmax() or rounding)"
        )
    return loss
