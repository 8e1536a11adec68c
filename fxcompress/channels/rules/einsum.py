"""An einsum that would lay labelled dims one behind the other: as a product and a sum, each dim for itself.

torch makes matrix products of an einsum, and for that one dim of the indices that only one operand has, and one of
those that are summed over. Of two labelled dims that become one, only the outer one can lose entries
(:mod:`fxcompress.channels.rules.movement`). Products and sums are of the same entries in whatever order, and their
rules know all that is needed: ``einsum("nd,edh->enh", x, w)`` is ``(x[:, None, :, None] * w).sum(2)``, turned.
Of more than two operands the first two make one, as in torch, and that and the next one another.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxcompress.channels.layers import support
from fxcompress.channels.values import LabelTensor

EINSUM = frozenset({torch.einsum, torch.functional.einsum})
_KEY = "fxcompress_einsum"
"""In a node's meta: for each pair of operands, whether it is a product and a sum, on labels."""


class _Terms(NamedTuple):
    """The indices of both operands, of the result, and those that are summed over."""

    left: list[object]
    right: list[object]
    result: list[object]
    summed: list[object]


def operands_of(args: Sequence[Any]) -> tuple[list[Any], list[list[object]]]:
    """The operands of an einsum, each with its indices: an ellipsis stands for numbers, counted from its end.

    Args:
        args: of ``torch.einsum``: an equation and operands, or operands with a list of indices behind each.
    """
    if isinstance(args[0], str):
        terms: Sequence[Any] = _marked(args[0]).partition("->")[0].split(",")
        given: Sequence[Any] = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    else:
        given, terms = args[0::2], args[1::2]
    pairs = list(zip(given, terms, strict=False))  # behind the last operand, the indices of the result
    return [x for x, _ in pairs], [_expanded(term, len(x.shape)) for x, term in pairs]


def _marked(equation: str) -> str:
    """An equation with one letter for an ellipsis."""
    return equation.replace(" ", "").replace("...", ".")


def _expanded(term: Sequence[object], rank: int) -> list[object]:
    """The indices of a term of so many dims."""
    rest = rank - len(term) + 1
    return [i for index in term for i in (_ellipsis(rest) if index in {".", ...} else [index])]


def _ellipsis(count: int) -> list[object]:
    return [(..., i) for i in range(count, 0, -1)]


def einsum_of(meta: dict[str, Any], *args: Any) -> Tensor:  # noqa: ANN401 - the arguments of torch.einsum
    """``torch.einsum``, on labels.

    Args:
        meta: of the node, which keeps the choices: they are the same once some dims have a single entry, and no labels.
        args: of ``torch.einsum``.
    """
    operands, indices = operands_of(args)
    x: Tensor
    result = _result(args[0], indices) if isinstance(args[0], str) and len(operands) > 1 else None
    if result is None:
        whole: Tensor = torch.functional.einsum(*args)
        return whole
    choices = meta.setdefault(_KEY, {})
    x, own = operands[0], indices[0]
    for position, (y, other) in enumerate(zip(operands[1:], indices[1:], strict=True)):
        rest = indices[position + 2 :]
        both = list(dict.fromkeys([*own, *other]))
        made = [index for index in both if index in {*result, *chain(*rest)}] if rest else result
        terms = _Terms(own, other, made, [index for index in both if index not in made])
        if position not in choices:
            together = any(_lays_together(*group) for group in _groups(terms, (x, y)))
            choices[position] = together or _mixes_one_sample(terms, x, y)
        apart = choices[position] or _sums_one(terms, x)
        x, own = (_product_and_sum if apart else _contracted)(terms, x, y), made
    return x


def _sums_one(terms: _Terms, x: Tensor) -> bool:
    """Whether a dim of one entry is summed: torch leaves the sum out, and nothing says that the dim is gone."""
    return any(x.shape[terms.left.index(index)] == 1 for index in terms.summed if index in terms.left)


def _mixes_one_sample(terms: _Terms, x: Tensor, y: Tensor) -> bool:
    """Whether both have a batch of one entry, and the dims beside it do not stay as they are without it.

    torch leaves such a dim out of the batch: ``einsum("bhtd,bhtdw->bhtw", q, k)`` makes one dim of heads and words
    then, ``einsum("bdn,bn->bd", x, y)`` one of channels and samples.
    """
    batch = [index for index in terms.left if index in terms.right and index in terms.result]
    ones = [i for i in batch if x.shape[terms.left.index(i)] == 1 == y.shape[terms.right.index(i)]]
    alone = [[index for index in own if index in terms.result and index not in batch] for own in terms[:2]]
    return bool(ones) and (len(batch) - len(ones) > 1 or (len(batch) == len(ones) and not all(alone)))


def _product_and_sum(terms: _Terms, x: Tensor, y: Tensor) -> Tensor:
    order = [*terms.result, *terms.summed]
    product = _spread(x, terms.left, order) * _spread(y, terms.right, order)
    return product.sum(tuple(range(len(terms.result), len(order)))) if terms.summed else product


def _contracted(terms: _Terms, x: Tensor, y: Tensor) -> Tensor:
    """As torch does it, by matrix products."""
    numbers = {index: i for i, index in enumerate(dict.fromkeys([*terms.left, *terms.right]))}
    left, right, made = ([numbers[index] for index in term] for term in (terms.left, terms.right, terms.result))
    result: Tensor = torch.functional.einsum(x, left, y, right, made)
    return result


def _result(equation: str, terms: Sequence[list[object]]) -> list[object] | None:
    """The indices of the result; None where one is repeated within a term, as a diagonal is."""
    _, arrow, output = _marked(equation).partition("->")
    rest = _ellipsis(max(sum(isinstance(index, tuple) for index in term) for term in terms))
    counts = Counter(index for term in terms for index in term)
    once = sorted(index for index, count in counts.items() if count == 1 and isinstance(index, str))
    result = [i for index in output for i in (rest if index == "." else [index])] if arrow else [*rest, *once]
    return None if any(len(set(term)) < len(term) for term in (*terms, result)) else result


def _groups(terms: _Terms, operands: Sequence[Tensor]) -> list[tuple[Tensor, list[int]]]:
    """For each operand, the dims that torch makes one of: the indices that it has alone, and those summed over."""
    found = []
    for x, own, other in zip(operands, (terms.left, terms.right), (terms.right, terms.left), strict=True):
        alone = [d for d, index in enumerate(own) if index not in other]
        shared = [d for d, index in enumerate(own) if index in other and index in terms.summed]
        found += [(x, alone), (x, shared)]
    return found


def _lays_together(x: Tensor, dims: list[int]) -> bool:
    """Whether two layers of labels lie along these dims, each along one."""
    if not isinstance(x, LabelTensor):
        return False
    layers = [layer for layer in x.fxc_value.layers if support(layer) & set(dims)]
    return len(layers) > 1 and all(len(support(layer)) == 1 for layer in layers)


def _spread(x: Tensor, own: list[object], order: list[object]) -> Tensor:
    """An operand with a dim for each index, of size 1 where it has none."""
    there = [own.index(index) for index in order if index in own]
    turned = x.permute(there)
    for d, index in enumerate(order):
        turned = turned if index in own else turned.unsqueeze(d)
    return turned
