"""Which channels of a model can be rescaled, found by trying: no architecture has to be known for it.

Each decoder block runs alone, in float64, on what the model gave it for a few tokens. A layer whose inputs are rows of
what a norm put out reads that norm. A layer whose inputs grow by s when rows of another layer's weight grow by s reads
these rows, channel by channel. Whether nothing else reads them, such as the residual stream, is tried too: what the
block puts out must not move when both sides are rescaled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from canopyq.calibration.blocks import call, find_blocks
from canopyq.calibration.data import Batch
from canopyq.errors import CanopyError, one_line
from canopyq.methods.equivalence import ScalePair, divide, rescale, turn_inputs, turn_outputs
from canopyq.methods.transaction import Transaction
from canopyq.methods.trial import Group, Trial, reads
from canopyq.nn.offload import input_device
from canopyq.nn.sites import weight_holders, weight_sites
from canopyq.utils import eval_mode

PROBE = 16  # tokens that a block is tried on
KEPT = 1e-3  # of what one side of a change does alone: if both do no more, they cancel out


@torch.no_grad()
def scale_pairs(model: nn.Module, what: str) -> tuple[dict[str, list[ScalePair]], dict[str, str]]:
    """The pairs that each block of a model has.

    Args:
        what: needs them, for messages.

    Returns:
        Block -> its pairs, in the order in which data passes them; and what has none -> the reason: a block that does
        not run alone, or a layer that reads a norm which cannot be rescaled.

    Raises:
        CanopyError: for a model that does not run block by block, or has no such pair; with the reason.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[str, list[ScalePair]] = {}
    left: dict[str, str] = {}
    with eval_mode(model):
        for name, (args, kwargs) in _calls(model, what).items():
            trial = Trial(model.get_submodule(name), args, kwargs)
            try:
                search = _searched(trial, _head_sizes(model))
            except Exception as error:  # the model's own code
                left[name] = f"{name}: it does not run alone ({one_line(error)})"
                continue
            shared = {
                name
                for holder in weight_holders(trial.block)
                if any(uses[id(tensor)] > 1 for tensor in holder.tensors.values())
                for name in (holder.name, *(site.name for site in holder.sites))
            }
            tensors = trial.tensors()
            found[name] = [_bind(p, tensors, name) for p in search.found if not shared & {p.name, *p.consumers}]
            left |= {f"{name}.{layer}": f"{name}.{reason}" for layer, reason in search.left.items()}
    if not any(found.values()):
        why = next(iter(left.values()), f"{type(model).__name__}: no layer alone reads a norm or another layer")
        raise CanopyError(
            f"{why}; {what} folds into neighbouring weights, and finds none in {type(model).__name__}; use "
            "gptq, clip or hqq"
        )
    return found, left


def probe_ids(model: nn.Module) -> Tensor:
    """Some token ids (1, T) of a model's vocabulary."""
    embedding = model.get_input_embeddings()
    ids = torch.randint(0, len(embedding.weight), (1, PROBE), generator=torch.Generator().manual_seed(0))
    return ids.to(input_device(model))


def _calls(model: nn.Module, what: str) -> dict[str, tuple[tuple, dict]]:
    """What each block is called with for a few tokens."""
    calls: dict[str, tuple[tuple, dict]] = {}
    try:
        if getattr(model, "get_input_embeddings", lambda: None)() is None:
            raise CanopyError(f"{what} tries its changes on a few tokens, and {type(model).__name__} has no embedding")
        ids = probe_ids(model)
        batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
        blocks = find_blocks(model, [site.name for site in weight_sites(model) if site.kind.multiplies], batch)
        if blocks is None:
            raise CanopyError(
                f"{type(model).__name__} has no list of blocks that runs alone, which {what} needs; use gptq or hqq"
            )
        modules = {model.get_submodule(name): name for name in blocks.names()}

        def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls[modules[module]] = (args, kwargs)

        handles = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in modules]
        try:
            call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    except CanopyError:
        raise
    except Exception as error:  # the model's own code
        raise CanopyError(f"{what} runs the model on token ids, which fails: {one_line(error)}") from None
    return calls


def _head_sizes(model: nn.Module) -> list[int]:
    """What the values of a head may have for a size, by the config."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    sizes = [getattr(config, "head_dim", None), getattr(config, "v_head_dim", None)]
    sizes.append(hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else None)
    return [size for size in sizes if isinstance(size, int) and size > 1]


def _bind(pair: ScalePair, tensors: dict[str, tuple[Tensor, Tensor | None]], block: str) -> ScalePair:
    """A pair that a search found in float64, with the model's own tensors and names."""
    gain, bias = (None if tensor is None else tensor[-len(pair.gain) :] for tensor in tensors[pair.name])
    consumers = {f"{block}.{name}": tensors[name][0] for name in pair.consumers}
    return replace(pair, name=f"{block}.{pair.name}", gain=gain, bias=bias, consumers=consumers)


def _searched(trial: Trial, head_sizes: list[int]) -> _Search:
    """The pairs of a block, in float64; in float32 where its code knows no other."""
    try:
        with trial.in_dtype(torch.float64):
            return _Search(trial, head_sizes)
    except (RuntimeError, TypeError):
        with trial.in_dtype(torch.float32):
            return _Search(trial, head_sizes)


class _Search:
    """The pairs of one block, ``found``; names are the block's own. ``left``: a layer that reads a norm -> which norm,
    and why it cannot be rescaled."""

    def __init__(self, trial: Trial, head_sizes: list[int]) -> None:
        self.trial, self.head_sizes = trial, head_sizes
        self.left: dict[str, str] = {}
        self.output, self.given, gave = self.trial.watched()
        self.names, self.tensors, self.order = self.trial.names, self.trial.tensors(), list(self.given)
        found = [entry for norm, rows in gave.items() for entry in self._of_norm(norm, rows)]
        found += [entry for group in self.order for entry in self._of_linear(group)]
        self.found = [pair for _, pair in sorted(found, key=lambda entry: entry[0])]

    def _of_norm(self, norm: str, rows: Tensor) -> Iterator[tuple[int, ScalePair]]:
        """The pair of a norm that put out ``rows``, and the place in the order of what reads it."""
        readers = [group for group in self.order if reads(self.given[group], rows)]
        names = [name for group in readers for name in self.names[group]]
        if not names:
            return
        silent = self.trial.silent  # such as experts of other tokens: nothing says whether they read the norm
        channels = torch.arange(rows.shape[1], device=rows.device)[:, None]
        pair = ScalePair(norm, *self.tensors[norm], {name: self.tensors[name][0] for name in names}, channels)
        for one in (pair, replace(pair, offset=1.0)):
            if not silent and self._keeps([one]):
                yield self.order.index(readers[0]), one
                return
        reason = f"{silent[0]} was not called, and may read it too" if silent else "more than linear layers read it"
        for name in names:
            self.left.setdefault(name, f"{norm}: {reason}")

    def _of_linear(self, group: Group) -> Iterator[tuple[int, ScalePair]]:
        """The pairs of a linear layer, or of each expert in one projection, with the layers that read all its outputs;
        of fused ones those that read the last of them, such as values or what a gate multiplies."""
        names, widths = self.names[group], {self.given[other].shape[1] for other in self.order if other != group}
        total = self.tensors[names[0]][0].shape[0]
        sizes = {total} if group[1] else {total, total // 2, *((total - width) // 2 for width in widths)}
        for size in sorted((s for s in sizes if s > 0 and any(width % s == 0 for width in widths)), reverse=True):
            rows = [(name, *(None if t is None else t[-size:] for t in self.tensors[name])) for name in names]
            made, scales = [ScalePair(*row, {}, torch.empty(0)) for row in rows], self._random(size)
            with Transaction(keep=False) as transaction:
                for pair in made:
                    divide(pair, 1 / scales, transaction)
                _, given, _ = self.trial.watched()
            fits = {other: groups for other in self.order if other != group and other in given
                    if (groups := _fitting(self.given[other], given[other], scales)) is not None}  # fmt: skip
            if group[1]:  # each expert's own
                fits = {other: groups for other, groups in fits.items() if other[0] == group[0]}
            if not fits:
                continue
            first = next(iter(fits.values()))
            read = [self.names[other] for other, groups in fits.items() if torch.equal(groups, first)]
            own = list(zip(*read, strict=True)) if group[1] else [[name for names in read for name in names]]
            pairs = [replace(pair, groups=first, consumers={name: self.tensors[name][0] for name in names})
                     for pair, names in zip(made, own, strict=True)]  # fmt: skip
            if self._keeps(pairs):
                runs = [run for run in self.head_sizes if size % run == 0 and len(pairs) == 1]
                head = next((run for run in runs if self._keeps(pairs, run)), 0)
                yield from ((self.order.index(next(iter(fits))), replace(pair, head=head)) for pair in pairs)
                return

    def _keeps(self, pairs: list[ScalePair], head: int = 0) -> bool:
        """Whether the block's output stays when the pairs are rescaled, or, with ``head``, turned in such runs."""
        scales = self._random(len(pairs[0].gain))
        with Transaction(keep=False) as transaction:
            for pair in pairs:
                divide(pair, scales, transaction)
            alone = self._moved()
        with Transaction(keep=False) as transaction:
            for pair in pairs:
                if not head:
                    rescale(pair, scales, transaction)
                    continue
                turn = torch.linalg.qr(scales[:head, None] ** torch.arange(head, device=scales.device)).Q
                turn_outputs(pair.gain, pair.bias, turn, transaction)
                for weight in pair.consumers.values():
                    turn_inputs(weight, turn, transaction)
            return 0 < alone < torch.inf and self._moved() <= KEPT * alone

    def _moved(self) -> float:
        """How far the output is from what it was."""
        both = zip(self.trial.run(), self.output, strict=True)
        return max((float((new - old).abs().max()) for new, old in both if old.numel()), default=0.0)

    def _random(self, size: int) -> Tensor:
        scales = torch.rand(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) * 1.5 + 0.5
        like = next(iter(self.given.values()))
        return scales.to(like.device, like.dtype)


def _fitting(before: Tensor, after: Tensor, scales: Tensor) -> Tensor | None:
    """How inputs (rows, K) read channels that have grown by ``scales``, if each grew as one of them did: the groups of
    a `ScalePair`; else None. Several inputs that read one channel do so in runs, of a head's size each."""
    size, width = len(scales), before.shape[1]
    if width % size or before.shape != after.shape or not bool(before.any()):
        return None
    for run in [size] if width == size else [run for run in range(1, size + 1) if size % run == 0]:
        groups = torch.arange(width, device=before.device).reshape(size // run, width // size, run)
        groups = groups.transpose(1, 2).reshape(size, width // size)
        wanted = before.clone()
        wanted[:, groups] *= scales[:, None]
        if torch.allclose(after, wanted, rtol=1e-4, atol=1e-6 * float(before.abs().max())):
            return groups
    return None
