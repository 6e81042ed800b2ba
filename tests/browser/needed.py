"""What of a lesson its widgets need: the browser runs those statements, and `make check-notebooks` runs all of them."""

from __future__ import annotations

import ast
import symtable
from collections.abc import Iterator

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from tools.notebooks import parse

WIDGETS = {"quiz", "exercise", "explore", "predict", "capstone", "progress"}


def what_widgets_need(nb: NotebookNode) -> list[NotebookNode]:
    """The code cells without every statement that makes no widget, imports nothing and sets no name that a later kept
    statement reads, and without those cells of which nothing is left.

    A name is set where it is assigned, defined, deleted, changed through an index or an attribute, by a method whose
    result is dropped (``rows.append(…)``), or by a function whose name ends in ``_``. A function that changes names may
    run anywhere in its cell, as a hook does, so then all of the cell stays. What this overlooks is an error in the
    browser.
    """
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    trees = [parse(cell.source) for cell in code]
    modules = {name for tree in trees for node in ast.walk(tree) for name in _imported(node)}
    cells: list[NotebookNode] = []
    wanted: set[str] = set()
    for cell, tree in zip(reversed(code), reversed(trees), strict=True):
        body, lines = tree.body, cell.source.splitlines()
        kept, before = _needed(body, wanted, modules)
        if any(map(_changed_by_functions, kept)):
            kept, before = body, wanted.union(*(_names(statement, read=True) for statement in body))
        if kept:
            wanted = before
            if _shows_a_name(body[-1]) and body[-1] not in kept and any(map(_makes_a_widget, kept)):
                kept = [*kept, body[-1]]
            cells.insert(0, new_code_cell("\n".join("\n".join(lines[x.lineno - 1 : x.end_lineno]) for x in kept)))
    return cells


def _needed(body: list[ast.stmt], after: set[str], modules: set[str]) -> tuple[list[ast.stmt], set[str]]:
    """What to keep of a cell for the names that are wanted after it, and the names that are wanted before it."""
    kept, wanted = [], set(after)
    for statement in reversed(body):
        assigned = set(_assigned(statement))
        imports = isinstance(statement, ast.Import | ast.ImportFrom)  # all of them, which a reader's answer may use
        if imports or _makes_a_widget(statement) or wanted & (assigned | _changed(statement) - modules):
            wanted = wanted - assigned | _names(statement, read=True)
            kept.insert(0, statement)
    return kept, wanted


def _makes_a_widget(statement: ast.stmt) -> bool:
    calls = (node for node in ast.walk(statement) if isinstance(node, ast.Attribute))
    return any(node.attr in WIDGETS and _root(node) == "lessons" for node in calls)


def _shows_a_name(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name)


def _root(node: ast.expr) -> str | None:
    """``a`` for ``a``, ``a.b``, ``a[0].b`` and ``a.b()``."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Starred | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)


def _assigned(statement: ast.stmt) -> Iterator[str]:
    """The names that have a new value in any case once this statement has run."""
    yield from _imported(statement)
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    elif isinstance(statement, ast.With):
        for inner in statement.body:
            yield from _assigned(inner)
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (x.id for at in targets for x in ast.walk(at) if isinstance(x, ast.Name) and _stored(x))


def _stored(node: ast.expr) -> bool:
    return not isinstance(node.ctx, ast.Load)


def _changed(statement: ast.stmt) -> set[str]:
    """The names of the notebook whose value this statement may change, and those that it may give one."""
    found = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript) and _stored(node):
            found.add(_root(node))
        if isinstance(node, ast.Expr | ast.Lambda):  # a call whose result is dropped
            call = node.value if isinstance(node, ast.Expr) else node.body
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                found.add(_root(call.func))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("_"):
            found |= {_root(argument) for argument in node.args}
    return found & _names(statement)


def _changed_by_functions(statement: ast.stmt) -> set[str]:
    """Those that a function may change that is defined here."""
    functions = (node for node in ast.walk(statement) if isinstance(node, ast.FunctionDef | ast.Lambda))
    bodies = (node.body if isinstance(node, ast.FunctionDef) else [ast.Expr(node)] for node in functions)
    return {name for body in bodies for inner in body for name in _changed(inner)} & _names(statement)


def _names(statement: ast.stmt, read: bool = False) -> set[str]:
    """The notebook's names in a statement, those that are local to a function or a comprehension left out."""
    top = symtable.symtable(ast.unparse(statement), "cell", "exec")
    found, inner = {s.get_name() for s in top.get_symbols() if s.is_referenced() or not read}, top.get_children()
    while inner:
        table = inner.pop()
        found |= {s.get_name() for s in table.get_symbols() if s.is_global()}
        inner += table.get_children()
    return found
