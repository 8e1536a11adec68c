"""Dims in random orders, at sizes that coincide: no reshape is taken for one that is the same on the example alone."""

import os

import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import fxcompress as fxc
from tests.exactness import TOLERANCE, compared_on, difference, outputs
from tests.orders import Orders

FUZZ = os.environ.get("FXCOMPRESS_FUZZ") == "1"
CASES = settings(
    max_examples=20_000 if FUZZ else 60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@CASES
@given(st.data())
def test_removal_is_exact_on_inputs_of_all_sizes(data: st.DataObject) -> None:
    torch.manual_seed(0)
    orders = Orders(lambda low, high: data.draw(st.integers(low, high)))
    net = orders.build(steps=orders.integer(1, 7)).eval()
    orders.kill()
    x, more = orders.input(), bool(orders.integer(0, 1))
    result = fxc.prune(net, x, fold=more, narrow=more)
    event("smaller" if result.report.modified else "nothing removed")
    assert difference(outputs(net, (x,)), outputs(result.module, (x,))) <= TOLERANCE, net
    compared_on(net, result.module, orders.others())
