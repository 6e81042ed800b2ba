"""Run the course's notebooks in place, clean them for git, and check that they are fit to be committed.

    python tools/notebooks.py execute [files]     run, clean, write back; stops at the first cell that raises
    python tools/notebooks.py check [files]       the guards, without running anything

Without files, all of ``notebooks/``, the appendices in ``notebooks/more/`` included. Both print a line a notebook and
exit with 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
APPENDICES = FOLDER / "more"
MAX_BYTES = 1 << 20
MIN_SHARE_WITH_OUTPUT = 0.6
CELL_TIMEOUT = 300
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}

PROGRESS_BAR = re.compile(r"\d+%\|")
LEFTOVER_REPR = re.compile(r"<matplotlib\.|^<Axes[: >]|^\(?<Figure size.*<Axes|^Text\(|^<\w*Container object")
WIDGET_REPR = re.compile(
    r"^(?:[HV]Box|GridBox|Box|Tab|Accordion|Stack|Output|interactive|Button|Toggle\w+|RadioButtons|Dropdown|Select\w*"
    r"|Checkbox|Label|Text|Textarea|HTML|HTMLMath|Image|Play|(?:Bounded)?(?:Int|Float)\w+)\("
)
PRIVATE_PATH = re.compile(r"(?<![\w./:-])/(?:home|root|Users|work|builds|private|var/folders|tmp)/[\w.-]+")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    """A notebook that cannot be executed: the message names the notebook, the cell and the error."""


# --- executing -------------------------------------------------------------------------------------------------------


def lesson_environment(scratch: Path) -> dict[str, str]:
    """The environment of a kernel whose result depends on nothing that a learner did or set before, threads aside: one
    where ``OMP_NUM_THREADS`` does not say how many.

    ``scratch`` is a folder of this one run; it is made here and stays empty until the lesson records progress.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("CANOPYQ_") and k != "MPLBACKEND"}
    return env | {
        "CANOPYQ_PROGRESS": str(scratch / "progress.json"),
        "IPYTHONDIR": str(scratch / "ipython"),  # no startup files, no settings, no shared history
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TQDM_DISABLE": "1",  # bars appear after two seconds, so on a slow machine only
    }


def run(nb: NotebookNode, path: Path) -> None:
    """Execute ``nb`` in a fresh kernel of this very Python, in the folder of ``path``. Fills in the outputs."""
    import ipykernel.kernelspec
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError

    class ThisPython(KernelSpecManager):
        """Whatever kernels the user has installed under the name python3, ours is the one in this environment."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(resource_dir=ipykernel.kernelspec.RESOURCES, **ipykernel.kernelspec.get_kernel_dict())

    class ThisKernel(AsyncKernelManager):
        """nbclient makes one of these itself, and so it also shuts it down."""

        kernel_spec_manager = ThisPython()

    running = 0

    def remember(cell: NotebookNode, cell_index: int) -> None:
        nonlocal running
        running = cell_index

    for cell in code_cells(nb):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        nb,
        kernel_name="python3",
        kernel_manager_class=ThisKernel,
        timeout=CELL_TIMEOUT,
        resources={"metadata": {"path": str(path.resolve().parent)}},
        store_widget_state=False,
        record_timing=False,
        on_cell_start=remember,
    )
    with tempfile.TemporaryDirectory() as scratch:
        try:
            client.execute(env=lesson_environment(Path(scratch)), stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            raise NotebookError(f"{path.name}, cell {running}: {error.ename}: {error.evalue}") from error
        except (CellControlSignal, DeadKernelError) as error:
            raise NotebookError(f"{path.name}, cell {running}: {str(error).strip().splitlines()[0]}") from error


def clean(nb: NotebookNode) -> list[str]:
    """Drop from a freshly run notebook what git should not hold. Returns what the author may want to know."""
    notes = []
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    for index, cell in enumerate(nb.cells):
        for key in ("execution", "collapsed", "scrolled", "ExecuteTime"):
            cell.metadata.pop(key, None)
        if cell.cell_type != "code":
            continue
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                notes += [f"cell {index} said on stderr: {line}" for line in plain_lines(output.text)][:3]
            if output.output_type == "error":
                output.traceback = [ANSI.sub("", line).replace(f"{ROOT}{os.sep}", "") for line in output.traceback]
            data = output.get("data", {})
            # JupyterLab shows "Error displaying widget: model not found" for a stored view; the HTML beside it stays.
            if data.pop(WIDGET_VIEW, None) is not None and "text/html" not in data:
                notes.append(f"cell {index} shows a widget that has no plain HTML form")
            if "image/png" in data:
                data["image/png"] = smaller_png(data["image/png"])
            if output.output_type == "stream":
                output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)  # progress bars draw over themselves
        cell.outputs = [
            o for o in cell.outputs if not (o.output_type == "stream" and (o.name == "stderr" or not o.text))
        ]
    return notes


def joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Pieces of one stream put together again: a kernel sends what was printed whenever it likes."""
    result: list[NotebookNode] = []
    for output in outputs:
        last = result[-1] if result else None
        if output.output_type == "stream" and last is not None and last.get("name") == output.name:
            last.text += output.text
        else:
            result.append(output)
    return result


def plain_lines(stderr: str) -> list[str]:
    """The lines of a stderr stream that are no progress bars."""
    lines = (ANSI.sub("", line).strip() for line in re.split(r"[\r\n]+", stderr))
    return [line for line in lines if line and not PROGRESS_BAR.search(line)]


def smaller_png(encoded: str) -> str:
    """A picture with a palette of 256 colours where nobody would see it, else the same picture packed tighter."""
    from PIL import Image, ImageChops, ImageStat

    raw = base64.b64decode(encoded)
    picture = Image.open(io.BytesIO(raw))
    if picture.mode == "RGBA" and picture.getextrema()[3] == (255, 255):
        picture = picture.convert("RGB")
    small = picture
    if picture.mode == "RGB":
        small = picture.quantize(256, dither=Image.Dither.NONE)
        if max(ImageStat.Stat(ImageChops.difference(picture, small.convert("RGB"))).rms) > 1.5:  # of 255
            small = picture
    packed = io.BytesIO()
    small.save(packed, "png", optimize=True)
    best = min(raw, packed.getvalue(), key=len)
    return base64.b64encode(best).decode()


def write(nb: NotebookNode, path: Path) -> None:
    """Replace the file in one step, so that an interruption leaves the old notebook whole."""
    from canopyq.disk import write_atomic  # brings torch, which checking notebooks does not need

    write_atomic(path, (nbformat.writes(nb).rstrip("\n") + "\n").encode())


def execute(path: Path) -> list[str]:
    """Run ``path``, clean it, write it back. Returns notes for the author; raises `NotebookError`, writing nothing."""
    nb = nbformat.read(path, as_version=4)
    run(nb, path)
    notes = clean(nb)
    write(nb, path)
    return notes


# --- the guards ------------------------------------------------------------------------------------------------------


def code_cells(nb: NotebookNode) -> Iterator[NotebookNode]:
    return (cell for cell in nb.cells if cell.cell_type == "code")


def parse(source: str) -> ast.Module | None:
    """The syntax tree of a cell, IPython's magics and shell lines included; None for a cell that is not Python."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return None


def must_show(source: str) -> bool:
    """Whether a cell always displays something: it prints or plots, or ends in an expression without a ``;``."""
    tree = parse(source)
    if tree is None or not tree.body:
        return False
    last = tree.body[-1]
    if isinstance(last, ast.Expr) and not re.search(r";\s*(#.*)?$", source.rstrip()):
        return True
    todo: list[ast.stmt] = list(tree.body)
    while todo:  # what runs in any case: not the bodies of functions, nor the branches of an if
        statement = todo.pop()
        if isinstance(statement, ast.With | ast.For):
            todo += statement.body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            function = statement.value.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name in ("print", "display", "show"):
                return True
    return False


def ignores_output(cell: NotebookNode) -> bool:
    return "nbval-ignore-output" in cell.metadata.get("tags", []) or "# NBVAL_IGNORE_OUTPUT" in cell.source


def is_checks(cell: NotebookNode) -> bool:
    """Whether a cell only asserts what the cells above have shown: its source is collapsed, and it has no output."""
    return cell.cell_type == "code" and "checks" in cell.metadata.get("tags", [])


def is_hidden(cell: NotebookNode) -> bool:
    """Whether JupyterLab and the book show a cell's source only to those who open it."""
    return bool(cell.metadata.get("jupyter", {}).get("source_hidden"))


def asserted_names(source: str) -> set[str]:
    """The names that a cell's asserts read."""
    tree = parse(source)
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)] if tree else []
    return {name.id for node in asserts for name in ast.walk(node) if isinstance(name, ast.Name)}


def set_names(source: str) -> set[str]:
    """The names that a cell gives a value."""
    tree = parse(source)
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} if tree else set()


def texts(output: NotebookNode) -> Iterator[str]:
    """Everything in an output that a reader sees as text."""
    yield output.get("text", "")
    yield "\n".join(output.get("traceback", []))
    for mime, value in output.get("data", {}).items():
        if mime.startswith("text/") and isinstance(value, str):
            yield value


def cell_problems(cell: NotebookNode, checked: set[str] = frozenset()) -> Iterator[str]:
    """What is wrong with one code cell and its stored outputs; ``checked`` are the names that later checks assert."""
    tags = cell.metadata.get("tags", [])
    if "nbval-skip" in tags or "skip-execution" in tags:
        yield "is tagged to be skipped, so nothing checks it; use nbval-ignore-output and an assert"
    tree = parse(cell.source)
    asserts = tree and any(isinstance(node, ast.Assert) for node in ast.walk(tree))
    if ignores_output(cell) and not asserts and not set_names(cell.source) & checked:
        yield "is tagged nbval-ignore-output, and neither it nor a cell of checks asserts anything of it"
    if is_checks(cell) and not (asserts and is_hidden(cell) and not cell.outputs):
        yield "is tagged checks: it has to assert something, to show nothing, and to be collapsed"
    if not cell.outputs and "silent" not in tags and must_show(cell.source):
        yield "holds no output; execute the notebook, or end the last line with ; or tag the cell silent"
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "error" and "raises-exception" not in tags:
            yield f"holds an error: {output.ename}: {output.evalue}"
        if output.output_type == "stream" and output.name == "stderr":
            yield "holds stderr text"
        if output.output_type == "stream" and PROGRESS_BAR.search(output.text):
            yield "holds a progress bar; execute it by this tool, which leaves bars out"
        if WIDGET_VIEW in data:
            yield "holds a widget view, which no reader without a kernel can see"
        plain = data.get("text/plain", "")
        if LEFTOVER_REPR.search(plain) and output.output_type == "execute_result":
            yield f"shows {plain.splitlines()[0][:60]!r}; end it with plt.show()"
        if WIDGET_REPR.match(plain) and "text/html" not in data:
            yield "shows a widget that has no plain HTML form"
        for path in sorted({match for text in texts(output) for match in PRIVATE_PATH.findall(text)}):
            if not path.startswith("/tmp/ipykernel_"):
                yield f"shows a path of the machine it ran on: {path}"


def ends_in_recap(nb: NotebookNode) -> bool:
    """Whether a heading with the word recap stands in one of the last four cells."""
    tail = [cell.source for cell in nb.cells[-4:] if cell.cell_type == "markdown"]
    return any(re.search(r"^#+ .*\brecap\b", source, re.IGNORECASE | re.MULTILINE) for source in tail)


def problems(path: Path) -> list[str]:
    """Every reason why the notebook should not be committed as it is; none for a good one."""
    try:
        nb = nbformat.read(path, as_version=4)
        nbformat.validate(nb)
    except Exception as error:  # whatever a file that is no notebook makes nbformat raise
        return [f"is no valid notebook: {str(error).splitlines()[0]}"]
    found = []
    if (size := path.stat().st_size) >= MAX_BYTES:
        found.append(f"is {size / 2**20:.2f} MiB; the limit is 1 MiB: fewer or smaller pictures")
    if "widgets" in nb.metadata:
        found.append("holds widget state, which makes code hosts say 'Invalid Notebook'")
    if not ends_in_recap(nb):
        found.append("does not end in a recap (a heading with that word in one of its last four cells)")
    cells = list(code_cells(nb))
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        wrong = next(i for i, count in enumerate(counts) if count != i + 1)
        found.append(f"was not executed top to bottom: code cell {wrong + 1} has execution count {counts[wrong]}")
    teaching = [cell for cell in cells if not is_checks(cell)]
    shown = sum(bool(cell.outputs) for cell in teaching)
    if not cells or shown < MIN_SHARE_WITH_OUTPUT * len(teaching):
        found.append(f"holds outputs in {shown} of {len(teaching)} code cells; at least 60 % should show something")
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "code":
            later = (asserted_names(c.source) for c in nb.cells[index + 1 :] if is_checks(c))
            found += [f"cell {index} {problem}" for problem in cell_problems(cell, set().union(*later))]
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["execute", "check"])
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; default: all of notebooks/")
    options = parser.parse_args(arguments)
    files = options.files or [*sorted(FOLDER.glob("*.ipynb")), *sorted(APPENDICES.glob("*.ipynb"))]
    if not files:
        print(f"no notebooks in {FOLDER}")
        return 1
    failed = False
    for path in files:
        start = time.perf_counter()
        try:
            notes = execute(path) if options.action == "execute" else []
        except (NotebookError, OSError) as error:
            print(f"{path.name:<40} FAILED, left as it was: {error}", flush=True)
            return 1
        found = problems(path)
        failed |= bool(found)
        took = f"{time.perf_counter() - start:6.1f} s" if options.action == "execute" else ""
        size = f"{path.stat().st_size / 1024:5.0f} KiB" if path.exists() else ""
        print(f"{path.name:<40} {took} {size}  {'WRONG' if found else 'ok'}", flush=True)
        for line in [*found, *(f"note: {note}" for note in notes)]:
            print(f"    {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
