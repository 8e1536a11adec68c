"""The list of weights that recurrent modules keep beside their parameters."""

import weakref

from torch import nn


def renew_weights(module: nn.Module) -> None:
    """Make the list agree with the parameters, where there is one; otherwise the module would do so in a call."""
    if not isinstance(module, nn.RNNBase):
        return
    weights = [module._parameters.get(name) for name in module._flat_weights_names]
    module.__dict__["_flat_weights"] = weights
    module.__dict__["_flat_weight_refs"] = [None if w is None else weakref.ref(w) for w in weights]
