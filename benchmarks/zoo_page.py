"""The scoreboard's tables and claims, from its rows."""

import re
from collections.abc import Iterable
from typing import Any

from benchmarks.record import Claim, Column, Table

Row = dict[str, Any]
CHECKS = ("gone", "batch", "size", "trains", "exports", "compiles")
# What the share of the parameters that may go must reach.
SHARES = {"vit_b_16": 0.98, "swin_t": 0.92, "convnext_tiny": 0.91, "maxvit_t": 0.99}
MIXING = ("convnext", "maxvit", "swin", "vit")
CONVOLUTIONAL = 0.99
OTHERS = ("timm", "transformers")

_SUMMARY = (
    Column("family", "family"), Column("count", "networks", "d"), Column("traced", "traced", "d"),
    Column("exact", "exact", "d"), *(Column(check, check, "d") for check in CHECKS),
    Column("share", "smallest share", ".4f"), Column("error", "largest error", ".1e"),
    Column("cpu", "prune, CPU s", ".1f"), Column("seconds", "all checks, s", ".0f"),
)  # fmt: skip
_COLUMNS = (
    Column("model", "network"), Column("input", "input"), Column("millions", "parameters, 10^6", ".1f"),
    Column("traced", "traced"), Column("exact", "exact"), Column("error", "error", ".1e"),
    Column("share", "share", ".4f"), Column("removed", "removed", ".1%"), Column("cpu", "prune, CPU s", ".2f"),
    Column("memory", "peak, MB", ",.0f"), *(Column(check, check) for check in CHECKS), Column("commit", "commit"),
    Column("reason", "reason"),
)  # fmt: skip
_REASONS = (
    Column("count", "networks", "d"), Column("step", "step"), Column("reason", "reason"), Column("models", "which"),
)  # fmt: skip
_WORDS = {True: "yes", False: "no"}
_LEGEND = (
    "*exact*: with 30 % of the removable groups dead, the output stays the same for every seed, the names of the state "
    "are kept, and the negative control (the same rewrite with nothing dead) changes the output. *gone*: every dead "
    "channel was taken out. *share*: of the parameters, what has an index in a removable group. *removed*: parameters "
    "that went. *in pieces*: the network has no graph; what is compared are the raw outputs of each piece (features, "
    "logits, box regressions), the losses, and the scores of what is detected. "
    "*batch*, *size*: the result also takes another batch and another image size (*refused*: it raises an error that "
    "says so). *trains*: in training mode it computes what the original does, and a step of SGD changes it. *-*: not "
    "reached, or the original cannot either. "
    "*peak* is that of the whole process, with the checks, in float64. *commit*: the code that was measured."
)


def tables(rows: list[Row]) -> list[Table]:
    """A summary, the reasons of failures, and a table for each family."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    summary = [_sum(family, [row for row in rows if row["family"] == family]) for family in families]
    result = [Table("By family", _SUMMARY, [*summary, _sum("all", rows)], _LEGEND)]
    reasons = _grouped(rows)
    if reasons:
        result.append(Table("What does not work, and why", _REASONS, reasons))
    by_family = {f: [_shown(row) for row in rows if row["family"] == f] for f in families}
    return result + [Table(family.capitalize(), _COLUMNS, shown) for family, shown in by_family.items()]


def _sum(family: str, rows: list[Row]) -> Row:
    counts = {check: sum(row.get(check) is True for row in rows) for check in ("exact", *CHECKS)}
    traced = [row for row in rows if "share" in row]
    errors = [row["error"] for row in rows if row.get("error") is not None]
    return {
        "family": family,
        "count": len(rows),
        "traced": len(traced),
        **counts,
        "share": min((row["share"] for row in traced), default=None),
        "error": max(errors, default=None),
        **{key: sum(row.get(key, 0.0) for row in rows) for key in ("cpu", "seconds")},
    }


def _shown(row: Row) -> Row:
    """A row as the page shows it: words in place of flags, one line of reasons."""
    words = {check: _WORDS.get(row[check], row[check]) for check in ("exact", *CHECKS) if check in row}
    reasons = "; ".join(f"{step}: {_cell(reason)}" for step, reason in row["failures"].items())
    unknown = f"no rule for {', '.join(row['unknown'])}" if row.get("unknown") else ""
    more = {"millions": row["parameters"] / 1e6} if "parameters" in row else {}
    shown = row | words | more | {"reason": "; ".join(filter(None, (reasons, unknown, row.get("note")))) or None}
    return {column.key: shown.get(column.key) for column in _COLUMNS}


def _cell(text: str) -> str:
    """A reason as it fits into a table."""
    short = text if len(text) <= 160 else f"{text[:157]}..."
    return short.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _grouped(rows: Iterable[Row]) -> list[Row]:
    """Reasons, the most frequent ones first, with the networks that fail for them."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for step, reason in row["failures"].items():
            general = re.sub(r"cannot trace \w+", "cannot trace it", reason)
            key = re.sub(r", seed \d+", "", step), _cell(re.sub(r"\d+\.\d+e[-+]\d+", "...", general))
            if row["model"] not in found.setdefault(key, []):
                found[key].append(row["model"])
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [{"count": len(m), "step": step, "reason": why, "models": ", ".join(m)} for (step, why), m in ordered]


def claims(rows: list[Row]) -> list[Claim]:
    """What the scoreboard is measured for; a network without a share counts as one of which nothing may go."""
    shares = {row["model"]: row.get("share", 0.0) for row in rows}
    plain = [row["model"] for row in rows if row["family"] == "classification" and not row["model"].startswith(MIXING)]
    own = [row for row in rows if row["family"] not in OTHERS]  # of torchvision, all of which there are
    exact = [row for row in own if row["exact"]]
    text = f"smallest share of the parameters that may go, over {len(plain)} convolutional classifiers"
    result = [
        Claim("share of torchvision's networks that are exact", len(exact) / len(own), 1.0, at_least=True),
        Claim(text, min(shares[name] for name in plain), CONVOLUTIONAL, at_least=True),
    ]
    for name, limit in SHARES.items():
        result.append(Claim(f"{name}, share of the parameters that may go", shares[name], limit, at_least=True))
    return result
