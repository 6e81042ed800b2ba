"""Rotation: turn the residual stream so that no channel is louder than the others.

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs". An RMS norm without gain commutes with a
rotation R, and one that takes the mean away with an R that leaves the mean of all channels alone. So the stream may be
turned where it is written (embedding, o_proj, down_proj) and turned back where it is read (q, k, v, gate, up, head),
all in the weights and before the model is used. The gains are folded into the readers first. The values of each head
are turned in v_proj and back in o_proj the same way. What goes into down_proj is a product of two outputs and cannot be
turned in a weight: there the Hadamard transform runs with the model, and only if asked for.

Integers that share a scale with a whole token are the better for values that are all alike. A block of FP4 has a scale
for 32 or 16 neighbours, so that a loud channel harms no other block, until a rotation of all channels takes it to
every one. With inputs in FP4 R turns each block in itself (Egiazarian et al. 2025, "Bridging the Gap Between Promise
and Performance for Microscaling FP4 Quantization").
"""

from __future__ import annotations

from collections.abc import Collection
from math import gcd

import torch
from torch import Tensor, nn

from canopyq.errors import CanopyError
from canopyq.methods.equivalence import ScalePair, turn_inputs, turn_outputs
from canopyq.methods.structure import probe_ids, scale_pairs
from canopyq.methods.transaction import Transaction
from canopyq.methods.trial import Trial, reads
from canopyq.nn.hadamard import OnlineHadamard, hadamard, largest_power_of_two
from canopyq.nn.sites import Site, output_heads, weight_sites
from canopyq.tensor.formats import BlockFormat
from canopyq.tensor.scheme import Recipe
from canopyq.utils import eval_mode


def random_rotation(
    size: int, generator: torch.Generator, block: int | None = None, *, keep_mean: bool = False
) -> Tensor:
    """An orthogonal matrix (size, size), float64, that spreads every channel over all others, or over its neighbours in
    runs of `run_of` (size, ``block``). With ``keep_mean`` it leaves the channels' mean as it is.

    A Hadamard matrix with random signs for a power of two; otherwise one of the odd factor's size, drawn at random, in
    Kronecker product with the Hadamard matrix of the rest.
    """
    if (run := run_of(size, block)) < size:
        parts = (random_rotation(run, generator, keep_mean=keep_mean) for _ in range(size // run))
        return torch.block_diag(*parts)
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if keep_mean:  # turn the mean to the first axis by a reflection, rotate all others, and turn it back
        axis = -torch.full((size,), size**-0.5, dtype=torch.float64)
        axis[0] += 1
        reflection = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(axis, axis) / axis.square().sum()
        inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random_rotation(size - 1, generator))
        return reflection @ inner @ reflection
    power = largest_power_of_two(size)
    odd = size // power
    mixed = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q.contiguous()
    spread = hadamard(torch.eye(power, dtype=torch.float64), power)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1
    return signs * torch.kron(mixed, spread)


def run_of(size: int, block: int | None) -> int:
    """How many neighbours of ``size`` channels are turned together so that none leaves its ``block``: of a head of 80
    values and blocks of 32, where every second head begins within a block, 16. All without a block."""
    return gcd(size, block) if block else size


def needs_online(recipe: Recipe) -> bool:
    """Whether inputs are so coarse that those of down_proj, which no weight can turn, have to be turned at run time."""
    return recipe.activations is not None and recipe.activations.format.bits < 8


def block_of(recipe: Recipe) -> int | None:
    """The block that a rotation stays within; None if it turns all channels at once."""
    fmt = recipe.activations and recipe.activations.format
    return fmt.block_size if isinstance(fmt, BlockFormat) else None


@torch.no_grad()
def rotate_(
    model: nn.Module, transaction: Transaction, *, seed: int = 0, online: bool = False, block: int | None = None
) -> list[str]:
    """Rotate a model in place; its outputs stay the same, to rounding.

    Args:
        model: that runs whole on token ids, and whose blocks read the residual stream through norms alone.
        transaction: takes the changes back if something later fails.
        seed: of the random signs.
        online: also transform what goes into down_proj while the model runs. `OnlineHadamard` hooks do it until the
            layer is quantized.
        block: turn each block of so many neighbours in itself, in the runs of `run_of`; None turns all channels.

    Returns:
        What was done, in lines for the report.

    Raises:
        CanopyError: for a model of which that is not so, which is tried on a few tokens; what was changed until then
            is for the transaction to take back.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs, left = scale_pairs(model, "rotation")
    before, last = _logits(model), _last_norm(model)
    if apart := [why for where, why in left.items() if not any(where.startswith(f"{name}.") for name in pairs)]:
        raise CanopyError(f"{apart[0]}; rotation turns what every block reads and writes; use awq, gptq, clip or hqq")
    notes = _untie(model, transaction)
    (head,) = output_heads(model)
    hidden, final = head.weight.shape[1], model.get_submodule(last)
    norms = [pair for own in pairs.values() for pair in own if pair.is_norm and len(pair.gain) == hidden]
    offset = next((pair.offset for pair in norms), 0.0)
    norms.append(ScalePair(last, final.weight, getattr(final, "bias", None), {"": head.weight}, torch.empty(0), offset))
    for pair in norms:
        _fold(pair, transaction)

    device = head.weight.device
    keep_mean = any(_takes_mean(model.get_submodule(pair.name), hidden) for pair in norms)
    stream = random_rotation(hidden, generator, block, keep_mean=keep_mean).to(device)
    _turn_embeddings(model, pairs, stream, transaction)
    for pair in norms:
        if pair.bias is not None:
            transaction.change(pair.bias, pair.bias.double() @ stream)
    readers = {name: weight for pair in norms for name, weight in pair.consumers.items()}
    for weight in readers.values():
        turn_inputs(weight, stream, transaction)
    writers = _writers(model, pairs, readers, hidden)
    for site in writers.values():
        turn_outputs(site.weight, site.bias(), stream, transaction)
    heads = [pair for own in pairs.values() for pair in own if pair.head]
    for pair in heads:
        values = random_rotation(pair.head, generator, block).to(device)
        turn_outputs(pair.gain, pair.bias, values, transaction)
        for weight in pair.consumers.values():
            turn_inputs(weight, values, transaction)

    def turned(size: int) -> str:
        return f"{size} in blocks of {run_of(size, block)}" if block else f"{size}"

    sizes = ", ".join(turned(size) for size in sorted({pair.head for pair in heads}))
    of_heads = f" and the values of each head ({sizes})" if heads else ""
    notes.append(f"rotated the residual stream ({turned(hidden)}){of_heads}")
    _require_same(model, before, norms, pairs)
    if online:
        values = {name for pair in heads for name in pair.consumers}
        notes += _turn_online([site for name, site in writers.items() if name not in values], transaction, block)
    return notes


def _logits(model: nn.Module) -> Tensor:
    with eval_mode(model):
        return next(iter(model(input_ids=probe_ids(model), use_cache=False).values())).double()


def _last_norm(model: nn.Module) -> str:
    """The name of the norm that the output head reads.

    Raises:
        CanopyError: if there is none, and for layers that did not run, such as a vision tower's, of which nothing says
            what they read or write.
    """
    names = {module: name for name, module in model.named_modules()}
    heads = [names[module] for module in output_heads(model)]
    trial = Trial(model, (), {"input_ids": probe_ids(model), "use_cache": False})
    with eval_mode(model):
        _, given, gave = trial.watched()
    if trial.silent:
        raise CanopyError(
            f"{trial.silent[0]} does not run on token ids alone, and rotation turns all that reads or writes the "
            "residual stream; use awq, gptq, clip or hqq"
        )
    read = given.get((heads[0], "")) if len(heads) == 1 else None
    norm = next((norm for norm, rows in gave.items() if read is not None and reads(read, rows)), None)
    if norm is None:
        raise CanopyError(
            f"no norm with a gain feeds the output head of {type(model).__name__}, and rotation needs one; use awq, "
            "gptq, clip or hqq"
        )
    return norm


def _require_same(model: nn.Module, before: Tensor, norms: list[ScalePair], blocks: Collection[str]) -> None:
    """Raise `CanopyError` if the logits have moved by more than rounding."""
    dtype = next(model.parameters()).dtype
    moved = float((_logits(model) - before).abs().max() / before.abs().max())
    if moved <= (1e-3 if dtype in (torch.float32, torch.float64) else 0.1):
        return
    size, folded = len(norms[0].gain), {pair.name for pair in norms}
    others = [
        name
        for name, module in model.named_modules()
        if (weight := getattr(module, "weight", None)) is not None and weight.shape == (size,) and name not in folded
    ]
    culprit = "more than norms and linear layers read and write it"
    if others:  # the first; in a block the outermost: those inside attention may be of queries and keys
        within = next((block for block in blocks if others[0].startswith(f"{block}.")), others[0])
        norm = min((name for name in others if name.startswith(within)), key=lambda name: name.count("."))
        culprit = f"{norm} scales channels for more than linear layers, as a post-norm does"
    raise CanopyError(
        f"{culprit}: rotation cannot turn the residual stream of {type(model).__name__}; use awq, gptq, clip or hqq"
    )


def _takes_mean(norm: nn.Module, size: int) -> bool:
    """Whether a norm of ``size`` channels takes the mean away."""
    x = torch.linspace(-1, 1, size, device=norm.weight.device, dtype=norm.weight.dtype)[None]
    return torch.allclose(norm(x + 1), norm(x), atol=0.05)


def _writers(
    model: nn.Module, pairs: dict[str, list[ScalePair]], readers: Collection[str], size: int
) -> dict[str, Site]:
    """The layers in blocks that put out channels of the stream."""
    return {
        f"{block}.{site.name}": site
        for block in pairs
        for site in weight_sites(model.get_submodule(block))
        if site.kind.multiplies and site.shape[0] == size and f"{block}.{site.name}" not in readers
    }


def _turn_embeddings(
    model: nn.Module, pairs: dict[str, list[ScalePair]], stream: Tensor, transaction: Transaction
) -> None:
    """Those of tokens and of positions that are not in a block."""
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in pairs)
        if isinstance(module, nn.Embedding) and not inside and module.weight.shape[1] == len(stream):
            turn_inputs(module.weight, stream, transaction)


def _turn_online(sites: list[Site], transaction: Transaction, block: int | None) -> list[str]:
    """Have what goes into layers such as down_proj transformed at run time."""
    alone = [site for site in sites if site.kind.is_linear]
    sizes = set()
    for site in alone:
        sizes.add(size := min(largest_power_of_two(site.shape[1]), block or site.shape[1]))
        transaction.change(site.weight, hadamard(site.weight.double(), size))
        transaction.on_failure(site.module.register_forward_pre_hook(OnlineHadamard(size)).remove)
    at, left = ", ".join(map(str, sorted(sizes))), len(sites) - len(alone)
    said = [f"down_proj's inputs pass a Hadamard transform of {at} at run time: plain transformers cannot do it"]
    return (said if sizes else []) + ([f"inputs of {left} experts' down_proj stay as they are"] if left else [])


def _untie(model: nn.Module, transaction: Transaction) -> list[str]:
    """Give the head a weight of its own: the final gain is folded into it, and not into the embedding."""
    (head,), embedding = output_heads(model), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return []
    config, shared, tied = model.config, head.weight, getattr(model.config, "tie_word_embeddings", True)

    def tie() -> None:
        head.weight, config.tie_word_embeddings = shared, tied

    transaction.on_failure(tie)
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    config.tie_word_embeddings = False
    return [f"the head no longer shares the embedding's weight: {shared.nbytes:,} bytes more"]


def _fold(norm: ScalePair, transaction: Transaction) -> None:
    """Move a norm's gain into the layers that read it."""
    gain = norm.gain.double() + norm.offset
    for weight in norm.consumers.values():
        transaction.change(weight, weight.double() * gain)
    if norm.bias is not None:
        if bool((norm.bias[gain == 0] != 0).any()):
            raise CanopyError(f"rotation folds gains, and {norm.name} has channels of gain 0 with a bias")
        transaction.change(norm.bias, torch.where(gain == 0, 0, norm.bias / gain))
    transaction.change(norm.gain, torch.full_like(norm.gain, 1 - norm.offset))
