"""What :func:`fxcompress.fit` does about other processes; nothing at all where there is one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fxcompress.errors import DistributedError
from fxcompress.training.agreement import check_same
from fxcompress.training.compressed import CompressedModule
from fxcompress.training.distributed import refuse_sharded, wrappers_of
from fxcompress.training.in_pieces import Compressed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train one network together.

    Attributes:
        net: the network.
        wrapper: averages gradients over the processes; None in a single one.
    """

    net: Compressed
    wrapper: DistributedDataParallel | None = None

    @classmethod
    def around(cls, net: Compressed, steps: int) -> "Processes":
        """All processes of the default group; those of the wrapper where the network is wrapped already.

        Raises:
            DistributedError: they have not all the same number of steps to do, or the parameters are sharded.
        """
        if is_alone():
            return cls(net)
        refuse_sharded(net)
        wrapper = (wrappers_of(net) or [_wrapped(net)])[0]
        check_same("batches of all epochs", str(steps), wrapper.process_group, wrapper.device)
        return cls(net, wrapper)

    @property
    def module(self) -> nn.Module:
        """What is called in training."""
        return self.net if self.wrapper is None else self.wrapper

    @property
    def is_first(self) -> bool:
        """Whether this is the process that shows progress."""
        return self.wrapper is None or self.wrapper.process_group.rank() == 0

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        if self.wrapper is None:
            return value
        return _mean(value, self.wrapper.device, self.wrapper.process_group)

    def share_buffers(self, *others: nn.Module) -> None:
        """Give every process the buffers of the first: running statistics are of its own batches in each.

        Args:
            others: modules besides the network.
        """
        if self.wrapper is None:
            return
        group = self.wrapper.process_group
        source = dist.get_global_rank(group, 0)
        for buffer in (b for module in (self.net, *others) for b in module.buffers()):
            dist.broadcast(buffer, source, group=group)

    def share_beside(self, optimizer: Optimizer, loss: object) -> None:
        """Give every process what the first has beside the network: what the optimizer trains, and buffers of a loss.

        Args:
            optimizer: of the network, perhaps of others too.
            loss: a module, or a function.
        """
        if self.wrapper is None:
            return
        group = self.wrapper.process_group
        source = dist.get_global_rank(group, 0)
        for tensor in (*beside(self.net, optimizer), *(loss.buffers() if isinstance(loss, nn.Module) else ())):
            dist.broadcast(tensor.detach(), source, group=group)

    def mean_gradients(self, optimizer: Optimizer) -> None:
        """Mean the gradients of what the optimizer trains beside the network, as the wrapper does for the network.

        Where a process has none, the others count with it as a 0; where all have none, it stays so.
        """
        if self.wrapper is None:
            return
        group, world = self.wrapper.process_group, self.wrapper.process_group.size()
        own = beside(self.net, optimizer)
        if not own:
            return
        used = torch.tensor([float(p.grad is not None) for p in own], device=self.wrapper.device)
        dist.all_reduce(used, group=group)
        for parameter, anywhere in zip(own, used.tolist(), strict=True):
            if anywhere:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
                dist.all_reduce(grad, group=group)
                parameter.grad = grad.div_(world)

    def start_epoch(self, loader: Iterable[Any], epoch: int) -> None:
        """Tell a ``DistributedSampler`` the epoch, or it would shuffle alike in each."""
        sampler = getattr(loader, "sampler", None)
        if self.wrapper is not None and isinstance(sampler, torch.utils.data.DistributedSampler):
            sampler.set_epoch(epoch)


def beside(net: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """What an optimizer trains and a network lacks, such as the parameters of a loss."""
    own = {id(p) for p in net.parameters()}
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) not in own]


def is_alone() -> bool:
    """Whether there is no other process."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def of_first(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, in all of them.

    Args:
        make: called in the first process alone; what it returns can be pickled.

    Raises:
        DistributedError: it failed there.
    """
    if is_alone():
        return make()
    said: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            said[0] = make()
        except Exception as error:  # noqa: BLE001 - raised again below, when the others know
            failure, said[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(said, 0)
    if failure is not None:
        raise failure
    if said[1] is not None:
        raise DistributedError(f"the first process failed: {said[1]}")
    found: T = said[0]
    return found


def is_first() -> bool:
    """Whether this is the process that shows progress and writes files."""
    return is_alone() or dist.get_rank() == 0


def mean_of_processes(value: float, device: torch.device) -> float:
    """The mean of a number over all processes.

    Args:
        value: of this process.
        device: that the processes can exchange numbers of.
    """
    return value if is_alone() else _mean(value, device, None)


def _mean(value: float, device: torch.device, group: dist.ProcessGroup | None) -> float:
    total = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return float(total) / dist.get_world_size(group)


def _wrapped(net: Compressed) -> DistributedDataParallel:
    device = next(net.parameters()).device
    idle = not isinstance(net, CompressedModule) or _is_idle(net)
    devices = None if device.type == "cpu" else [device]
    wrapper = DistributedDataParallel(net, device_ids=devices, find_unused_parameters=idle)
    net.refresh()  # it has taken over the tensors of the first process
    return wrapper


def _is_idle(net: CompressedModule) -> bool:
    """Whether some trained parameter is not read."""
    trails = net.liveness.census.analysis.trails.values()
    read = {name for trail in trails for name in trail.parameters}
    return any(p.requires_grad and name not in read for name, p in net.named_parameters())
