"""Prunes the pieces of a model that has no graph as a whole.

backbone (traced)            some of its channels go; what it takes and returns stays
rpn, roi_heads (not traced)  as they are
box_head (traced)            like the backbone
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from fxcompress.channels.analysis import Analysis
from fxcompress.passes.narrow_branches import NarrowedPath, WidePath
from fxcompress.passes.prune_channels import Pruned
from fxcompress.passes.prune_report import PruneReport, make_report
from fxcompress.passes.shrink import Narrow, shrink
from fxcompress.trace.basics.modules import elements_in
from fxcompress.trace.model.skeleton import skeleton
from fxcompress.trace.pieces.find import Piece, Pieces
from fxcompress.trace.pieces.graph_forward import install

_P = TypeVar("_P", NarrowedPath, WidePath)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PrunedPieces:
    """The result of :func:`prune_pieces`.

    Attributes:
        module: a copy of the model, of its class; tensors that lost nothing are shared with the original.
        removals: what was removed in each piece, by its name.
        report: of all of it.
    """

    module: nn.Module
    removals: dict[str, tuple[Pruned, ...]]
    report: PruneReport


def prune_pieces(
    pieces: Pieces, analyses: dict[str, Analysis], *, fold: bool = False, narrow: Narrow = False
) -> PrunedPieces:
    """Remove all that is proved to be without effect inside of each piece; the model stays as it is.

    A piece that loses nothing keeps its own code.

    Args:
        pieces: of a model.
        analyses: of each piece, by its name.
        fold: see :func:`fxcompress.prune`.
        narrow: see :func:`fxcompress.prune`.
    """
    removals, reports = {}, {}
    for piece in pieces.pieces:
        removals[piece.path], reports[piece.path] = _pruned(piece, analyses[piece.path], fold=fold, narrow=narrow)
    module = skeleton(pieces.model)
    for path, pruned in removals.items():
        if any(removal.modified for removal in pruned):
            install(module.get_submodule(path), pruned[-1].module)
    sizes = elements_in(pieces.model), elements_in(module)
    report = joined_report(reports, sizes, pieces.outside[""], pieces.parameters_outside())
    return PrunedPieces(module, removals, report)


def _pruned(piece: Piece, analysis: Analysis, *, fold: bool, narrow: Narrow) -> tuple[tuple[Pruned, ...], PruneReport]:
    shrunk = shrink(piece.traced, piece.inputs, analysis, fold=fold, narrow=narrow)
    report = make_report(
        piece.traced, *shrunk.removals, folded=shrunk.folded, narrowed=shrunk.narrowed, within=piece.path
    )
    return shrunk.removals, report


def joined_report(
    reports: dict[str, PruneReport], parameters: tuple[int, int], why: str, outside: dict[str, str]
) -> PruneReport:
    """One report on all pieces of a model, with the names of the model.

    Args:
        reports: of each piece, by its name.
        parameters: of the model, before and after.
        why: the model has no graph as a whole.
        outside: parameters that lie in no piece, with the reason.
    """
    uncovered = tuple(
        replace(op, places=tuple(place.within(path) for place in op.places))
        for path, report in reports.items()
        for op in report.uncovered
    )
    return PruneReport(
        removed=_prefixed(reports, lambda report: report.removed),
        branches=_named(reports, lambda report: report.branches),
        gone=_named(reports, lambda report: report.gone),
        parameters=parameters,
        kept=tuple(replace(kept, tensor=f"{path}.{kept.tensor}") for path, r in reports.items() for kept in r.kept),
        uncovered=uncovered,
        folded=_prefixed(reports, lambda report: report.folded),
        new_biases=_named(reports, lambda report: report.new_biases),
        unfolded=_prefixed(reports, lambda report: report.unfolded),
        narrowed=tuple(_path_within(path, prefix) for prefix, report in reports.items() for path in report.narrowed),
        left_wide=tuple(_path_within(path, prefix) for prefix, report in reports.items() for path in report.left_wide),
        pieces=tuple(reports),
        why_pieces=why,
        outside=outside,
        places={
            f"{p}.{name}": place.within(p) for p, report in reports.items() for name, place in report.places.items()
        },
    )


def _path_within(path: _P, prefix: str) -> _P:
    """A path into a sum, named from outside of the piece."""
    return replace(path, place=f"{prefix}.{path.place}", name=f"{prefix}.{path.name}", where=path.where.within(prefix))


def _prefixed(reports: dict[str, PruneReport], of: Callable[[PruneReport], dict[str, _T]]) -> dict[str, _T]:
    return {f"{path}.{name}": found for path, report in reports.items() for name, found in of(report).items()}


def _named(reports: dict[str, PruneReport], of: Callable[[PruneReport], tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for path, report in reports.items() for name in of(report))
