"""All ranks do the same, or none does.

What a rank removes follows from zeros that it holds itself, so no decision needs to travel. It is compared all the
same, in one all-reduce: a rank that went another way would otherwise show itself as a hang, or not at all.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fxcompress.errors import DistributedError

_LENGTH = 480
"""Bytes of a record. All ranks send as many, since none knows what the others will say."""


class Plan(Protocol):
    """What ranks compare."""

    @property
    def fingerprint(self) -> str:
        """Equal when the plans are."""
        ...


P = TypeVar("P", bound=Plan)


def agreed(wrappers: Sequence[DistributedDataParallel], make: Callable[[], P]) -> P:
    """The plan that ``make`` returns, once all ranks of all wrappers have made the same.

    Every rank must call it. A rank on which ``make`` fails tells the others before it raises, so none of them waits.

    Args:
        wrappers: whose process groups take part; with none, or one process, nothing is compared.
        make: works something out, and changes nothing.

    Raises:
        DistributedError: the plans differ, another rank could not make one, or a rank has died.
    """
    failure: Exception | None = None
    plan: P | None = None
    try:
        plan = make()
        record = f"={plan.fingerprint} {plan}"
    except Exception as error:  # noqa: BLE001 - raised again below, when the others know
        failure = error
        record = f"!{type(error).__name__}: {error}"
    for wrapper in _one_per_group(wrappers):
        records = exchange(record, wrapper.process_group, wrapper.device)
        if failure is None:
            _compare(records)
    if failure is not None:
        raise failure
    assert plan is not None
    return plan


def check_same(what: str, value: str, group: "dist.ProcessGroup", device: torch.device) -> None:
    """Check that all ranks of a group have the same value for something; each of them must call it.

    Raises:
        DistributedError: they have not, or a rank has died.
    """
    values = exchange(value, group, device)
    if len(set(values)) > 1:
        lines = [f"  rank {rank}: {found}" for rank, found in enumerate(values)]
        raise DistributedError(f"the ranks must agree on the number of {what}:\n" + "\n".join(lines))


def _one_per_group(wrappers: Sequence[DistributedDataParallel]) -> list[DistributedDataParallel]:
    return list({id(w.process_group): w for w in wrappers if w.process_group.size() > 1}.values())


def exchange(record: str, group: "dist.ProcessGroup", device: torch.device) -> list[str]:
    """What each rank of a group has to say, by rank; long records are cut off.

    One all-reduce of whole numbers, which every backend can do on its own device.

    Raises:
        DistributedError: a rank does not answer within the timeout of the group.
    """
    records = torch.zeros(group.size(), _LENGTH, dtype=torch.int32, device="cpu")
    content = record.encode()[:_LENGTH]
    records[group.rank(), : len(content)] = torch.tensor(list(content), dtype=torch.int32, device="cpu")
    try:
        everyone = _summed(records.to(device), group)
    except RuntimeError as error:  # what torch raises when a peer is gone, or its time is up
        raise DistributedError(
            f"rank {group.rank()} of {group.size()} got no answer from the others: {_first_line(error)}\n"
            "  a rank has died, or has not come to the same call in time (prune() must be called on every rank); the "
            "network on this rank is unchanged"
        ) from error
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in everyone.tolist()]


def _summed(tensor: Tensor, group: "dist.ProcessGroup") -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor.cpu()  # waits for the device, so that a failure shows here


def _compare(records: list[str]) -> None:
    failed = {rank: record[1:] for rank, record in enumerate(records) if not record.startswith("=")}
    if failed:
        lines = [f"  rank {rank}: {_first_line(reason)}" for rank, reason in failed.items()]
        raise DistributedError(
            "nothing was removed on any rank, because some ranks could not remove anything:\n" + "\n".join(lines)
        )
    plans: dict[str, list[int]] = {}
    for rank, record in enumerate(records):
        plans.setdefault(record, []).append(rank)
    if len(plans) == 1:
        return
    lines = [f"  {_ranks(ranks)}: {record.partition(' ')[2]}" for record, ranks in plans.items()]
    raise DistributedError(
        "the ranks disagree on what to remove, so nothing was removed on any of them:\n"
        + "\n".join(lines)
        + "\n  their bits or biases are no longer the same. Does every rank train through its wrapper, with the same "
        "optimizer and gamma, and call step() after each optimizer step? Load the same checkpoint on all ranks to go on"
    )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{', ...' if len(ranks) > 8 else ''}"


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
