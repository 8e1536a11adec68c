"""What a node did to labels, to be undone where its result is not what it should be."""

from fxcompress.channels.dispatch import Dispatch
from fxcompress.channels.values import LabelTensor, find


class Attempt:
    """Remembers how things were before a node ran: the tape, what was coupled, and what tensors held.

    An op that writes in place, ``h[:, [0, 5]] = x``, may have put other labels into its argument, and into whatever
    shares memory with it, before anybody sees that its result is wrong.

    Args:
        dispatch: runs the node.
        given: its arguments, as trees.
    """

    def __init__(self, dispatch: Dispatch, given: object) -> None:
        space = dispatch.space
        logs = (dispatch.tape, space.edges, space.slots)
        self._marks = [(log, len(log)) for log in logs]
        self.start = len(dispatch.tape)
        self._held = [
            (each, each.fxc_value, each.fxc_extent)
            for tensor in find(LabelTensor, given)
            for each in (tensor, *tensor.fxc_storage.others(tensor))
        ]

    def undo(self) -> None:
        """Put it back as it was."""
        for log, mark in self._marks:
            del log[mark:]
        for tensor, value, extent in self._held:
            tensor.fxc_value, tensor.fxc_extent = value, extent
