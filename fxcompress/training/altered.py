"""What somebody has hung on a network since it was compressed: hooks, and parametrizations.

Forward hooks that only look (at activations, to log them) are as good here as anywhere, and stay with their modules
when channels go. No graph shows what hooks do, so one that changes what its module gets or returns is refused.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxcompress.errors import UnsupportedModelError
from fxcompress.quantizer import Quantizer
from fxcompress.trace.basics.generators import generators_kept
from fxcompress.trace.basics.trees import tensors_in
from fxcompress.trace.forward_hooks import FORWARD, TABLES
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.traced import TracedModule

_ASKED = "_fxc_asked"
_BACKWARD = frozenset({"_backward_hooks", "_backward_pre_hooks"})


@contextmanager
def unhooked(*nets: nn.Module) -> Iterator[None]:
    """Within, no module has forward or backward hooks: the caller's are neither called with labels nor copied."""
    modules = [module for net in nets for module in net.modules()]
    held = [(m, name, table) for m in modules for name in TABLES | _BACKWARD if (table := m.__dict__.get(name))]
    for module, name, table in held:
        module.__dict__[name] = type(table)()
    try:
        yield
    finally:
        for module, name, table in held:
            module.__dict__[name] = table


def check_hooks(net: TracedModule, inputs: ExampleInputs, *, root: bool) -> None:
    """Check that no forward hook changes what its module gets or returns. Each is asked once, on the inputs.

    Args:
        net: the network.
        inputs: that it runs on.
        root: whether those of the network itself count, which are called around all of its graph.

    Raises:
        UnsupportedModelError: one does.
    """
    asked: set[int] = net.__dict__.setdefault(_ASKED, set())
    new = [item for item in _hooks(net) if item[2] not in asked and (root or item[0])]
    if not new:
        return
    with unhooked(net):
        view = skeleton(net).eval()
    found: list[str] = []
    for name, table, key, hook in new:
        module = view.get_submodule(name)
        getattr(module, table)[key] = _watching(hook, net.get_submodule(name), f"module {name or '<root>'!r}", found)
        for flags in (t for t in TABLES - set(FORWARD) if key in net.get_submodule(name).__dict__[t]):
            getattr(module, flags)[key] = True
    for module in view.modules():
        module._buffers = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    own = inputs.converted(torch.clone)
    with torch.no_grad(), generators_kept():
        view(*own.args, **own.kwargs)
    if found:
        raise UnsupportedModelError(
            f"{found[0]}, which no graph shows: it could not be proved what may be removed, and finalize() would leave "
            "it out\n  remove the hook, or write what it does into the model before compress(); hooks that only look "
            "are fine"
        )
    asked.update(key for _, _, key, _ in new)


def _hooks(net: nn.Module) -> Iterator[tuple[str, str, int, Callable[..., Any]]]:
    """The forward hooks of all modules: the path of the module, the table, the key in it and the hook."""
    for name, module in net.named_modules():
        for table in FORWARD:
            for key, hook in module.__dict__[table].items():
                yield name, table, key, hook


def _watching(hook: Callable[..., Any], of: nn.Module, where: str, found: list[str]) -> Callable[..., Any]:
    """A hook that does what another does, for the module that this one is of, and notes whether it changes anything."""

    def watching(_: nn.Module, *given: Any) -> Any:  # noqa: ANN401 - whatever a module gets and returns
        before = [(tensor, tensor._version) for tensor in tensors_in(given)]  # noqa: SLF001
        result = hook(of, *given)
        written = any(tensor._version != version for tensor, version in before)  # noqa: SLF001
        if written or (result is not None and not _is_among(result, given)):
            label = getattr(hook, "__qualname__", type(hook).__name__)
            found.append(f"{where} ({type(of).__name__}): its forward hook ({label}) changes what it gets or returns")
        return result

    return watching


def _is_among(result: object, given: object) -> bool:
    """Whether a hook returns what it was given, all tensors of it being the same ones."""
    known, own = {id(tensor) for tensor in tensors_in(given)}, [id(tensor) for tensor in tensors_in(result)]
    return bool(own) and known.issuperset(own)


def check_layers(net: TracedModule) -> None:
    """Check that the modules that the graphs call are there: somebody may have put another layer in place of one.

    Raises:
        UnsupportedModelError: one is not; it says where it should be.
    """
    modules = {name for name, _ in net.named_modules(remove_duplicate=False)}
    called = (str(node.target) for graph in net.graphs.values() for node in graph.find_nodes(op="call_module"))
    missing = next((name for name in called if name not in modules), None)
    if missing is not None:
        layer = missing.rpartition(".")[0]
        raise UnsupportedModelError(
            f"module {layer or '<root>'!r} is not what it was when the network was compressed: the graph calls "
            f"{missing}, which it has no more\n"
            "  put another layer, or an adapter, in before compress(), or into what finalize() returns"
        )


def check_parameters(net: nn.Module, quantizers: Iterable[str]) -> None:
    """Check that nothing computes a parameter that was one when the network was compressed.

    Args:
        net: the network.
        quantizers: paths of its quantizers, each named after its weight.

    Raises:
        UnsupportedModelError: something does; it says what.
    """
    for path in quantizers:
        owner, _, leaf = path.removesuffix("_quantizer").rpartition(".")
        if leaf not in net.get_submodule(owner)._parameters:
            _refuse(net, owner, leaf)
    for name, module in net.named_modules():
        if not isinstance(module, Quantizer) and parametrize.is_parametrized(module):
            _refuse(net, name, next(iter(module.parametrizations)))


def _refuse(net: nn.Module, name: str, leaf: str) -> None:
    raise UnsupportedModelError(
        f"module {name or '<root>'!r} ({type(net.get_submodule(name)).__name__}): since compress() something "
        f"computes its {leaf} (a parametrization, weight norm, spectral norm or a mask of torch.nn.utils), so it is no "
        "parameter any more that channels can be taken from\n"
        "  undo that; weight norm can be put on the model before compress()"
    )
