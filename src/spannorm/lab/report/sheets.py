"""A figure's numbers as CSV: exactly what is drawn, line by line and map by map."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import numpy as np
from matplotlib.figure import Figure

from spannorm.text import csv_cell

HEADER = ("panel", "x_axis", "y_axis", "series", "x", "y", "value")


def sheet(figure: Figure) -> str:
    """Every labelled line as (x, y), every labelled map as (x, y, value); what has no label is decoration."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(_rows(figure))
    return text.getvalue()


def _rows(figure: Figure) -> Iterator[tuple[str, ...]]:
    for ax in figure.axes:
        axes = tuple(map(csv_cell, (ax.get_title() or ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel())))
        for line in ax.get_lines():
            label = str(line.get_label())
            if not label.startswith("_"):  # matplotlib's own names of nameless lines
                x, y = (np.atleast_1d(np.asarray(values, dtype=np.float64)) for values in line.get_data())
                yield from ((*axes, csv_cell(label), f"{a:.6g}", f"{b:.6g}", "") for a, b in zip(x, y, strict=True))
        for image in ax.images:
            label, values = str(image.get_label()), np.asarray(image.get_array())
            if not label.startswith("_"):
                for (row, column), value in np.ndenumerate(values):
                    yield (*axes, csv_cell(label), str(column), str(row), f"{value:.6g}")
