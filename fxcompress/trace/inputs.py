"""Example inputs: what the user gave, in one form, and a guess where nothing was given."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils.data import DataLoader

from fxcompress.errors import ExampleInputError
from fxcompress.provenance import Inputs
from fxcompress.trace.basics import trees

_LOG = logging.getLogger("fxcompress")
_SIZES = (224, 32, 28, 64, 8, 16, 96, 128, 256, 299, 300, 320, 384, 512, 48, 160, 192, 12, 14, 20, 24, 40, 100)
_LENGTHS = (1024, 128, 16000, 256, 64, 512, 2048, 4096, 8192, 32, 100, 1000, 16)
_CONVS: dict[type[nn.Module], int] = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip
_NORMS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}

_HINTS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.Module, ": the model is the first argument, what it is called with the second"),
    (np.ndarray, ": torch.from_numpy(array)"),
    (torch.Size, ": torch.zeros(shape), if floats of this shape are what the model takes"),
    (DataLoader, ": of one batch, what the model is called with, without targets"),
)


@dataclass(frozen=True)
class ExampleInputs:
    """Arguments that ``forward`` can be called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        inferred: nobody gave them; they were guessed from the first layer.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    inferred: bool = False

    @classmethod
    def of(cls, inputs: object) -> "ExampleInputs":
        """Read a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

        Raises:
            ExampleInputError: it is none of these.
        """
        if isinstance(inputs, ExampleInputs):
            return inputs
        if isinstance(inputs, torch.Tensor):
            return cls((inputs,))
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes | torch.Size):
            return cls(tuple(inputs))
        hint = next((hint for kinds, hint in _HINTS if isinstance(inputs, kinds)), "")
        raise ExampleInputError(
            f"example_inputs is a {type(inputs).__name__}; pass a tensor, a tuple of positional arguments, or a dict "
            f"of keyword arguments{hint}"
        )

    def converted(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "ExampleInputs":
        """The same with ``change`` applied to each tensor."""
        args, kwargs = trees.replace(change, [self.args, self.kwargs])
        return replace(self, args=args, kwargs=kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExampleInputs":
        # By clones: sparse tensors may have no memory that torch could copy.
        return self.converted(lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))

    def names(self, parameters: Sequence[str]) -> frozenset[str]:
        """Which of the ``parameters`` of forward, in their order, are given."""
        return frozenset(parameters[: len(self.args)]) | frozenset(self.kwargs)

    def bind(self, graph: fx.Graph) -> dict[str, Any]:
        """The value of each placeholder of ``graph``, by its target; ``*rest`` and ``**rest`` take what is left over.

        Raises:
            ExampleInputError: too few, too many or unknown arguments.
        """
        nodes = graph.find_nodes(op="placeholder")
        targets = [str(node.target) for node in nodes]
        rest = next((t for t in targets if t.startswith("*") and not t.startswith("**")), "")
        named = next((t for t in targets if t.startswith("**")), "")
        places = targets[: targets.index(rest)] if rest else [t for t in targets if t != named]
        if len(self.args) > len(places) and not rest:
            hint = ""
            if all(type(value) is int for value in self.args):
                hint = f": these are numbers; if they are a shape, pass torch.zeros{self.args}"
            elif len(self.args) == len(places) + 1:
                hint = ": leave out what the model is not called with, such as the targets of a batch"
            raise ExampleInputError(
                f"forward takes {len(places)} arguments ({', '.join(targets)}); {len(self.args)} given{hint}"
            )
        unknown = sorted(set(self.kwargs) - set(targets))
        if unknown and not named:
            raise ExampleInputError(f"forward has no argument {', '.join(unknown)}; it takes {', '.join(targets)}")
        values = dict(zip(places, self.args, strict=False))
        values |= {name: value for name, value in self.kwargs.items() if name not in unknown}
        values |= {rest: self.args[len(places) :]} if rest else {}
        values |= {named: {name: self.kwargs[name] for name in unknown}} if named else {}
        defaults = {str(n.target): n.args[0] for n in nodes if n.args}
        missing = [t for t in targets if t not in values and t not in defaults and not t.startswith("*")]
        if missing:
            raise ExampleInputError(
                f"example_inputs leaves out {', '.join(missing)}; forward takes {', '.join(targets)}"
            )
        return defaults | values

    def in_order(self, graph: fx.Graph) -> list[Any]:
        """The value of each placeholder of ``graph``, in their order, as :meth:`bind` finds it."""
        bound = self.bind(graph)
        return [bound[str(node.target)] for node in graph.find_nodes(op="placeholder")]

    def __str__(self) -> str:
        parts = [_show(v) for v in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs.items()]
        return ", ".join(parts) + (" (inferred)" if self.inferred else "")


def _show(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__


def recorded_inputs(recorded: Inputs, model: nn.Module) -> ExampleInputs:
    """Zeros of the shapes that a network was analysed on.

    Args:
        recorded: not empty.
        model: the inputs get its device and, where it has one dtype of floats, its dtype.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}

    def zeros(shape: tuple[int, ...], name: str) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, name)
        dtype = next(iter(own)) if dtype.is_floating_point and len(own) == 1 else dtype
        return torch.zeros(shape, dtype=dtype, device=device)

    positional = tuple(zeros(shape, dtype) for name, shape, dtype in recorded if not name)
    return ExampleInputs(positional, {name: zeros(shape, dtype) for name, shape, dtype in recorded if name})


def infer_inputs(model: nn.Module, works: Callable[[ExampleInputs], bool]) -> ExampleInputs:
    """The first guess on which ``works`` returns True.

    Args:
        model: its first layer with weights says which shapes are worth a try.
        works: whether the model runs on some inputs.

    Raises:
        ExampleInputError: several arguments are needed, or no guess works.
    """
    needed = _needed(model)
    hint = "pass example_inputs=(tensor, ...), what you would call the model with, for one small batch"
    if len(needed) != 1:
        raise ExampleInputError(
            f"{type(model).__name__}.forward takes {len(needed)} arguments without a default "
            f"({', '.join(needed) or 'none'}); inputs can be inferred for exactly one\n  {hint}"
        )
    tried = []
    for guess in _guesses(model):
        if works(guess):
            _LOG.warning("fxcompress: no example_inputs given; took %s", guess)
            return guess
        tried.append(str(guess).removesuffix(" (inferred)"))
    listing = "; ".join(tried[:6]) + (f"; and {len(tried) - 6} more" if len(tried) > 6 else "")
    raise ExampleInputError(
        f"cannot infer what {type(model).__name__} takes: "
        f"tried {listing or 'nothing, as it has no layer that says'}\n  {hint}"
    )


def _needed(model: nn.Module) -> list[str]:
    if isinstance(model, fx.GraphModule):
        return [str(n.target) for n in model.graph.find_nodes(op="placeholder") if not n.args]
    variadic = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def _guesses(model: nn.Module) -> Iterator[ExampleInputs]:
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros((), device="cpu"))
    for shape in _shapes(model):
        yield ExampleInputs((torch.zeros(shape, dtype=like.dtype, device=like.device),), inferred=True)
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if first is not None:
        yield ExampleInputs((torch.zeros(1, 16, dtype=torch.int64, device=like.device),), inferred=True)


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of batch 2 (batch norm cannot train on one value) that the first layers with weights allow."""
    seen = 0
    for module in model.modules():
        dims = next((d for kind, d in {**_CONVS, **_NORMS}.items() if isinstance(module, kind)), None)
        if dims is not None:
            channels = int(getattr(module, "in_channels", 0) or getattr(module, "num_features", 1))
            sizes = _LENGTHS if dims == 1 else _SIZES[1:10] if dims == 3 else _SIZES
            yield from ((2, channels, *[size] * dims) for size in sizes)
        elif isinstance(module, nn.Linear):
            yield from ((2, module.in_features), (2, 16, module.in_features))
        else:
            continue
        seen += 1
        if seen == 2:
            return
