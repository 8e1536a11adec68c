"""The dependency graph as one HTML file that needs nothing else: a table and a picture of the bundles."""

import json
from collections.abc import Iterable
from html import escape
from importlib import resources
from typing import Any

from fxcompress.channels.groups import Bundle, Groups
from fxcompress.trace.basics.modules import elements_in


def page(graph: Groups) -> str:
    """The whole page. Names come from the model, so they are escaped, in HTML and in the data for the script."""
    template = resources.files("fxcompress.channels").joinpath("graph_page.html").read_text("utf-8")
    data = json.dumps(_data(graph), separators=(",", ":")).replace("<", "\\u003c")  # so that nothing ends the script
    head, rest = template.split("<!--HEADER-->")
    body, script = rest.split("/*DATA*/")
    return "".join((head.replace("TITLE", escape(_title(graph))), _header(graph), body, data, script))


def _title(graph: Groups) -> str:
    return f"Channels of {type(graph.analysis.module).__name__}"


def _header(graph: Groups) -> str:
    parameters = elements_in(graph.analysis.module)
    removable = sum(group.removable for group in graph.groups)
    facts = {
        "input": str(graph.analysis.inputs),
        "parameters": f"{parameters:,}",
        "groups of channels": f"{len(graph.groups):,}",
        "removable": f"{removable:,}",
        "share of the parameters that may go": f"{graph.share:.2%}",
    }
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    lines = [line.strip() for op in graph.uncovered for line in str(op).splitlines()]
    unknown = "".join(f'<p class="warning">{escape(line)}</p>' for line in lines)
    return f"<h1>{escape(_title(graph))}</h1>\n<dl>{items}</dl>\n{unknown}"


def _data(graph: Groups) -> dict[str, Any]:
    """What the script draws: layers in the order in which the network runs them, and bundles that point at them."""
    used = [name for bundle in graph.bundles for name in (*bundle.producers, *bundle.consumers)]
    order = dict.fromkeys(maker.weight_name for maker in graph.analysis.makers)
    names = [name for name in order if name in set(used)]
    names += [name for name in dict.fromkeys(used) if name not in order]
    position = {name: i for i, name in enumerate(names)}
    parameters = dict(graph.analysis.module.named_parameters(remove_duplicate=False))
    shapes = [list(parameters[name].shape) if name in parameters else [] for name in names]
    layers = [{"name": name.removesuffix(".weight"), "shape": s} for name, s in zip(names, shapes, strict=True)]
    return {"layers": layers, "bundles": [_bundle(graph, bundle, position) for bundle in graph.bundles]}


def _bundle(graph: Groups, bundle: Bundle, position: dict[str, int]) -> dict[str, Any]:
    members = dict.fromkeys(name for i in bundle.groups for name, _, _ in graph.groups[i].members)
    others = [name for name in members if name not in {*bundle.producers, *bundle.consumers}]
    return {
        "groups": len(bundle.groups),
        "range": _ranges(bundle.groups),
        "parameters": bundle.parameters,
        "made": [position[name] for name in bundle.producers],
        "read": [position[name] for name in bundle.consumers],
        "with": others,
        "kept": bundle.kept_by,
    }


def _ranges(indices: Iterable[int]) -> str:
    """``0-7, 9`` for sorted indices; at most four ranges."""
    found: list[list[int]] = []
    for i in indices:
        if found and found[-1][1] == i - 1:
            found[-1][1] = i
        else:
            found.append([i, i])
    words = [f"{a}-{b}" if a < b else str(a) for a, b in found]
    return ", ".join(words[:4]) + (" and more" if len(words) > 4 else "")
