"""What the notebooks call: quizzes, exercises, guesses, progress, plots and sliders.

lessons.quiz("memory")          lessons.exercise("02-symmetric")        lessons.predict("02-error", "How large …?")
lessons.progress()              lessons.plots.four_panels(q, x)         lessons.explore.bits(x)
"""

from . import explore, plots
from .capstone import capstone
from .exercise import exercise
from .html import table
from .predict import predict
from .progress import progress
from .quiz import quiz
from .recorded import recorded

__all__ = ["capstone", "exercise", "explore", "plots", "predict", "progress", "quiz", "recorded", "table"]
