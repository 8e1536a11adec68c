"""The objectives with a name.

Source of the first two: Csefalvay and Imber, arXiv 2301.13142, equations 2 to 5. For each layer, with kernel size K
(the product H W) and P positions (pixels or tokens that it is applied at, over the example inputs)

    eq4          K * sum over connected pairs (i, j) of b[i]
    eq5          K * sum over connected pairs (i, j) of (alive[j] * b[i] + alive[i] * b'[j])
    macs         K * P * the same sum
    activations  (values written for each channel) * sum over i of b[i]

where i runs over the output channels, j over the input channels that are not gone, a pair is connected unless a grouped
convolution keeps it apart, and b'[j] are the bits of what feeds j. Where several channels feed j (a sum), b'[j] is the
mean over those that are alive. An input of the network, or a channel without a quantizer, is alive and has no bits to
save. On a plain layer the sums factor into the paper's products. The sum over layers is stated over the weights,
multiply-adds or activations of the starting network.
"""

from typing import Protocol

from torch import Tensor

from fxcompress.objectives.terms import SizeTerms


class Objective(Protocol):
    """What a network can be trained for: any function of its terms and bits with a gradient."""

    def __call__(self, terms: SizeTerms, bits: Tensor, /) -> Tensor:
        """The cost of the network.

        Args:
            terms: of the network as it is.
            bits: (R,) all bit depths, one after the other, each at least 0.

        Returns:
            A scalar on the device of ``bits``.
        """
        ...


def eq4(terms: SizeTerms, bits: Tensor) -> Tensor:
    """A layer's own bits: the mean number of bits of a starting weight."""
    return (terms.kernel * terms.inputs * terms.out_bits(bits)).sum() / terms.weights


def eq5(terms: SizeTerms, bits: Tensor) -> Tensor:
    """Also rewards a producer for the weights that its consumers would lose; about twice equation 4."""
    return terms.pairs(bits, terms.kernel, terms.kernel) / terms.weights


def macs(terms: SizeTerms, bits: Tensor) -> Tensor:
    """Multiply-adds times bits: as equation 5, each weight as often as an evaluation uses it."""
    return terms.pairs(bits, terms.macs, terms.macs) / max(1, terms.start.macs)


def activations(terms: SizeTerms, bits: Tensor) -> Tensor:
    """The memory of what layers write: each channel's values times its bits, the mean bits of a starting value."""
    return (terms.writes * terms.out_bits(bits)).sum() / max(1, terms.start.activations)


OBJECTIVES: dict[str, Objective] = {"eq4": eq4, "eq5": eq5, "macs": macs, "activations": activations}
"""The objectives by name. Entries may be added: ``compress(..., objective="mine")`` then finds them."""


def objective_of(chosen: str | Objective) -> Objective:
    """The objective of a name, or the objective itself.

    Raises:
        ValueError: there is none of this name, or it cannot be called.

    >>> objective_of("eq5") is eq5
    True
    """
    if isinstance(chosen, str) and chosen in OBJECTIVES:
        return OBJECTIVES[chosen]
    if isinstance(chosen, str) or not callable(chosen):
        raise ValueError(  # noqa: TRY004 - one kind of error for all that is no objective
            f"objective={chosen!r} is none of {', '.join(OBJECTIVES)}; pass one of these names, a LatencyTable, or a "
            "function of (terms, bits)"
        )
    return chosen
