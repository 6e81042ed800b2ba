"""The figures of the lessons. Each function returns its Figure; end the cell with ``plt.show()``.

``four_panels`` is the picture that every idea gets. Its friends: ``number_line`` (where a format has numbers), ``bars``
(bytes), ``staircase`` (a value against what is left of it), ``histogram_with_grid`` (data and the levels it must fit),
``curve`` (one thing against another), ``intervals`` (shares and how sure they are), ``trade_off`` (what a bit buys),
``channels`` (how large each channel gets), ``dots`` (several things in several settings).
"""

from .comparisons import bars, channels, dots, intervals
from .curves import curve
from .grids import histogram_with_grid, number_line, staircase
from .panels import four_panels
from .quality_by_size import trade_off

__all__ = [
    "bars",
    "channels",
    "curve",
    "dots",
    "four_panels",
    "histogram_with_grid",
    "intervals",
    "number_line",
    "staircase",
    "trade_off",
]
