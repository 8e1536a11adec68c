"""Whatever operation of torch stands between two layers, removal does not change what the network computes.

Operations without a rule are among them. Which dims are channels, which of them are dead and why, is drawn at random:
rows of zeros in front of the operation, rows that are constant, or columns of zeros behind it.
"""

import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fxcompress as fxc
from tests.every_op import ON_GPUS, OPERATIONS, RANDOM, Case, cases
from tests.exactness import TOLERANCE

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),  # of torch, about operations
]
WAYS = ("dead", "constant", "unread")
_NEAR = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""For what an operation has cast: float numbers of fewer digits."""


def make_dead(case: Case, way: str, generator: torch.Generator) -> None:
    """Half of the channels of each layer in front, or of each layer behind."""
    names = [f"{part}.{place}.layer" for part in ("made", "read") for place in getattr(case.net, part)]
    with torch.no_grad():
        for name in names:
            if name.startswith("read") is not (way == "unread"):
                continue
            weight, bias = case.net.get_parameter(f"{name}.weight"), case.net.get_parameter(f"{name}.bias")
            count = weight.shape[1]
            dead = torch.randperm(count, generator=generator)[: max(1, count // 2)]
            if way == "unread":
                weight[:, dead] = 0
            else:
                weight[dead] = 0
                bias[dead] = float(way == "constant")


def same(a: object, b: object) -> bool:
    """Whether two results are equal but for rounding."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    scale = float(a.abs().max()) if a.numel() else 0.0
    near = _NEAR.get(a.dtype, TOLERANCE) * max(scale, 1e-300)
    return bool(torch.allclose(a, b, rtol=0, atol=near, equal_nan=True))


def is_finite(results: list[object]) -> bool:
    """Whether none of the results holds NaN or an infinite number: zero times one of these is not zero."""
    floats = [r for r in results if isinstance(r, Tensor) and (r.is_floating_point() or r.is_complex())]
    return all(bool(r.to_dense().isfinite().all()) for r in floats)


def run(net: nn.Module, case: Case, *, scale: float = 1.0, seed: int = 0) -> list[object]:
    """What a network makes of the inputs of a case, made larger by a factor."""
    torch.manual_seed(seed)
    return tree_flatten(net(*[x * scale for x in case.inputs]))[0]


def alike(one: list[object], other: list[object]) -> bool:
    """Whether two results are the same as far as they are numbers."""
    return not is_finite(one) or all(same(a, b) for a, b in zip(one, other, strict=True))


NAMES = sorted(n for n in OPERATIONS if n.split()[0] not in RANDOM and not n.startswith(ON_GPUS))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NAMES)
def test_removal_is_exact_around_it(name: str) -> None:
    check_removal(name)


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", NAMES)
def test_removal_is_exact_where_the_code_makes_what_it_takes_besides(name: str) -> None:
    check_removal(name, filled=True)


def check_removal(name: str, *, filled: bool = False) -> None:
    """Prune networks around an operation, and compare."""
    choice = random.Random(name)
    for case in cases(name, count=1, seed=0, filled=filled):
        make_dead(case, choice.choice(WAYS), torch.Generator().manual_seed(0))
        fold = choice.random() < 0.5
        with torch.no_grad():
            try:
                expected = {scale: run(case.net, case, scale=scale) for scale in (1.0, 1.25)}
            except RuntimeError:
                return  # a matrix is singular now, say
            if not alike(expected[1.0], run(case.net, case, seed=1)):
                return  # it draws random numbers
            try:
                pruned = fxc.prune(case.net, case.inputs, fold=fold).module
            except fxc.FxCompressError:
                return  # it reads values, or takes what no graph can hold
            for scale, results in expected.items():
                assert alike(results, run(pruned, case, scale=scale)), scale
