"""From needs to a recipe: its bytes, exactly, and its quality, as measured.

advise("7B", memory="8GB", context="32k", priority="accuracy")
advise("tutor", memory="5.4MB", accuracy=0.99, measurements=mine)
"""

from canopyq.advisor.choose import Advice, advise
from canopyq.advisor.measured import Measurement, read, recorded, write
from canopyq.advisor.needs import PRIORITIES, Needs
from canopyq.advisor.options import Option

__all__ = ["PRIORITIES", "Advice", "Measurement", "Needs", "Option", "advise", "read", "recorded", "write"]
