"""The style of all plots: read on a screen 390 pixels wide as well, ticks that are numbers, units on the axes."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from dit_jax.runtime.files import write_aside

WIDTH = 5.6  # inches: 10 points are then 9.7 pixels where the plot is 390 pixels wide
DPI = 150
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.fontsize": 9.5,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


@contextlib.contextmanager
def plots(path: str, panels: int = 1, height: float = 3.2, **settings: Any) -> Iterator[Any]:
    """Yields a list of matplotlib's Axes, one above the other, and writes them as a PNG when the block ends well.

    height: of a panel, in inches. settings: of Axes.set, for each panel.
    """
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height * panels), dpi=DPI)
        axes = list(figure.subplots(panels, squeeze=False).ravel())
        for panel in axes:
            panel.set(**settings)
        yield axes
        for panel in axes:
            for axis in (panel.xaxis, panel.yaxis):
                _number_ticks(axis)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        write_aside(path, file.getvalue())


def _number_ticks(axis):
    """Makes the ticks plain numbers, as 20 and 1,000 on a logarithmic axis. Ticks that were set are kept."""
    from matplotlib import ticker

    if isinstance(axis.get_major_locator(), ticker.FixedLocator):
        axis.set_minor_locator(ticker.NullLocator())
        return
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        subs = (1, 1.5, 2, 3, 4, 6, 8) if high < 10 * low else (1, 2, 5) if high < 500 * low else (1,)
        axis.set_major_locator(ticker.LogLocator(subs=subs))
    elif axis.axis_name == "x" and isinstance(axis.get_major_locator(), ticker.AutoLocator):
        axis.set_major_locator(ticker.MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))  # wide numbers, as 400,000
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10f}".rstrip("0").rstrip(".")))
    axis.set_minor_formatter(ticker.NullFormatter())
