"""From needs to a recipe: its bytes, exactly, and its quality, as measured.

advise("7B", memory="8GB", context="32k", priority="accuracy")
advise("tutor", memory="5.4MB", accuracy=0.99, measurements=mine)
advise("./my-model", memory="4GB", measurements=measure(model, tokenizer, text))
"""

from canopyq.advisor.choose import ROWS, Advice, Option, advise, costs
from canopyq.advisor.measured import Measurement, read, recorded, write
from canopyq.advisor.measuring import measure
from canopyq.advisor.needs import GPUS, PRIORITIES, Needs, refuse

__all__ = ["GPUS", "PRIORITIES", "ROWS", "Advice", "Measurement", "Needs", "Option", "advise", "costs", "measure",
           "read", "recorded", "refuse", "write"]  # fmt: skip
