"""Sliders: one parameter to move, a picture and a line of numbers that follow, as in ``lessons.explore.bits(x)``."""

from .answers import Answers as answers
from .bits import Bits as bits
from .choose import Choose as choose
from .clip import Clip as clip
from .context import Context as context
from .explorer import Explorer
from .float import FloatBits as float_bits
from .groups import Groups as groups
from .outlier import Outlier as outlier
from .rounding import Rounding as rounding
from .speed import Speed as speed
from .squeeze import Squeeze as squeeze
from .static import Static as static
from .turns import Turns as turns
from .words import Words as words

__all__ = ["Explorer", "answers", "bits", "choose", "clip", "context", "float_bits", "groups", "outlier", "rounding",
           "speed", "squeeze", "static", "turns", "words"]  # fmt: skip
