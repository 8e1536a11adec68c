"""The scoreboard's own machinery: limits, resumption, and a page that drops no network."""

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import zoo, zoo_page
from benchmarks.record import ROOT, Record, render
from benchmarks.zoo_models import Case, Shape, torchvision_cases
from benchmarks.zoo_report import reason_of
from benchmarks.zoo_subject import build, randomise
from tests.nets import ResidualNet

GOOD: dict[str, Any] = {
    "model": "resnet18", "family": "classification", "failures": {}, "exact": True, "error": 1e-15, "share": 0.999,
    "seconds": 6.0, "parameters": 11_689_512,
    "traced": "symbolic", "input": "(2, 3, 96, 96)", "cpu": 0.5, "batch": True, "size": None,
}  # fmt: skip
BAD: dict[str, Any] = {
    "model": "raft_small", "family": "optical flow", "failures": {"trace": "TraceError: a | b"}, "exact": False,
}  # fmt: skip


def options(**changes: Any) -> Namespace:  # noqa: ANN401 - any option
    chosen = zoo.parse([])
    for name, value in changes.items():
        setattr(chosen, name, value)
    return chosen


def case(name: str = "resnet18") -> Case:
    return next(case for case in torchvision_cases() if case.name == name)


def test_every_network_of_torchvision_is_there() -> None:
    families = [case.family for case in torchvision_cases()]
    assert len(families) >= 109
    assert set(families) == {"classification", "segmentation", "video", "optical flow", "detection"}


def test_a_timeout_is_a_row_with_its_step() -> None:
    row = zoo.measure(case(), options(timeout=0.2))
    assert row["exact"] is False
    assert row["failures"] == {"start": "not done after 0.2 seconds"}


def test_a_crash_is_a_row_with_its_reason() -> None:
    nobody = Case("nobody", "video", nn.Module, Shape(), lambda *_: ())
    row = zoo.measure(nobody, options())
    assert row["exact"] is False
    assert row["failures"] == {"start": "the process ended with 1: StopIteration"}


def test_what_is_stored_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(case: Case, options: Namespace) -> dict[str, Any]:
        measured.append(case.name)
        return GOOD | {"model": case.name}

    monkeypatch.setattr(zoo, "measure", measure)
    chosen = options(lines=tmp_path / "lines.jsonl")
    cases = [case("resnet18"), case("alexnet")]
    assert list(zoo.collect(cases[:1], chosen)) == ["resnet18"]
    assert list(zoo.collect(cases, chosen)) == ["resnet18", "alexnet"]
    assert measured == ["resnet18", "alexnet"]
    zoo.collect(cases[:1], options(lines=chosen.lines, seeds=[7]))  # other settings
    zoo.collect(cases[:1], options(lines=chosen.lines, fresh=True))
    monkeypatch.setattr(zoo, "code", lambda: "other code")
    zoo.collect(cases[:1], chosen)
    assert measured == ["resnet18", "alexnet", *["resnet18"] * 3]
    assert zoo.collect(cases, options(lines=tmp_path / "none.jsonl", stop_after=-1)) == {}


def test_a_line_that_was_cut_off_is_skipped(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps(GOOD | {"key": {}}) + '\n{"model": "alex', "utf-8")
    assert list(zoo.stored(lines, {})) == ["resnet18"]


def test_no_network_is_dropped_from_the_page() -> None:
    missing = {"family": "classification", "failures": {"start": "not measured yet"}, "exact": False}
    rows = [GOOD, BAD, *({"model": name} | missing for name in zoo_page.SHARES)]
    page = render(asdict(Record("zoo", "Scoreboard", "", {}, zoo_page.tables(rows), [])) | _ran())
    assert [row["model"] for row in rows if f"\n| {row['model']} |" not in page] == []
    assert "| optical flow | 1 | 0 | 0 |" in page
    assert "trace: TraceError: a \\| b" in page
    held = {claim.text: claim.holds for claim in zoo_page.claims(rows)}
    assert held["smallest share of the parameters that may go, over 1 convolutional classifiers"]
    assert not held["vit_b_16, share of the parameters that may go"]


def _ran() -> dict[str, Any]:
    return {"date": "today", "environment": {}}


def test_reasons_name_no_folder_of_this_machine() -> None:
    error = ValueError(f"at /home/x/lib/python3.11/site-packages/torchvision/a.py:3\n in {ROOT}/tests/a.py")
    assert reason_of(error) == "ValueError: at torchvision/a.py:3 in tests/a.py"
    assert reason_of(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "the memory limit is reached"


def test_networks_are_the_same_each_time_and_without_constants() -> None:
    first, second = (build(Case("", "", ResidualNet, Shape(), lambda *_: ())) for _ in range(2))
    assert all(bool((a == b).all()) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    norm = randomise(nn.BatchNorm2d(8)).state_dict()
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert len(set(norm[name].tolist())) == 8, name
