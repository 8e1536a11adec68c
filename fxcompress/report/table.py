"""The comparison as a table in the terminal."""

from rich.table import Table

from fxcompress.report.comparison import Comparison, rows

HEADINGS = ("", "baseline", "compressed", "compressed / baseline")


def table(comparison: Comparison) -> Table:
    """One line for each figure; ``rich.print`` shows it."""
    result = Table(title=comparison.title, title_justify="left")
    for number, heading in enumerate(HEADINGS):
        result.add_column(heading, justify="right" if number else "left")
    for row in rows(comparison):
        result.add_row(row.label, row.baseline, row.compressed, row.left)
    return result
