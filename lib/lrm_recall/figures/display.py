"""Figures leave the library here: alt text, SVG and PNG files, and the notebook.

Alt text is the figure's artist label, so that it travels with the Figure: written once, by the function that
draws, from the numbers it draws.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import matplotlib as mpl
from IPython.display import Image, display
from matplotlib.figure import Figure

_SCREEN_DPI = 110  # of the copy inside a notebook: legible, and small enough to keep a notebook under 2 MB
_FILE_DPI = 200


def describe(figure: Figure, alt: str) -> Figure:
    """Attach alt text to a figure; returns the figure."""
    figure.set_label(alt)
    return figure


def alt_text(figure: Figure) -> str:
    """The alt text of a figure.

    Raises:
        ValueError: it has none: a figure nobody can hear is not finished.
    """
    alt = figure.get_label()
    if not alt:
        raise ValueError("the figure has no alt text; attach it with lrm_recall.figures.display.describe")
    return alt


def save(figure: Figure, folder: str | os.PathLike[str], name: str) -> list[Path]:
    """Write <name>.svg, <name>.png and <name>.txt (the alt text) to a folder, which is made if need be.

    The SVG and the PNG carry the alt text as their description, and no date: equal figures are equal files.

    Returns:
        The three paths.
    """
    alt = alt_text(figure)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    svg, png, text = (folder / f"{name}.{suffix}" for suffix in ("svg", "png", "txt"))
    with mpl.rc_context({"svg.hashsalt": "lrm_recall"}):  # ids inside the file that do not change from day to day
        figure.savefig(svg, metadata={"Title": name, "Description": alt, "Date": None})
    figure.savefig(png, dpi=_FILE_DPI, metadata={"Title": name, "Description": alt})
    text.write_text(alt + "\n", encoding="utf-8")
    return [svg, png, text]


def show(figure: Figure) -> None:
    """Display a figure in a notebook as one PNG with its alt text in the metadata, where nbconvert reads it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_SCREEN_DPI)
    display(Image(buffer.getvalue(), format="png", alt=alt_text(figure)))
