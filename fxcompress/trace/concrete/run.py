"""Tracing by running: for models that symbolic tracing cannot do.

The model runs once, on fake tensors (with shapes, without values), and every torch function and leaf module that it
calls is written down. Python sees real shapes, so loops over sizes, branches on shapes and containers of any kind work.
What makes it safe on other inputs is that sizes are numbers of our own (sizes.py): arithmetic on them becomes part of
the graph, and each decision on them becomes a check in it (graph/guards.py).
"""

import inspect
import operator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from fxcompress.errors import ExampleInputError, TraceError
from fxcompress.trace.basics.precision import AS_IT_IS, Precision
from fxcompress.trace.basics.trees import replace
from fxcompress.trace.code.locations import place_of
from fxcompress.trace.concrete.arguments import Arguments
from fxcompress.trace.concrete.asserts import drop_conditions
from fxcompress.trace.concrete.cached_calls import without_caches
from fxcompress.trace.concrete.fake_tensors import Fakes, quiet
from fxcompress.trace.concrete.intercept import IsLeaf, watch
from fxcompress.trace.concrete.recorder import Recorder
from fxcompress.trace.concrete.replaced_buffers import ReplacedBuffers
from fxcompress.trace.concrete.size_tables import are_tables
from fxcompress.trace.concrete.writer import Writer
from fxcompress.trace.effects.attributes import AllAttributes, PlainAttributes, carried_over, refuse_layers_set, unset
from fxcompress.trace.effects.randomness import same_randomness
from fxcompress.trace.forward_hooks import TABLES
from fxcompress.trace.graph.objects import objects_in
from fxcompress.trace.graph.same_graph import same_graph
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.flat_weights import renew_weights
from fxcompress.trace.model.mode_switches import switches
from fxcompress.trace.model.skeleton import leaf_of, own_buffers, skeleton
from fxcompress.trace.model.uncompiled import uncompiled
from fxcompress.trace.traced import lint


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a model runs to be traced.

    Attributes:
        training: the mode to run in.
        is_leaf: which modules become one node.
        keep_sizes: see :class:`fxcompress.trace.concrete.recorder.Recorder`.
        open_wrapped: look into functions marked by torch.fx.wrap.
        gradients: whether all parameters require gradients, or none; None leaves them as they are.
        precision: to run in.
    """

    training: bool
    is_leaf: IsLeaf
    keep_sizes: bool
    open_wrapped: bool = False
    gradients: bool | None = None
    precision: Precision = AS_IT_IS


def run_model(
    root: nn.Module, inputs: ExampleInputs, settings: RunSettings, readers: set[int], kept: set[str]
) -> fx.Graph:
    """The graph that running ``root`` on the inputs leaves. ``root`` itself does not run: a copy on fake tensors does.

    Args:
        root: a skeleton of the model; tensors that are neither inputs nor attributes become attributes of it.
        inputs: only their shapes and types count.
        settings: how it runs.
        readers: ids of the modules of ``root`` whose code reads ``self.training`` are added.
        kept: filled with the attributes that the run sets; those that it seems to set before it reads them.

    Raises:
        TraceError: the run fails, or does what no graph can do.
    """
    new = partial(_Run, root, settings, readers)
    inputs = inputs.converted(leaf_of).converted(settings.precision.cast)
    run = new()
    changed = _go(run, inputs)
    if changed:
        # What a run sets before it reads it is nothing but a scratch pad. So: does it run without the old values?
        again = new(before_set=changed)
        try:
            more = _go(again, inputs)
            if more - changed:
                raise carried_over(min(more - changed))
        except TraceError as error:
            rest = changed - _caches(run, new(), changed, inputs)
            if not rest or are_tables(rest, run.model, run.writer):
                kept |= changed
            elif not (_is_settled(run, changed) and _repeats(run, new(), inputs)):
                raise carried_over(min(changed)) from error
            else:
                kept |= {name for name in changed if type(run.attribute(name)) in _REFILLED}
        else:
            run = again
            kept |= changed
    kept |= run.kept
    lint(run.writer.graph)
    return run.writer.graph


def _caches(run: "_Run", second: "_Run", changed: frozenset[str], inputs: ExampleInputs) -> frozenset[str]:
    """The dicts among what a run has set that get no more entries in the runs that follow."""
    held = {name: value for name in changed if type(value := run.attribute(name)) is dict}
    lengths = []
    for _ in range(2 if held else 0):
        if second.fails(inputs) is not None:
            return frozenset()
        lengths.append({name: len(second.attribute(name) or ()) for name in held})
    return frozenset(name for name, value in held.items() if all(found[name] == len(value) for found in lengths))


def _is_settled(run: "_Run", changed: frozenset[str]) -> bool:
    """Whether all that a run has set are flags and the like, forward hooks, and what each run may empty and fill.

    Then the next one may set nothing.
    """
    plain = _REFILLED | {bool, int, str, type(None)}  # a size has a type of its own
    return all(name.rpartition(".")[2] in TABLES or type(run.attribute(name)) in plain for name in changed)


_REFILLED = frozenset({list, dict})
"""Classes of what a run may leave as full as it finds it, with other tensors in it: features that hooks collect."""


def _repeats(run: "_Run", second: "_Run", inputs: ExampleInputs) -> bool:
    """Whether a run that follows another one sets nothing, and leaves the graph that the first one has left."""
    if second.fails(inputs) is not None:
        return False
    try:
        return not _go(second, inputs) and same_graph(run.writer.graph, second.writer.graph)
    except TraceError:
        return False


@uncompiled()
def check_runs(root: nn.Module, inputs: ExampleInputs) -> None:
    """Raise when the model does not run on the inputs at all, so that tracing is not to blame.

    Some ops take less on fake tensors than on others, so what counts in the end is a run on the inputs themselves.

    Raises:
        ExampleInputError: saying how it fails.
    """
    error = _Run(root, RunSettings(False, lambda *_: True, keep_sizes=False), set()).fails(inputs)
    if error is not None and not runs(root, inputs):
        raise ExampleInputError(
            f"the model does not run on the example inputs {inputs}: {type(error).__name__}: {error}{place_of(error)}"
        ) from error


@uncompiled()
def runs(root: nn.Module, inputs: ExampleInputs, *, training: bool = False) -> bool:
    """Whether a copy of the model runs on the values of the inputs, with gradients at least."""
    for gradients in (False, True):
        given = inputs.converted(lambda tensor: tensor.detach().clone())
        with suppress(Exception), torch.set_grad_enabled(gradients), same_randomness(allowed=True):
            own_buffers(root).train(training)(*given.args, **given.kwargs)
            return True
    return False


def _go(run: "_Run", inputs: ExampleInputs) -> frozenset[str]:
    """Run; which attributes have been set."""
    before = set(run.readers)
    try:
        return run.go(inputs)
    except TraceError:
        raise
    except Exception as error:
        failed = TraceError(f"it fails with {type(error).__name__}: {error}{place_of(error)}")
        raise run.recorder.refusal or failed from error
    finally:
        own = run.readers - before
        run.readers -= own
        run.readers |= {id(run.root.get_submodule(p)) for p, m in run.model.named_modules() if id(m) in own}


class _Run:
    """One run of a model."""

    def __init__(
        self, root: nn.Module, settings: RunSettings, readers: set[int], before_set: frozenset[str] = frozenset()
    ) -> None:
        self.root, self.settings, self.readers = root, settings, readers
        self.kept: set[str] = set()
        self.model = skeleton(root).train(settings.training)
        self.writer = Writer(self._constant)
        with settings.precision.around():
            self.recorder = Recorder(self.writer, keep_sizes=settings.keep_sizes)
        self.fakes = Fakes(self.recorder)
        self._known: dict[int, Tensor] = {}
        with self.recorder.pause():
            self._fake_the_tensors()
        unset(self.model, before_set)

    def attribute(self, name: str) -> Any:  # noqa: ANN401 - whatever a module has
        """What a plain attribute of a module is now; None where there is none."""
        path, _, key = name.rpartition(".")
        return vars(self.model.get_submodule(path)).get(key)

    def go(self, inputs: ExampleInputs) -> frozenset[str]:
        """Write the graph; names of the attributes that the run has set."""
        settings = self.settings
        with quiet(), self.fakes, torch.enable_grad(), settings.precision.around():
            signature = inspect.signature(self.model.forward)
            with self.recorder.pause():
                fakes = replace(self.fakes.from_tensor, (inputs.args, inputs.kwargs))
            given = Arguments(signature, ExampleInputs(*fakes), self.writer, self.recorder)
            attributes, plain, buffers = (
                AllAttributes(self.model),
                PlainAttributes(self.model),
                ReplacedBuffers(self.model),
            )
            held = objects_in([*given.args, given.kwargs, *(vars(module) for module in self.model.modules())])
            watched = watch(
                self.recorder, self.model, settings.is_leaf, self.readers,
                open_wrapped=settings.open_wrapped, originals=self._known,
            )  # fmt: skip
            with watched, switches().run(training=settings.training):
                result = self.model(*given.args, **given.kwargs)
            buffers.write(self.writer, [fakes, result])
            changed, contents = attributes.changed(), plain.changed()
            self.kept |= contents.keys() - changed  # the contents of lists, dicts and objects
            refuse_layers_set(contents, self.writer.graph)
            if self.recorder.refusal is not None:  # the model has caught it, and gone another way
                raise self.recorder.refusal
            self.writer.graph.output(self.writer.result_of(result, held))
            drop_conditions(self.writer.conditions)
            self.writer.closed = True
        _tidy(self.writer.graph)
        return changed

    def fails(self, inputs: ExampleInputs) -> Exception | None:
        """The error that the model ends in on these inputs when nobody watches; None where it runs, or needs values."""
        try:
            with (
                quiet(), self.fakes, self.recorder.pause(), same_randomness(allowed=True), without_caches(),
                self.settings.precision.around(),
            ):  # fmt: skip
                args, kwargs = replace(self.fakes.from_tensor, (inputs.args, inputs.kwargs))
                self.model(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            return None
        except Exception as error:  # noqa: BLE001 - any failure is what was asked for
            return error
        return None

    def _fake_the_tensors(self) -> None:
        """Put fake tensors in place of all that hang on the modules, and tell the writer their names."""
        for path, module in self.model.named_modules():
            prefix = f"{path}." if path else ""
            for table in (module._parameters, module._buffers, module.__dict__):
                for name, tensor in table.items():
                    if isinstance(tensor, Tensor):
                        table[name] = self._fake_of(tensor, cast=table is not module.__dict__)
                        self.writer.name(table[name], f"{prefix}{name}")
                        if self.settings.gradients is not None and isinstance(tensor, nn.Parameter):
                            table[name].requires_grad_(self.settings.gradients and tensor.is_floating_point())
            renew_weights(module)

    def _fake_of(self, tensor: Tensor, *, cast: bool) -> Tensor:
        """The fake of a tensor: the same one each time, as a tensor may have several names."""
        if id(tensor) not in self._known:
            fake = self.fakes.from_tensor(leaf_of(tensor))
            with self.fakes:
                self._known[id(tensor)] = self.settings.precision.cast(fake) if cast else fake
        return self._known[id(tensor)]

    def _constant(self, tensor: Tensor) -> str:
        """Keep a tensor on the root, under a name of its own."""
        taken = self.root.__dict__
        known = next((n for n, t in taken.items() if t is tensor), None)
        name = known or next(n for i in range(len(taken) + 1) if not hasattr(self.root, n := f"_tensor_constant{i}"))
        taken[name] = tensor
        return name


def _tidy(graph: fx.Graph) -> None:
    """Erase reads of shapes and items that nothing uses."""
    for node in reversed(graph.nodes):
        if not node.users and node.op == "call_function" and node.target in {getattr, operator.getitem}:
            graph.erase_node(node)
