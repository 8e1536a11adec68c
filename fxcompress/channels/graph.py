"""The dependency graph of a network's channels, for people: what hangs on what, and what keeps it."""

import os
from collections.abc import Sequence
from pathlib import Path

import networkx as nx
from torch import nn

from fxcompress.channels.graph_page import page
from fxcompress.channels.groups import Groups
from fxcompress.channels.prepare import NO_GRAPH, prepare, prepare_pieces
from fxcompress.progress import progress
from fxcompress.trace.basics.precision import ordinary
from fxcompress.trace.inputs import ExampleInputs


class ChannelGraph(Groups):
    """Which channels of a network depend on which.

    >>> graph = ChannelGraph.of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    >>> sum(group.removable for group in graph.groups)
    8
    """

    @classmethod
    @ordinary
    def of(cls, model: nn.Module, example_inputs: object = None) -> "ChannelGraph":
        """Analyse a model; it is left as it is.

        Args:
            model: any network that can be traced.
            example_inputs: what it can be called with; inferred where left out.

        Raises:
            ExampleInputError, UnsupportedModelError: see :func:`fxcompress.prune`.
            TraceError: the model cannot be traced; :meth:`of_pieces` may find modules of it that can.
        """
        try:
            with progress(f"analysing {type(model).__name__}"):
                return cls(prepare(model, example_inputs))
        except NO_GRAPH as error:
            raise type(error)(
                f"{error}\n  ChannelGraph.of_pieces(model, example_inputs) gives a graph for each module that has one"
            ) from error

    @classmethod
    @ordinary
    def of_pieces(cls, model: nn.Module, example_inputs: object) -> "dict[str, ChannelGraph]":
        """Analyse the pieces of a model that has no graph as a whole, as it reads values; it is left as it is.

        Args:
            model: any network.
            example_inputs: what it can be called with; it runs on them, with their values.

        Returns:
            the graph of each piece by the name of the module; names in a graph are those within that module. A model
            that has a graph is a piece named "".

        Raises:
            ExampleInputError, UnsupportedModelError: see :func:`fxcompress.prune`.
            TraceError: no module of it that holds two layers can be traced.
        """
        inputs = ExampleInputs.of(example_inputs)
        try:
            return {"": cls(prepare(model, inputs))}
        except NO_GRAPH as error:
            _, analyses = prepare_pieces(model, inputs, error)
        return {path: cls(analysis) for path, analysis in analyses.items()}

    def to_networkx(self) -> nx.DiGraph:
        """The graph as a networkx.DiGraph of tensors and bundles of groups.

        Nodes of kind ``tensor`` (their key is the tensor's name) have ``shape`` and ``parameters``. Nodes of kind
        ``bundle`` (their key is ``("bundle", i)``) have ``groups`` (indices into :attr:`groups`), ``parameters``,
        ``removable`` and ``reasons``. An edge from a tensor to a bundle has ``role="producer"``; one from a bundle to a
        tensor has ``role="consumer"``.
        """
        graph = nx.DiGraph()
        for name, parameter in self.analysis.module.named_parameters():
            graph.add_node(name, kind="tensor", shape=tuple(parameter.shape), parameters=parameter.numel())
        for i, bundle in enumerate(self.bundles):
            graph.add_node(
                ("bundle", i), kind="bundle", groups=tuple(bundle.groups), parameters=bundle.parameters,
                removable=bundle.removable, reasons=bundle.reasons,
            )  # fmt: skip
            graph.add_edges_from(((name, ("bundle", i)) for name in bundle.producers), role="producer")
            graph.add_edges_from(((("bundle", i), name) for name in bundle.consumers), role="consumer")
        return graph

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as one HTML file, to be opened in a browser: a table and a picture of the bundles.

        The file needs nothing else, and fetches nothing.
        """
        Path(path).write_text(page(self), "utf-8")

    def explain(self, name: str, channel: int) -> str:
        """What hangs on one output channel, and what keeps it, in words.

        Raises:
            KeyError, IndexError, TypeError: see :meth:`find`.
        """
        group = self.find(name, channel)
        lines = [f"{name}[{channel}] belongs to group {group.index}, {group.parameters:,} parameters"]
        lines.append(f"  made by     {_listing(group.producers)}")
        lines.append(f"  read by     {_listing(group.consumers)}")
        others = [(n, i) for n, _, i in group.members if (n, i) not in {*group.producers, *group.consumers}]
        lines.append(f"  goes with   {_listing(others)}")
        lines += [f"  it stays: {reason}" for reason in group.kept_by]
        if group.removable:
            lines.append("  it can be removed as soon as it is zero wherever it is read")
        return "\n".join(lines)

    def __str__(self) -> str:
        removable = sum(group.removable for group in self.groups)
        lines = [
            f"{type(self.analysis.module).__name__} on {self.analysis.inputs}",
            f"{len(self.groups):,} groups, {removable:,} of them removable, with {self.share:.2%} of the parameters",
            "",
        ]
        rows = [("groups", "parameters", "made by", "read by", "kept by")]
        rest = 0
        for bundle in self.bundles:
            if not (bundle.producers or bundle.consumers or (bundle.removable and bundle.parameters)):
                rest += len(bundle.groups)
            else:
                kept = _shortened(bundle.kept_by) or "-"
                numbers = f"{len(bundle.groups):,}", f"{bundle.parameters:,}"
                made = _names(bundle.producers) if not bundle.tensors else f"held by {_names(bundle.tensors)}"
                rows.append((*numbers, made, _names(bundle.consumers), kept))
        wide = [max(len(row[column]) for row in rows) for column in (2, 3)]
        lines += [f"{row[0]:>7} {row[1]:>12}  {row[2]:<{wide[0]}}  {row[3]:<{wide[1]}}  {row[4]}" for row in rows]
        if rest:
            what = "no layer makes or reads them: positions of kernels, rows of tables, norms of inputs"
            lines.append(f"{rest:>7,} {'':>12}  not listed, as {what}")
        lines += map(str, self.uncovered)
        return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    short = [name.removesuffix(".weight") for name in names]
    return (", ".join(short[:2]) + (f" +{len(short) - 2}" if len(short) > 2 else "")) or "-"


def _shortened(reasons: Sequence[str]) -> str:
    return "; ".join(reasons[:2]) + (f"; {len(reasons) - 2} more reasons" if len(reasons) > 2 else "")


def _listing(channels: Sequence[tuple[str, int]]) -> str:
    by_name: dict[str, list[int]] = {}
    for name, index in channels:
        by_name.setdefault(name, []).append(index)
    parts = [f"{name}[{_indices(indices)}]" for name, indices in by_name.items()]
    return ", ".join(parts[:8]) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "") or "nothing"


def _indices(indices: list[int]) -> str:
    if len(indices) > 3 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}:{indices[-1] + 1}"
    return ", ".join(map(str, indices[:6])) + (", ..." if len(indices) > 6 else "")
