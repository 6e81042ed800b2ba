"""Round-to-nearest from disk to disk, tensor by tensor: a checkpoint of any size in the memory of one layer."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from canopyq import checks
from canopyq.checkpoint.files import CONFIG, GENERATION, INDEX, Checkpoint, raise_not_finite
from canopyq.checkpoint.headers import read_json
from canopyq.checkpoint.layout import disk_format, to_disk
from canopyq.checkpoint.output import Work, Writer, fingerprint, refuse_not_empty
from canopyq.checkpoint.plan import SHARD_BYTES, Plan, Step, make_plan
from canopyq.errors import CanopyError, prefixed
from canopyq.memory import human
from canopyq.tensor.quantized_tensor import global_scale_of, quantize
from canopyq.tensor.scheme import Recipe
from canopyq.utils import track

# What a model needs beside its weights. Never code.
COPIED = (GENERATION, "tokenizer*.json", "tokenizer.model*", "*tokens*.json", "vocab.*", "merges.txt",
          "*.tiktoken", "spiece.model", "*.spm", "chat_template*", "*processor_config.json", "LICENSE*",
          "NOTICE*", "tekken.json", "additional_chat_templates/*.jinja")  # fmt: skip
SMALL = 20_000_000  # bytes of room for headers and config


@dataclass(frozen=True)
class Streamed:
    """What `quantize_checkpoint` did: its plan, where the result lies, how many files an earlier run had finished."""

    plan: Plan
    folder: Path
    resumed: int


def quantize_checkpoint(
    source: Path | str,
    recipe: str | Recipe,
    out: Path | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> Streamed:
    """Quantize the checkpoint in the folder ``source`` into the new folder ``out``, without ever loading it.

    The result is, tensor by tensor, what `quantize_` and saving give. ``out`` appears when all of it is on the disk.
    After an interruption of any kind the same call continues with the first file that is not finished.

    Args:
        source: a folder with config.json and safetensors.
        recipe: how the weights are quantized.
        out: absent, or an empty folder.
        shard_bytes: the most bytes of tensors in one file of the result.
        say: is given what will be done, before it is done, in lines to print.

    Raises:
        CanopyError: for everything that `make_plan` refuses, too little room on the disk (nothing is written then),
            NaN or infinite weights, a source that changes meanwhile, a disk that cannot be written to.
    """
    plan, work = prepare(source, recipe, out, shard_bytes=shard_bytes, say=say)
    todo = {file: steps for file, steps in plan.shards.items() if file not in work.finished}
    resumed = len(plan.shards) - len(todo)
    with _told_how_to_continue(work), work.open() as folder:
        count = sum(len(steps) for steps in todo.values())
        steps = track((step for file in todo for step in todo[file]), f"quantizing to {plan.recipe.name}", count)
        try:
            for file, own in todo.items():
                with Writer(folder / file, {name: of for step in own for name, of in step.outputs.items()}) as writer:
                    for step in islice(steps, len(own)):
                        _do(step, plan, writer)
                work.finish(file)
            if fingerprint(plan.source) != work.terms["source"]:
                raise CanopyError(f"{plan.source.folder} was changed while it was read; start again")
        except CanopyError:
            work.remove()  # it would end the same way again
            raise
        _write_rest(plan, folder)
        work.become()
    return Streamed(plan, work.out, resumed)


def prepare(
    source: Path | str,
    recipe: str | Recipe,
    out: Path | str,
    *,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Plan, Work]:
    """All that `quantize_checkpoint` does before it writes: what will be done, and whether it can be."""
    from canopyq import __version__

    recipe = Recipe.of_weights(recipe)
    checks.count("shard_bytes", shard_bytes, 1, 10**15), checks.function("say", say)
    refuse_not_empty(out)
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, recipe, shard_bytes)
    outputs = {file: [(s.name, sorted(map(str, s.outputs.items()))) for s in own] for file, own in plan.shards.items()}
    terms = {
        "source": fingerprint(checkpoint),
        "recipe": repr(plan.recipe),
        "list of files": hashlib.sha256(repr(outputs).encode()).hexdigest(),
        "version": f"canopyq {__version__}, torch {torch.__version__}",
    }
    work = Work(out, terms)
    left = sum(step.nbytes for file, own in plan.shards.items() if file not in work.finished for step in own)
    work.check_space(left + SMALL + sum(file.stat().st_size for file in _copied(checkpoint.folder)))
    say(str(plan))
    if work.changed:
        say(f"  starting over: {work.folder} is of no use, {' and '.join(work.changed)}")
    elif work.finished:
        say(f"  continuing: {len(work.finished)} of {len(plan.shards)} files were finished before; {human(left)} left")
    return plan, work


def _do(step: Step, plan: Plan, writer: Writer) -> None:
    """Write what becomes of one tensor."""
    layer = step.layer
    if layer is None and step.name not in plan.source.derived:
        writer.copy(step.name, step.file, step.info)
        return
    if layer is None:
        tensor = plan.source.read(step.name)
        raise_not_finite(tensor, step.name)
        writer.write(step.name, tensor)
        return
    with prefixed(f"{layer.name}: "):
        weight = plan.source.read(step.name)
        weight = weight.t().contiguous() if layer.kind.transposed else weight
        global_scale = None
        if len(step.together) > 1:
            global_scale = global_scale_of(map(plan.source.read, step.together), layer.weights)
        quantized = quantize(weight, layer.weights, global_scale=global_scale)
        parts = to_disk(quantized, step.info.torch_dtype, disk_format(layer.weights, layer.activations))
    for part, tensor in parts.items():
        name = f"{layer.name}.{part}"
        announced, _ = step.outputs[name]
        # A scale that by chance is exact in a narrower dtype keeps the one whose bytes were counted.
        writer.write(name, tensor if tensor.dtype.itemsize == announced.itemsize else tensor.to(announced))


def _write_rest(plan: Plan, folder: Path) -> None:
    """Everything beside the weights: config, index, tokenizer."""
    cache = {} if plan.recipe.cache is None else {"canopyq_cache": plan.recipe.cache}
    own = {name: value for name, value in plan.source.config.items() if name != "compression_config"}
    _write_json(folder / CONFIG, own | cache | {"quantization_config": plan.config})
    if len(plan.shards) > 1:
        weight_map = {name: file for file, own in plan.shards.items() for step in own for name in step.outputs}
        index = {"metadata": {"total_size": plan.bytes_after}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)
    for file in _copied(plan.source.folder):
        place = folder / file.relative_to(plan.source.folder)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def _copied(folder: Path) -> list[Path]:
    """The files beside the weights that go into the result.

    Raises:
        CanopyError: for a link that leads out of the folder, to what may be nobody else's business: only links within
            it are followed, and those of the hub's cache, which lead from ``models--NAME/snapshots`` to its ``blobs``.
    """
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots" and inside[0].parent.parent.name.startswith("models--"):
        inside.append(inside[0].parent.parent / "blobs")
    found = sorted({file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()})
    for file in found:
        if file.name == GENERATION:
            read_json(file)  # or nobody can load the result
        if not any(file.resolve().is_relative_to(place) for place in inside):
            raise CanopyError(f"{file} is a link that leads out of its folder, and is not copied; put the file there")
    return found


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _told_how_to_continue(work: Work) -> Iterator[None]:
    """An error of the disk becomes one line that names the cure."""
    try:
        yield
    except OSError as error:
        where = error.filename or work.folder
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"the disk is full, so {work.out} was not made; make room"
        else:
            problem = f"{where}: {error.strerror or error}, so {work.out} was not made; mend that"
        raise CanopyError(
            f"{problem} and run the same command again: it continues from {work.folder}, which you may delete instead"
        ) from None
