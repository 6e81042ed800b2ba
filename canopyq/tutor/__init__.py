"""The tutor model: a small, really trained language model that ships with the package, and questions to examine it.

model, tokenizer = load()
ask(model, tokenizer, "What is 17 + 25?")
questions(200)
"""

from canopyq.tutor.chat import ask, encode
from canopyq.tutor.exam import Question, questions
from canopyq.tutor.loading import load, path
from canopyq.tutor.skills import SKILLS, Skill
from canopyq.tutor.stream import calibration

__all__ = ["SKILLS", "Question", "Skill", "ask", "calibration", "encode", "load", "path", "questions"]
