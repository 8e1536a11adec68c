"""The command line: ``fxcompress demo`` and ``fxcompress inspect``."""

import argparse
import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from fxcompress import ChannelGraph, FxCompressError, summary
from fxcompress.errors import TraceError, ValueReadError

_DEMO_THREADS = 2
"""As many as the results of docs/results/digits.md were measured with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code.

    Args:
        arguments: those after the program's name; those of the process by default.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        if options.command == "demo":
            _demo(options)
        else:
            _inspect(options)
    except (FxCompressError, KeyError, IndexError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) else error
        if "example_inputs" in str(text):
            text = (
                f"{text}\n  on the command line: --input 1,3,224,224 (or 1,16:int64), once for each argument of forward"
            )
        sys.stderr.write(f"fxcompress: {text}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fxcompress", description="Networks that compress themselves while they train.")
    parser.add_argument("--version", action="version", version=f"fxcompress {metadata.version('fxcompress')}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network that compresses itself, and report on it")
    demo.add_argument(
        "--out", default="out/demo", help="folder for the report, the pictures and the network (default out/demo)"
    )
    demo.add_argument("--seed", type=int, default=0, help="of weights and data order (default 0)")
    demo.add_argument(
        "--epochs", type=int, default=None, help="of each network (default 60); fewer are faster and worse"
    )
    look = commands.add_parser(
        "inspect", help="show which channels of a network hang together, or what is in a file of fxcompress.save"
    )
    look.add_argument(
        "model",
        help="torchvision:resnet18, or a module or what builds it (a class, a function without arguments): "
        "package.module:name, or path/to/file.py:name; or a file that fxcompress.save wrote",
    )
    look.add_argument(
        "--input", action="append", metavar="SHAPE", help="of the input, such as 1,3,224,224, or 1,16:int64 where it "
        "is not float32; once for each argument of forward; inferred by default",
    )  # fmt: skip
    look.add_argument("--explain", nargs=2, metavar=("LAYER", "CHANNEL"), help="what keeps one channel, in words")
    look.add_argument("--html", metavar="FILE", help="write the graph as a page for the browser, too")
    return parser


def _demo(options: argparse.Namespace) -> None:
    from fxcompress.demo.run import Recipe, run

    if options.epochs is not None and options.epochs < 1:
        raise FxCompressError(f"--epochs {options.epochs} must be at least 1")
    # More threads are of no use to so small a network, and those that wait for a busy core spin.
    torch.set_num_threads(min(torch.get_num_threads(), _DEMO_THREADS))
    run(options.out, Recipe(epochs=options.epochs or Recipe().epochs, seed=options.seed))


def _inspect(options: argparse.Namespace) -> None:
    file = Path(options.model)
    if file.suffix == ".fxc" or (file.is_file() and file.suffix != ".py"):
        if options.input or options.explain or options.html:
            raise FxCompressError("--input, --explain and --html are about models: a file holds no graph")
        print(summary(options.model))
        return
    inputs = None if options.input is None else tuple(_input(text) for text in options.input)
    graphs = _graphs(_model(options.model), inputs)
    if options.html:
        _save(graphs, Path(options.html))
    if options.explain:
        layer, channel = options.explain
        if not channel.isdigit():
            raise FxCompressError(f"channel {channel!r} is no number")
        piece = next((name for name in graphs if f"{layer}.".startswith(f"{name}.")), None)
        if piece is None and "" not in graphs:
            raise FxCompressError(f"{layer} lies in none of the pieces that could be traced: {', '.join(graphs)}")
        print(graphs[piece or ""].explain(layer.removeprefix(f"{piece}."), int(channel)))
    else:
        print("\n\n".join(f"{name}: {graph}" if name else str(graph) for name, graph in graphs.items()))


def _graphs(model: nn.Module, example: tuple[torch.Tensor, ...] | None) -> dict[str, ChannelGraph]:
    """The graph of a model, or those of its pieces by their names where it has none as a whole."""
    try:
        return {"": ChannelGraph.of(model, example)}
    except (TraceError, ValueReadError):
        if example is None:
            raise
    return ChannelGraph.of_pieces(model, example)


def _save(graphs: dict[str, ChannelGraph], path: Path) -> None:
    """A page for each graph; those of pieces have the name of the piece in theirs."""
    for name, graph in graphs.items():
        graph.save_html(path.with_name(f"{path.stem}.{name}{path.suffix}") if name else path)


def _input(text: str) -> torch.Tensor:
    shape, _, kind = text.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise FxCompressError(f"--input {text!r}: torch has no dtype {kind!r}; write int64, say, or float32")
    try:
        return torch.zeros([int(n) for n in shape.split(",")], dtype=dtype, device="cpu")
    except (ValueError, RuntimeError) as error:
        raise FxCompressError(
            f"--input {text!r} is no shape; write it as 1,3,224,224, or with a dtype as 1,16:int64"
        ) from error


def _model(name: str) -> nn.Module:
    """Build a model by name, with random weights."""
    place, _, what = name.rpartition(":")
    if name.endswith(".py"):
        raise FxCompressError(f"{name!r} names a file and no model in it; write {name}:name")
    if not place or not what:
        raise FxCompressError(
            f"{name!r} names no model and no file; write torchvision:resnet18, package.module:name or file.py:name"
        )
    if place == "torchvision":
        return _torchvision(what)
    if place.endswith(".py") and not Path(place).is_file():
        raise FxCompressError(f"there is no file {place}; check the path")
    try:
        found = getattr(_module(place), what)
        built = found() if callable(found) and not isinstance(found, nn.Module) else found
    except (ImportError, AttributeError, TypeError) as error:
        way = "; name it as a module of its package, package.module:name" if "relative import" in str(error) else ""
        raise FxCompressError(f"cannot build {name}: {error}{way}") from error
    if not isinstance(built, nn.Module):
        call = "()" if callable(found) else ""
        raise FxCompressError(f"{name}{call} is a {type(built).__name__}, not a torch.nn.Module")
    return built


def _module(place: str) -> ModuleType:
    """A module by its name or its file; one in the folder where the command is called is found as by ``python -m``."""
    file = Path(place)
    folder = str(file.parent.resolve()) if file.suffix == ".py" else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if file.suffix != ".py":
        return importlib.import_module(place)
    found = importlib.import_module(file.stem)
    return found if _is_of(found, file) else _loaded(file)


def _is_of(module: ModuleType, file: Path) -> bool:
    return module.__spec__ is not None and module.__spec__.origin == str(file.resolve())


def _loaded(file: Path) -> ModuleType:
    """The module of a file whose name another one has, such as ``types.py``."""
    name = f"{file.parent.resolve().name}_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torchvision(name: str) -> nn.Module:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise FxCompressError('its models need torchvision: pip install "fxcompress[zoo]"') from error
    try:
        builder = models.get_model_builder(name)
        backbone = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
        model: nn.Module = builder(weights=None, **backbone)
    except ValueError as error:
        close = difflib.get_close_matches(name, models.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "see torchvision.models.list_models()"
        raise FxCompressError(f"torchvision has no model {name!r}; {hint}") from error
    return model
