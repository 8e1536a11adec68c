"""Optimizer surgery: training goes on as if the parameters had always been smaller, and a refusal changes nothing."""

import copy
import inspect
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

from fxcompress.errors import OptimizerError
from fxcompress.training.optimizer import Replacement, check_optimizer, kept_entries, prepare_resize
from tests.replacements import resize_optimizer, slice_parameter

Factory = Callable[[Iterable[Any]], optim.Optimizer]

ELEMENTWISE: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"weight_decay": 0.01},
    "AdamW": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adadelta": {},
    "NAdam": {"momentum_decay": 0.1},
    "RAdam": {},
    "Adamax": {},
    "ASGD": {"t0": 1},
    "Rprop": {},
}
"""Every optimizer of torch that treats each entry of a parameter alone, with options that make it keep more state."""
OTHERS = {"Adafactor", "LBFGS", "Muon", "Optimizer", "SparseAdam"}
VARIANTS = ("plain", "foreach", "fused", "maximize", "amsgrad")


def factories() -> dict[str, Factory]:
    """Each elementwise optimizer in each variant that it has."""
    found: dict[str, Factory] = {"SGD without state": partial(optim.SGD, lr=0.1)}
    for name, options in ELEMENTWISE.items():
        kind = getattr(optim, name)
        for variant in VARIANTS:
            if variant == "plain" or variant in inspect.signature(kind).parameters:
                chosen = options | ({"foreach": False} if variant == "plain" else {variant: True})
                found[f"{name} {variant}"] = partial(kind, lr=0.1, **chosen)
    return found


OPTIMIZERS = factories()
SHAPES = [(8, 3, 3, 3), (8,), (4, 8), (5,)]
CUTS = [{0: [0, 2, 3, 7], 1: [0, 2]}, {0: [0, 2, 3, 7]}, {1: [0, 2, 3, 7]}, {}]


def indices(number: int) -> dict[int, Tensor]:
    return {dim: torch.tensor(kept) for dim, kept in CUTS[number].items()}


def cut(tensor: Tensor, number: int) -> Tensor:
    for dim, index in indices(number).items():
        tensor = tensor.index_select(dim, index)
    return tensor


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]


def step(optimizer: optim.Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()


def gradients() -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]


def sliced(params: list[nn.Parameter]) -> list[Replacement]:
    return [slice_parameter(parameter, indices(n)) for n, parameter in enumerate(params) if CUTS[n]]


def after(params: list[nn.Parameter], changes: list[Replacement]) -> list[nn.Parameter]:
    new = {change.old: change.new for change in changes}
    found = [new.get(parameter, parameter) for parameter in params]
    return [parameter for parameter in found if parameter is not None]


def state_of(optimizer: optim.Optimizer, change: Replacement) -> dict[str, Any]:
    assert change.new is not None
    state: dict[str, Any] = optimizer.state[change.new]
    return state


def snapshot(optimizer: optim.Optimizer) -> tuple[list[list[int]], list[int], dict[str, Any]]:
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return groups, [id(key) for key in optimizer.state], copy.deepcopy(optimizer.state_dict())


def assert_unchanged(optimizer: optim.Optimizer, before: tuple[list[list[int]], list[int], dict[str, Any]]) -> None:
    groups, keys, state = snapshot(optimizer)
    assert (groups, keys) == before[:2]
    torch.testing.assert_close(state, before[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_goes_on_as_in_the_whole_network(make: Factory) -> None:
    whole = parameters()
    small = copy.deepcopy(whole)
    optimizer_of_whole, optimizer = make(whole), make(small)
    history = [gradients() for _ in range(5)]
    for grads in history[:2]:
        step(optimizer_of_whole, whole, grads)
        step(optimizer, small, grads)
    changes = sliced(small)
    resize_optimizer(optimizer, changes)
    small = after(small, changes)
    for grads in history[2:]:
        step(optimizer_of_whole, whole, grads)
        step(optimizer, small, [cut(grad, n) for n, grad in enumerate(grads)])
    for number, (full, part) in enumerate(zip(whole, small, strict=True)):
        torch.testing.assert_close(part, cut(full.detach(), number), check_stride=False, rtol=1e-12, atol=1e-12)
    assert set(optimizer.state) <= set(small)
    state_keys = [set(state) for state in optimizer_of_whole.state.values()]
    assert [set(state) for state in optimizer.state.values()] == state_keys


def test_every_optimizer_of_torch_is_tried() -> None:
    classes = {name for name, kind in vars(optim).items() if isinstance(kind, type)}
    assert classes <= ELEMENTWISE.keys() | OTHERS
    fused = {name.removesuffix(" fused") for name in OPTIMIZERS if name.endswith(" fused")}
    assert fused == {"SGD", "Adam", "AdamW", "Adagrad"}


def test_options_of_single_parameters_stay_with_them() -> None:
    whole = parameters()
    small = copy.deepcopy(whole)
    own: list[dict[str, Any]] = [
        {"lr": 0.3, "betas": (0.5, 0.9)}, {"weight_decay": 0.1}, {"lr": torch.tensor(0.2)}, {"amsgrad": True}
    ]  # fmt: skip
    optimizers = [
        optim.Adam([{"params": [p]} | options for p, options in zip(params, own, strict=True)])
        for params in (whole, small)
    ]
    history = [gradients() for _ in range(4)]
    for number, grads in enumerate(history):
        if number == 2:
            changes = sliced(small)
            resize_optimizer(optimizers[1], changes)
            small = after(small, changes)
        step(optimizers[0], whole, grads)
        step(optimizers[1], small, grads if number < 2 else [cut(grad, n) for n, grad in enumerate(grads)])
    for number, (full, part) in enumerate(zip(whole, small, strict=True)):
        torch.testing.assert_close(part, cut(full.detach(), number), check_stride=False, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop", "NAdam", "RAdam", "Adamax", "ASGD", "Adadelta", "Rprop"])
def test_state_of_a_capturable_optimizer_stays_on_its_device(name: str) -> None:
    """On a CPU torch makes no step of it, so it is told after its first one; a step count is then a tensor."""
    params = parameters()
    optimizer = getattr(optim, name)(params, lr=0.1)
    step(optimizer, params, gradients())
    optimizer.param_groups[0]["capturable"] = True
    for state in optimizer.state.values():
        state.update({key: torch.as_tensor(value) for key, value in state.items()})
    before = {p: dict(state) for p, state in optimizer.state.items()}
    changes = sliced(params)
    resize_optimizer(optimizer, changes)
    assert optimizer.param_groups[0]["capturable"] is True
    for change in changes:
        for key, value in state_of(optimizer, change).items():
            old = before[change.old][key]
            assert value is old if old.ndim == 0 else torch.equal(value, sliced_like(old, change))


def sliced_like(tensor: Tensor, change: Replacement) -> Tensor:
    for dim, index in change.indices.items():
        tensor = tensor.index_select(dim, index)
    return tensor


def test_momentum_counts() -> None:
    """The negative control: a new optimizer after the cut, which has no momentum, ends elsewhere."""
    whole = parameters()
    optimizer = optim.Adam(whole, lr=0.1)
    step(optimizer, whole, gradients())
    changes = sliced(whole)
    small, fresh = after(whole, changes), [copy.deepcopy(p) for p in after(whole, changes)]
    resize_optimizer(optimizer, changes)
    grads = [cut(grad, n) for n, grad in enumerate(gradients())]
    step(optimizer, small, grads)
    step(optim.Adam(fresh, lr=0.1), fresh, grads)
    assert not torch.allclose(small[0], fresh[0], atol=1e-3)


def test_adafactor_keeps_its_factors() -> None:
    params = parameters()
    optimizer = optim.Adafactor(params, lr=0.1)
    step(optimizer, params, gradients())
    before = {key: value.clone() for key, value in optimizer.state[params[0]].items()}
    assert before["row_var"].shape == (8, 3, 3, 1)
    changes = sliced(params)
    resize_optimizer(optimizer, changes)
    state = state_of(optimizer, changes[0])
    assert torch.equal(state["row_var"], cut(before["row_var"], 0))
    assert torch.equal(state["col_var"], cut(before["col_var"], 0))
    assert state_of(optimizer, changes[1])["variance"].shape == (4,)
    assert state_of(optimizer, changes[2])["row_var"].shape == (4, 1)
    assert state_of(optimizer, changes[2])["col_var"].shape == (1, 4)
    small = after(params, changes)
    step(optimizer, small, [cut(grad, n) for n, grad in enumerate(gradients())])


def second_moment(state: dict[str, Any]) -> Tensor:
    """What Adafactor divides by, squared."""
    rows, columns = state["row_var"], state["col_var"]
    return rows @ columns / rows.mean(-2, keepdim=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5)])
@pytest.mark.parametrize("cut_dims", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_adafactor_estimates_for_what_stays_what_it_did_before(
    shape: tuple[int, ...], cut_dims: tuple[int, ...]
) -> None:
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = optim.Adafactor([weight], lr=0.1)
    for _ in range(3):
        step(optimizer, [weight], [torch.randn(shape, dtype=torch.float64)])
    before = second_moment(optimizer.state[weight])
    kept = {dim: torch.tensor([0, 2]) for dim in cut_dims if dim < len(shape)}
    change = slice_parameter(weight, kept)
    resize_optimizer(optimizer, [change])
    state = state_of(optimizer, change)
    torch.testing.assert_close(second_moment(state), sliced_like(before, change))
    torch.testing.assert_close(state["row_var"], second_moment(state).mean(-1, keepdim=True))
    torch.testing.assert_close(state["col_var"], second_moment(state).mean(-2, keepdim=True))


def test_adafactor_goes_on_as_if_the_dead_rows_had_never_been() -> None:
    """Rows without gradients from the start: only its learning rate, which goes by the norm of all, sees them."""
    grads = [torch.randn(6, 5, dtype=torch.float64) for _ in range(4)]
    small = nn.Parameter(torch.ones(2, 5, dtype=torch.float64))
    whole = nn.Parameter(torch.ones(6, 5, dtype=torch.float64))
    optimizers = [optim.Adafactor([p], lr=0.1, d=100.0, eps=(None, 0.0)) for p in (small, whole)]
    kept = torch.tensor([1, 4])
    for number, grad in enumerate(grads):
        dead = torch.zeros_like(grad).index_copy(0, kept, grad[kept])
        step(optimizers[0], [small], [grad[kept]])
        if number == 2:
            change = slice_parameter(whole, {0: kept})
            resize_optimizer(optimizers[1], [change])
            assert change.new is not None
            whole = change.new
        step(optimizers[1], [whole], [dead if number < 2 else grad[kept]])
    torch.testing.assert_close(second_moment(optimizers[0].state[small]), second_moment(optimizers[1].state[whole]))


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon yet")
def test_muon_keeps_its_momentum() -> None:
    """Its update is not elementwise; rows without a gradient take no part in it, whether they are there or not."""
    grad = torch.randn(8, 8)
    grad[[1, 4, 5, 6]] = 0
    whole = nn.Parameter(torch.randn(8, 8))
    small = nn.Parameter(whole.detach().clone())
    pair = [optim.Muon([p], lr=0.1, weight_decay=0.0) for p in (whole, small)]
    for p, optimizer in zip((whole, small), pair, strict=True):
        step(optimizer, [p], [grad])
    change = slice_parameter(small, {0: torch.tensor([0, 2, 3, 7])})
    before = pair[1].state[small]["momentum_buffer"]
    resize_optimizer(pair[1], [change])
    assert change.new is not None
    assert torch.equal(state_of(pair[1], change)["momentum_buffer"], before[[0, 2, 3, 7]])
    step(pair[0], [whole], [grad])
    step(pair[1], [change.new], [grad[[0, 2, 3, 7]]])
    torch.testing.assert_close(change.new, whole[[0, 2, 3, 7]].detach(), rtol=0, atol=2e-3)  # its steps are in bfloat16


@pytest.mark.cpu
def test_sparse_adam_goes_on() -> None:
    whole = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    small = nn.Parameter(whole.detach().clone())
    pair = [optim.SparseAdam([p], lr=0.1) for p in (whole, small)]
    kept, grads = torch.tensor([0, 3]), [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    for number, grad in enumerate(grads):
        grad[[1, 5 - number]] = 0.0
        whole.grad = grad.to_sparse(1)
        small.grad = (grad if number < 2 else grad[:, kept]).to_sparse(1)
        pair[0].step()
        pair[1].step()
        if number == 1:
            change = slice_parameter(small, {1: kept})
            resize_optimizer(pair[1], [change])
            assert change.new is not None
            small = change.new
    torch.testing.assert_close(small.detach(), whole[:, kept].detach(), rtol=1e-12, atol=1e-12)


def test_steps_and_scalars_stay_the_same_objects() -> None:
    params = parameters()
    optimizer = optim.NAdam(params)
    step(optimizer, params, gradients())
    counts = [(state["step"], state["mu_product"]) for state in optimizer.state.values()]
    changes = sliced(params)
    resize_optimizer(optimizer, changes)
    found = [(state["step"], state["mu_product"]) for state in optimizer.state.values()]
    assert all(a is b for old, new in zip(counts, found, strict=True) for a, b in zip(old, new, strict=True))


def test_scheduler_state_dict_and_hooks_go_on() -> None:
    params = parameters()
    split: list[dict[str, Any]] = [{"params": params[:2], "lr": 0.5}, {"params": params[2:]}]
    optimizer = optim.SGD(split, lr=0.1, momentum=0.9)
    schedulers = [lr_scheduler.StepLR(optimizer, 1, 0.5), lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)]
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    groups, lists, state = optimizer.param_groups, [g["params"] for g in optimizer.param_groups], optimizer.state
    step(optimizer, params, gradients())
    changes = sliced(params)
    resize_optimizer(optimizer, changes)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert all(a["params"] is b for a, b in zip(groups, lists, strict=True))
    small = after(params, changes)
    step(optimizer, small, [cut(grad, n) for n, grad in enumerate(gradients())])
    schedulers[0].step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]
    assert len(calls) == 2
    fresh = optim.SGD([{"params": small[:2]}, {"params": small[2:]}], lr=1.0, momentum=0.9)
    fresh.load_state_dict(optimizer.state_dict())
    step(fresh, small, [cut(grad, n) for n, grad in enumerate(gradients())])


def test_removed_parameters_leave_state_and_groups() -> None:
    params = parameters()
    named = [(f"p{n}", parameter) for n, parameter in enumerate(params)]
    optimizer = optim.Adam([{"params": named[:2]}, {"params": named[2:3]}, {"params": named[3:]}])
    step(optimizer, params, gradients())
    changes = [Replacement(params[0], None), slice_parameter(params[1], indices(1)), Replacement(params[2], None)]
    resize_optimizer(optimizer, changes)
    assert [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups] == [[(4,)], [], [(5,)]]
    assert [group["param_names"] for group in optimizer.param_groups] == [["p1"], [], ["p3"]]
    assert [tuple(parameter.shape) for parameter in optimizer.state] == [(4,), (5,)]
    small = after(params, changes)
    step(optimizer, small, [torch.randn_like(p) for p in small])


def test_parameters_that_the_optimizer_does_not_hold_are_passed_over() -> None:
    params = parameters()
    optimizer = optim.SGD(params[3:], lr=0.1, momentum=0.9)
    optimizer.step()
    before = snapshot(optimizer)
    resize_optimizer(optimizer, sliced(params))
    assert_unchanged(optimizer, before)


def test_preparing_changes_nothing_until_commit() -> None:
    params = parameters()
    optimizer = optim.Adam(params)
    step(optimizer, params, gradients())
    before = snapshot(optimizer)
    prepared = prepare_resize(optimizer, sliced(params))
    assert_unchanged(optimizer, before)
    prepared.commit()
    assert optimizer.param_groups[0]["params"][0].shape == (4, 2, 3, 3)


def refused(optimizer: optim.Optimizer, changes: list[Replacement], message: str) -> None:
    before = snapshot(optimizer)
    with pytest.raises(OptimizerError, match=message):
        resize_optimizer(optimizer, changes)
    assert_unchanged(optimizer, before)


def test_state_of_another_shape_is_refused() -> None:
    params = parameters()
    optimizer = optim.Adam(params)
    step(optimizer, params, gradients())
    optimizer.state[params[2]]["preconditioner"] = {"left": [torch.ones(4, 1), torch.eye(3)]}
    message = r"state of Adam: state\['preconditioner'\]\['left'\]\[1\] has shape \(3, 3\), .* shape \(4, 8\) of its"
    refused(optimizer, sliced(params), message)


def test_containers_are_searched() -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.state[params[1]] = {
        "history": [torch.arange(8.0), (torch.arange(8), 3)],
        "name": "x",
        "scale": torch.ones(1, 1),
    }
    changes = sliced(params)
    resize_optimizer(optimizer, changes)
    state = state_of(optimizer, changes[1])
    assert [state["history"][0].tolist(), state["history"][1][0].tolist()] == [[0, 2, 3, 7]] * 2
    assert (state["history"][1][1], state["name"], state["scale"].shape) == (3, "x", (1, 1))


def test_containers_of_unknown_kind_are_refused() -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.state[params[1]] = {"history": deque([torch.arange(8.0)])}
    refused(
        optimizer, sliced(params), r"state\['history'\] is a deque that holds tensors, .*prune before the first step"
    )


class Packed(Tensor):
    """Stands for the state of 8-bit optimizers: it looks like the parameter, but cannot be indexed."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func is Tensor.index_select:
            raise NotImplementedError("index_select on Packed")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_state_that_cannot_be_indexed_is_refused() -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1)
    optimizer.state[params[1]] = {"codes": torch.zeros(8).as_subclass(Packed)}
    message = r"state\['codes'\] is a Packed that cannot be indexed \(index_select on Packed\); prune before"
    with pytest.raises(OptimizerError, match=message):
        resize_optimizer(optimizer, sliced(params))
    assert list(optimizer.state) == [params[1]]


@pytest.mark.parametrize("shapes", [[(8,)], [(5,), (8,)]])
def test_lbfgs_is_refused_once_it_has_a_history(shapes: list[tuple[int, ...]]) -> None:
    """Its flat history lies in the state of the first parameter, which may even look as if it could be cut."""
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = optim.LBFGS(params, max_iter=2)
    changes = [slice_parameter(params[-1], {0: torch.tensor([1, 2])})]
    resize_optimizer(optimizer, changes)
    params = after(params, changes)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([parameter.square().sum() for parameter in params]).sum()
        torch.autograd.backward(loss)
        return loss

    optimizer.step(closure)
    again = [slice_parameter(params[-1], {0: torch.tensor([0])})]
    refused(optimizer, again, r"LBFGS keeps one flat history .*; prune before its first step, or build a new LBFGS")


def test_wrong_replacements_are_refused() -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1)
    wrong = Replacement(params[1], nn.Parameter(torch.zeros(3)), indices(1))
    refused(optimizer, [wrong], r"shape \(8,\) is replaced by one of shape \(3,\), but its indices keep \(4,\)")
    refused(optimizer, sliced(params) * 2, r"a parameter of shape \(8, 3, 3, 3\) is replaced twice")


def test_optimizer_of_another_network_is_refused() -> None:
    net, before = nn.Linear(3, 4), nn.Linear(3, 4)
    optimizer = optim.SGD([{"params": net.parameters()}, {"params": before.parameters()}], lr=0.1)
    message = r"holds 2 parameters that are not the network's, the first of shape \(4, 3\) in param_groups\[1\]; build"
    with pytest.raises(OptimizerError, match=message):
        check_optimizer(optimizer, net.parameters())
    one = optim.SGD([before.bias], lr=0.1)
    with pytest.raises(OptimizerError, match=r"holds 1 parameter that is not the network's, .* shape \(4,\)"):
        check_optimizer(one, net.parameters())
    check_optimizer(one, [*net.parameters(), *before.parameters()])


@pytest.mark.parametrize(
    ("shape", "layout"), [((6, 4, 3, 3), torch.channels_last), ((6, 4, 2, 2, 2), torch.channels_last_3d)]
)
def test_what_is_kept_has_the_memory_layout_of_the_whole(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    for memory_format in (layout, torch.contiguous_format):
        whole = torch.randn(shape).to(memory_format=memory_format)
        kept = kept_entries(whole, {0: torch.tensor([0, 1, 2]), 1: torch.tensor([1, 3])})
        assert kept.is_contiguous(memory_format=memory_format)
        assert torch.equal(kept, whole[:3, [1, 3]])


def test_what_is_kept_owns_its_memory() -> None:
    whole = torch.ones(3)
    assert kept_entries(whole, {}).data_ptr() != whole.data_ptr()
