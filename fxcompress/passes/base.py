"""What every pass has in common.

A pass is a frozen dataclass whose fields are its options. It is called with a GraphModule and returns a torch
``PassResult``, so it runs in torch's PassManager as well. Its contract:

* the module that it is given, its training flags and its hooks stay as they are; the result is another module;
* the graph of the result is ``lint()``-clean, and its code is that of the graph (it may be made at the first call);
* ``modified`` tells the truth, and a second run on the result changes nothing;
* a pass that fails raises, and has changed nothing.
"""

from abc import ABC, abstractmethod

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxcompress.trace.traced import TracedModule
from fxcompress.trace.tracer import trace

__all__ = ["Pass", "PassResult", "traced"]


class Pass(ABC):
    """The base class of passes; see the module's docstring for the contract."""

    __slots__ = ()

    @abstractmethod
    def __call__(self, module: fx.GraphModule) -> PassResult:
        """Run the pass."""


def traced(module: fx.GraphModule) -> TracedModule:
    """The module in the form that passes work on; one that is in it already is returned as it is."""
    return module if isinstance(module, TracedModule) else trace(module)
