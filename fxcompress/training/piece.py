"""A module that becomes a network in training, and stays what it is for the code around it.

The code around a piece may ask for its class, and may call its other methods. So the piece stays the same object, and
its class gets a subclass that is a :class:`CompressedModule` as well::

    Head                  class of the model     ->    (CompressedModule, Head)     forward: the graphs, with quantizers
    head.loss(y)          a method of it               head.loss(y)                 the same method
"""

from functools import partial
from typing import Any

from torch import fx, nn

from fxcompress.trace.model.state_dict_hooks import pass_on_hooks
from fxcompress.trace.pieces.graph_forward import install, own_class
from fxcompress.trace.traced import TracedModule
from fxcompress.training.compressed import CompressedModule, check_quantizers
from fxcompress.training.network import Settings


class _Boundary(nn.Module):
    """Ends the constructors of torch.fx, which would otherwise go on to that of the model's class."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def taken_name(module: nn.Module, surface: type[nn.Module]) -> str | None:
    """The first attribute of ``module`` that a network in training has under the same name, for something else.

    Args:
        module: that is to become a ``surface``, too.
        surface: a class whose public names count.
    """
    own = own_class(module)
    held = {*module._parameters, *module._buffers, *module._modules}
    if not issubclass(own, fx.GraphModule):  # whose methods are those that it keeps
        held |= {*vars(module), *dir(own)}
    names = {name for name in dir(surface) if not name.startswith("_")} | {"settings"}
    # Read at each call, as some libraries add methods to nn.Module.
    return min(held & names - set(dir(nn.Module)), default=None)


def become_compressed(module: nn.Module, traced: TracedModule, settings: Settings) -> CompressedModule:
    """Let ``module`` compute and train what ``traced`` does, in place; it takes over the tensors of that.

    Args:
        module: a piece; its children are replaced by those of ``traced``.
        traced: made from it, with quantizers.
        settings: of the network in training.

    Raises:
        UnsupportedModelError: there are no quantizers.
    """
    check_quantizers(traced)
    own = own_class(module)
    kind = piece_class(own)
    module.__dict__.clear()
    module.__class__ = type(kind.__new__(kind))  # torch.fx makes a class for the code of each instance
    assert isinstance(module, CompressedModule)
    TracedModule.__init__(module, traced, traced.graph, traced.train_graph, own.__name__)
    module.meta = dict(traced.meta)
    module.fxc_start(settings)
    return module


def piece_class(own: type[nn.Module]) -> Any:  # noqa: ANN401
    """The class of a piece that was of the class ``own``."""
    bases = (CompressedModule,) if issubclass(own, fx.GraphModule) else (CompressedModule, _Boundary, own)
    about = {
        "__module__": own.__module__,
        "__qualname__": own.__name__,
        "__doc__": own.__doc__,
        "fxc_own": own,
        "fxc_kind": classmethod(lambda _: partial(piece_class, own)),
    }
    return type(own.__name__, bases, about)


def become_plain(module: CompressedModule, final: TracedModule) -> None:
    """Let a piece be of its own class again, and compute what ``final`` does, in place.

    Args:
        module: that :func:`become_compressed` made.
        final: made from it by ``finalize``.
    """
    own: type[nn.Module] = module.fxc_own
    plain: nn.Module = module
    plain.__dict__.clear()
    plain.__class__ = own
    nn.Module.__init__(plain)
    plain.training = final.training
    pass_on_hooks(final, plain)
    install(plain, final)
