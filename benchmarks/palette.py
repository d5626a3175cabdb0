"""The colours and the style of the project's figures.

The colours are those of Okabe and Ito, which colour-blind readers distinguish; each has its own line style and marker,
for black and white.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLACK = "#000000"
BLUE = "#0072b2"
VERMILION = "#d55e00"
GREEN = "#009e73"
PURPLE = "#cc79a7"
ORANGE = "#e69f00"
SKY = "#56b4e9"
GREY = "#767676"

CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "figure.figsize": "7, 3",
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.dpi": 110,
}


def line(number: int, **options: Any) -> dict[str, Any]:
    """Colour, line style and marker of a series; beyond the cycle, markers are hollow."""
    cycle, index = divmod(number, len(CYCLE))
    style = {"color": CYCLE[index], "linestyle": LINES[index], "marker": MARKERS[index], "markersize": 4}
    return {**style, **({"markerfacecolor": "white"} if cycle else {}), **options}


@contextmanager
def panels(file: Path, rows: int, columns: int, size: tuple[float, float], **options: Any) -> Iterator[Any]:
    """The panels of a figure `[rows, columns]` in the project's style, written to a file when they are drawn."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size)
        yield figure.subplots(rows, columns, squeeze=False, **options)
        figure.savefig(file, dpi=80)


def write_matplotlibrc(file: Path) -> Path:
    """Writes STYLE to a file for the variable MATPLOTLIBRC; returns the file."""
    colours = ", ".join(repr(colour.removeprefix("#")) for colour in CYCLE)
    lines = [f"{name}: {value}" for name, value in STYLE.items()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([*lines, f"axes.prop_cycle: cycler(color=[{colours}])", ""]))
    return file
