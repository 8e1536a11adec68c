"""What else must work with a pruned network: other inputs, export, compilation, training."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.zoo_models import Arguments, Case
from benchmarks.zoo_report import Report, reason_of
from benchmarks.zoo_subject import TOLERANCE, Subject, outputs
from tests.exactness import difference, tensors

BACKEND = "aot_eager"


def uses(case: Case, subject: Subject, report: Report) -> None:
    """All of it but training, which changes the networks, and comes last."""
    other = 1 if case.shape.batch > 1 else 2
    other_input(case.example(1, batch=other), "batch", subject, report)
    other_input(case.example(1, size=case.shape.other), "size", subject, report)
    if case.shape.near and report.failures.get("size", "").startswith("PathError"):
        report.passed("size")
        report.add(note=f"refuses images of {case.shape.other}, as another path; {case.shape.near} is taken")
        other_input(case.example(1, size=case.shape.near), "size", subject, report)
    if "" in subject.analyses:  # one graph; torch.export and torch.compile want no less
        again(exported, "exports", subject, report)
        again(compiled, "compiles", subject, report)


def other_input(arguments: Arguments, step: str, subject: Subject, report: Report) -> None:
    """Inputs of another shape, where the original takes them; None says that it does not.

    A network that was traced by running it refuses what takes another path: that is no wrong result.
    """
    try:
        expected = outputs(subject.net, arguments)
    except Exception as error:  # noqa: BLE001 - the original's own limits
        report.add(**{step: None, f"{step} original": reason_of(error)})
        return
    with report.step(step):
        report.add(**{step: False})
        _same(expected, outputs(subject.pruned, arguments))
        report.add(**{step: True})
    if report.failures.get(step, "").startswith("PathError"):
        report.add(**{step: "refused"})


def again(make: Callable[[nn.Module, Arguments], list[Tensor]], step: str, subject: Subject, report: Report) -> None:
    """Run the result in another way, and see whether the original runs that way where it does not."""
    with report.step(step):
        report.add(**{step: False})
        expected = outputs(subject.pruned, subject.arguments)
        _same(expected, make(subject.pruned, subject.arguments))
        report.add(**{step: True})
    if step in report.failures:
        try:
            make(subject.net, subject.arguments)
        except Exception:  # noqa: BLE001 - the original's own limits
            report.fail(step, f"as with the original, {report.failures[step]}")
            report.add(**{step: None})


def exported(net: nn.Module, arguments: Arguments) -> list[Tensor]:
    """The outputs of a network after torch.export."""
    program = torch.export.export(net, copy.deepcopy(arguments))
    return outputs(program.module(), arguments)


def compiled(net: nn.Module, arguments: Arguments) -> list[Tensor]:
    """The outputs of a network after torch.compile, as one graph."""
    torch.compiler.reset()
    return outputs(torch.compile(net, backend=BACKEND, fullgraph=True), arguments)  # type: ignore[arg-type]


def expected_in_training(case: Case, subject: Subject) -> list[Tensor]:
    """What the original computes in training mode; its statistics change."""
    subject.net.train()
    torch.manual_seed(0)  # for stochastic depth, which drops whole images
    return outputs(subject.net, case.lesson(5))


def check_trains(case: Case, pruned: nn.Module, expected: list[Tensor]) -> None:
    """In training mode the result computes what the original does, and a step changes its weights."""
    torch.manual_seed(0)
    found = list(tensors(pruned.train()(*case.lesson(5))))
    _same(expected, found)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    before = {name: p.detach().flatten()[:64].clone() for name, p in pruned.named_parameters()}
    torch.stack([y.square().mean() for y in found if y.requires_grad]).sum().backward()
    optimizer.step()
    changed = sum(not torch.equal(p.flatten()[:64], before[name]) for name, p in pruned.named_parameters())
    if changed <= 0.5 * len(before):
        raise ValueError(f"a step changed {changed} of {len(before)} tensors only")


def _same(expected: list[Tensor], found: list[Tensor]) -> None:
    worst = difference(expected, found)
    if worst > TOLERANCE:
        raise ValueError(f"the output changes by {worst:.1e}")
