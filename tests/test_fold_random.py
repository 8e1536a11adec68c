"""Folding does not change what a network computes in evaluation: random networks with constant channels."""

import copy
import os
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxcompress as fxc
from fxcompress.channels.prepare import prepare
from fxcompress.trace.inputs import ExampleInputs
from fxcompress.trace.tracer import trace
from tests.exactness import TOLERANCE, Fingerprint, difference, make_constant, outputs, runs_on
from tests.networks import Example, examples

FUZZ = os.environ.get("FXCOMPRESS_FUZZ") == "1"
CASES = settings(
    max_examples=20_000 if FUZZ else 50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def all_is_used(example: Example) -> bool:
    graph = trace(example.net, ExampleInputs.of(example.inputs)).graph
    return all(node.users for node in graph.nodes if node.op in {"call_function", "call_method", "call_module"})


def parameters_of(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@CASES
@given(examples(), st.sampled_from([0.2, 0.5, 0.8]))
def test_constants_are_folded(example: Example, share: float) -> None:
    net = example.net
    assume(runs_on(net, example.inputs))
    analysis = prepare(net, example.inputs)
    make_constant(analysis, np.random.default_rng(example.seed).random(analysis.space.size) < share)
    fresh = copy.deepcopy(net)
    visit = Fingerprint(net)
    plain = fxc.prune(net, example.inputs)
    result = fxc.prune(net, example.inputs, fold=True)
    visit.check()
    runs = [example.inputs, example.other_inputs(3, 0)]
    runs += [] if example.fixed or not runs_on(net, example.other_inputs(1, 4)) else [example.other_inputs(1, 4)]
    for inputs in runs:
        assert difference(outputs(net, inputs), outputs(result.module, inputs)) <= TOLERANCE
    assert isinstance(result.module, fx.GraphModule)
    result.module.graph.lint()
    event("folded" if result.report.folded else "nothing folded")
    event(f"smaller: {parameters_of(result.module) < parameters_of(plain.module)}")
    event(f"merged: {len(result.report.folded) > len(result.report.new_biases)}")
    assert parameters_of(result.module) <= parameters_of(plain.module)
    if all_is_used(example):  # else the last channel of something is kept, and may now be seen to be constant
        assert fxc.prune(result.module, example.inputs, fold=True).report.folded == {}
    with tempfile.TemporaryDirectory() as folder:
        fxc.save(result.module, Path(folder) / "net.fxc")
        loaded = fxc.load(Path(folder) / "net.fxc", model=fresh)
    assert list(loaded.state_dict()) == list(result.module.state_dict())
    assert difference(outputs(result.module, example.inputs), outputs(loaded, example.inputs)) == 0
