"""DistributedDataParallel around a network that loses channels.

Its reducer holds the parameters that it was built with, in buckets of their sizes. After a removal it would average
gradients of tensors that are gone, and leave those of the new ones alone. So each wrapper is built again, in place:
whoever holds it, Lightning and Accelerate among them, sees the same object.
"""

import gc
import inspect
from itertools import compress
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxcompress.errors import DistributedError

_OPTIONS = (
    "device_ids",
    "output_device",
    "dim",
    "process_group",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "skip_all_reduce_unused_params",
    "batched_grad_copy",
    "forward_sync_buffers",
    "broadcast_buffers",
)
"""Arguments of DistributedDataParallel that are attributes of the same name; older versions lack some."""

_MEBI = 2**20


def wrappers_of(net: nn.Module) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel that holds ``net``, as it is or deeper down.

    A module does not know what wraps it, and a wrapper that was forgotten would train on wrong gradients, so all live
    objects are looked through: some milliseconds, and only where torch.distributed is in use.

    Raises:
        DistributedError: ``gc.freeze()`` hides objects, and none is found among the others.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    found = _live(net)
    if len(found) > 1:  # perhaps some are garbage, with process groups that have ended
        del found
        gc.collect()
        found = _live(net)
    if not found and gc.get_freeze_count() and dist.get_world_size() > 1:
        raise DistributedError(
            f"gc.freeze() has hidden {gc.get_freeze_count()} objects, and a DistributedDataParallel around the "
            "network may be one of them; call gc.unfreeze() before prune()"
        )
    return found


def _live(net: nn.Module) -> list[DistributedDataParallel]:
    kinds = _with_subclasses(DistributedDataParallel)
    everything = gc.get_objects()
    found = compress(everything, map(kinds.__contains__, map(type, everything)))  # at the speed of C
    return [wrapper for wrapper in found if _holds(wrapper, net)]


def _with_subclasses(kind: type) -> set[type]:
    below: list[type] = kind.__subclasses__()
    return {kind}.union(*map(_with_subclasses, below))


def _holds(wrapper: DistributedDataParallel, net: nn.Module) -> bool:
    # One whose construction failed has no module.
    return any(module is net for module in wrapper.__dict__.get("_modules", {}).get("module", nn.Module()).modules())


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Check that a wrapper can be built again.

    Raises:
        DistributedError: it cannot.
    """
    reason = _reason(wrapper)
    if reason:
        raise DistributedError(
            f"the DistributedDataParallel around the network cannot follow a removal: {reason}; leave that out, or "
            "remove channels before the network is wrapped"
        )


def _reason(wrapper: DistributedDataParallel) -> str | None:
    attributes = wrapper.__dict__
    hooks = attributes.get("_comm_hooks", [])
    stateful = [state for _, state in hooks if state is not None and not isinstance(state, dist.ProcessGroup)]
    joining = getattr(attributes.get("_join_config"), "enable", False)
    cases = {
        "it is inside join(), where some ranks may have run out of data": joining,
        "it was built with mixed_precision, which keeps copies of the parameters": attributes.get("mixed_precision"),
        "it was built with delay_all_reduce_named_params": attributes.get("_delay_all_reduce_params"),
        "its communication hook has a state of its own, of the old sizes": stateful,
        "it has a built-in communication hook, which it does not show": not hooks and _hook_name(wrapper),
    }
    return next((reason for reason, applies in cases.items() if applies), None)


def _hook_name(wrapper: DistributedDataParallel) -> str:
    return str(wrapper._get_ddp_logging_data().get("comm_hook", ""))  # noqa: SLF001 - the only place that tells


def rebuild(wrapper: DistributedDataParallel) -> None:
    """Build a wrapper again, in place, for the parameters that its module has now.

    Without communication, but for releases of torch that know no other way.

    Options, hooks, mode and whether it is inside ``no_sync`` stay as they were.
    """
    options = _options(wrapper)
    own = {key: wrapper.__dict__[key] for key in _kept_attributes(wrapper)}
    extra = {name: child for name, child in wrapper._modules.items() if name != "module"}
    hooks = list(wrapper.__dict__.get("_comm_hooks", []))
    module = wrapper.module
    for name in ("reducer", "logger"):  # the old reducer takes its hooks off the parameters as it goes
        wrapper.__dict__.pop(name, None)
    DistributedDataParallel.__init__(wrapper, module, **options)
    wrapper.__dict__.update(own)
    wrapper._modules.update(extra)
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)


def _options(wrapper: DistributedDataParallel) -> dict[str, Any]:
    accepted = inspect.signature(DistributedDataParallel.__init__).parameters
    options = {name: getattr(wrapper, name) for name in _OPTIONS if name in accepted and hasattr(wrapper, name)}
    if "forward_sync_buffers" in options:  # the newer name of the same
        options.pop("broadcast_buffers", None)
    if not wrapper.bucket_bytes_cap_default:
        options["bucket_cap_mb"] = wrapper.bucket_bytes_cap / _MEBI
    if getattr(wrapper, "bucket_bytes_cap_list", None):
        options["bucket_cap_mb_list"] = [size / _MEBI for size in wrapper.bucket_bytes_cap_list]
    if "init_sync" in accepted:  # all ranks hold the same: they have just compared it, and were the same before
        options["init_sync"] = False
    return options


def _kept_attributes(wrapper: DistributedDataParallel) -> list[str]:
    tables = {"_parameters", "_buffers", "_modules"}
    kept = [key for key in nn.Module().__dict__ if key in wrapper.__dict__ and key not in tables]
    return [*kept, "require_backward_grad_sync", "require_forward_param_sync"]


def refuse_sharded(net: nn.Module) -> None:
    """Check that each process holds its parameters whole.

    Raises:
        DistributedError: they are sharded, as ``fully_shard``, FullyShardedDataParallel and tensor parallelism do.
    """
    if not dist.is_available():
        return
    from torch.distributed.tensor import DTensor

    sharded = [name or "<root>" for name, m in net.named_modules() if "_is_fsdp_managed_module" in m.__dict__]
    sharded += [name for name, p in net.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise DistributedError(
            f"the parameters of {sharded[0]!r} are sharded over processes (fully_shard, FullyShardedDataParallel or "
            "tensor parallelism): a channel cannot be measured or removed in pieces; use DistributedDataParallel"
        )
