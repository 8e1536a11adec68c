"""The report as one HTML file that needs nothing else: pictures inside, no script, no address to fetch from."""

import base64
import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fxcompress.report.comparison import Comparison, rows, versions
from fxcompress.report.layers import LayerWidth
from fxcompress.report.table import HEADINGS

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.55 system-ui, sans-serif; color: #22262d; max-width: 62rem; margin: auto; padding: 2rem 1rem; }}
h1 {{ font-size: 1.5rem; }}
h2 {{ font-size: 1.1rem; margin-top: 2.2rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem 1rem .3rem 0; text-align: right; border-bottom: 1px solid #dde1e7; }}
th:first-child, td:first-child {{ text-align: left; }}
th {{ color: #5b616b; font-weight: 600; }}
img {{ max-width: 100%; height: auto; }}
p.note {{ color: #5b616b; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
_SIZES = (
    "Sizes are shares of the 32-bit weights that the network started with. Fractional: the real-valued bit depths that "
    "training sees. Stored: whole bits for the codes of each channel, and 5 bytes for its number format. File: bytes "
    "on disk, with biases, norms and header."
)
_TIMES = (
    "Training time is that of one epoch, the median of three; latency is the median of repeated calls in turn, its "
    "ratio the median over pairs."
)


def write_html(
    comparison: Comparison, pictures: Sequence[tuple[str, Path]], path: str | os.PathLike[str], note: str = ""
) -> None:
    """Write the report.

    Args:
        comparison: what to show.
        pictures: PNG files with what each shows.
        path: of the file to write.
        note: how the networks were made, in a sentence or two.
    """
    parts = [_table(HEADINGS, [(r.label, r.baseline, r.compressed, r.left) for r in rows(comparison)])]
    parts += [f'<p class="note">{escape(text)}</p>' for text in (_SIZES, _TIMES)]
    parts += [_picture(title, file) for title, file in pictures]
    parts += ["<h2>Layers in numbers</h2>", _layers(comparison.layers), "<h2>How it was made</h2>"]
    parts += [f"<p>{escape(note)}</p>"] if note else []
    parts.append(_table(("", ""), [(key, _text(value)) for key, value in _made(comparison)]))
    page = _PAGE.format(title=escape(comparison.title), body="\n".join(parts))
    Path(path).write_text(page, "utf-8")


def _made(comparison: Comparison) -> Iterable[tuple[str, object]]:
    yield from comparison.settings.items()
    yield from ((f"seconds, {name}", round(value, 1)) for name, value in comparison.seconds.items())
    yield from versions().items()


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table>\n<tr>{heading}</tr>\n{body}\n</table>" if heading else f"<table>\n{body}\n</table>"


def _layers(layers: Sequence[LayerWidth]) -> str:
    head = ("layer", "outputs before", "after", "inputs before", "after", "mean bits")
    return _table(
        head,
        [
            (w.name, str(w.before[0]), str(w.after[0]), str(w.before[1]), str(w.after[1]), f"{w.bits:.2f}")
            for w in layers
        ],
    )


def _picture(title: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<h2>{escape(title)}</h2>\n<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
