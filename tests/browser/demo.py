"""Small notebooks of the tests' own: one of everything, quizzes alone, and widgets that do not work."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

EVERYTHING = [
    "import matplotlib.pyplot as plt\nimport torch\n\nimport canopyq as cq\nfrom canopyq import lessons",
    'lessons.quiz("memory")',
    'lessons.quiz("symmetry")',
    'lessons.quiz("budget")',
    'guess = lessons.predict("02-error", "How large can the rounding error get, in steps of `scale`?", "steps")\nguess',
    '"half a step"',
    'display("half a step, too")\nguess.reveal(0.5)',
    'ex = lessons.exercise("02-quantize-asymmetric")\nex',
    'def quantize(x, bits):\n    raise NotImplementedError("replace this line")\n\n\nex.check(quantize)',
    "def quantize(x, bits):\n"
    "    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1\n"
    "    low, high = x.min().clamp(max=0), x.max().clamp(min=0)\n"
    "    scale = (high - low) / (qmax - qmin)\n"
    "    zero_point = torch.round(-low / scale)\n"
    "    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax), scale, zero_point\n\n\n"
    'lessons.exercise("02-quantize-asymmetric").check(quantize)',
    "x = torch.randn(4000, generator=torch.Generator().manual_seed(0))\nlessons.explore.bits(x)",
    "lessons.explore.float_bits(0.1)",
    "lessons.explore.clip(torch.cat([x, torch.tensor([9.0, -8.0])]))",
    "w = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))\n"
    'lessons.plots.four_panels(w, cq.quantize(w, "int4", "tensor"), title="INT4, one scale")\nplt.show()',
    "row = torch.tensor([-0.5, 0.3, -0.1, 0.4])\n"
    'lessons.plots.four_panels(row, cq.quantize(row, "int4", "tensor"), title="Four weights")\nplt.show()',
    "w = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))\n"
    'lessons.plots.four_panels(w, cq.quantize(w, "int8", "channel"), title="INT8, a scale per row")\nplt.show()',
    "w = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))\n"
    'lessons.plots.four_panels(w, cq.quantize(w, "int4", "g32"), title="INT4, g32")\nplt.show()',
    'names = ["int4", "int8", "fp4_e2m1", "nf4", "fp8_e4m3", "fp8_e5m2", "fp16"]\n'
    'lessons.plots.number_line({n: cq.get_format(n).values() for n in names}, title="Where the numbers lie")\n'
    "plt.show()",
    "lessons.plots.number_line({n: cq.get_format(n).values() for n in names[:4]}, linear_below=float('inf'), "
    'xlabel="value", title="Linear")\nplt.show()',
    'lessons.plots.bars({"FP32": 28, "BF16": 14, "INT8": 7, "INT4": 3.5}, budget=8, title="7B parameters")\nplt.show()',
    'q = cq.quantize(x, "int4", "tensor")\n'
    'lessons.plots.staircase(x[:400], q.dequantize()[:400], step=q.float_scale().item(), title="INT4")\nplt.show()',
    'lessons.plots.histogram_with_grid(x, q.dequantize().unique(), title="INT4 levels", limits=(-2.5, 2.5))\n'
    "plt.show()",
    "bits, w = [2, 3, 4, 5, 6, 7, 8], x.reshape(4, 1000)\n"
    'errors = {g: [(cq.quantize(w, f"int{b}", g).dequantize() - w).abs().mean().item()'
    ' for b in bits] for g in ("tensor", "channel", "g50")}\n'
    'lessons.plots.curve(bits, errors, "bits", "mean error", "Fewer bits, more error", log="y")\nplt.show()',
    "lessons.progress()",
]


QUIZZES = ["from canopyq import lessons", 'lessons.quiz("memory")', 'lessons.quiz("symmetry")']

BROKEN = [
    "from canopyq import lessons\nfrom canopyq.lessons.diagnose import diagnose\n"
    "from canopyq.lessons.exercise import ExerciseCard",
    'quiz = lessons.quiz("memory")\n'
    "quiz._record = lambda choice, record=quiz._record: record(quiz.question.right)  # every choice is right\nquiz",
    "ExerciseCard.judge = lambda card, answer: diagnose(card.spec, card.spec.build(card.stub))  # no answer is seen\n"
    'ex = lessons.exercise("00-bytes")\nex',
    'lessons.exercise("00-bytes").check(None)',
    'explorer = lessons.explore.float_bits(0.1)\nexplorer.draw = lambda figure, **values: "always the same"\nexplorer',
    "1 / 0",
]

NOTEBOOKS = {"widgets.ipynb": EVERYTHING, "restart.ipynb": QUIZZES, "broken.ipynb": BROKEN}


def write(path: Path, sources: list[str]) -> None:
    """Write a notebook of these code cells, not executed."""
    cells = [new_markdown_cell(f"# {path.stem}"), *(new_code_cell(source) for source in sources)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
