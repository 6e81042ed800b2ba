"""Rotation: turn the residual stream so that no channel is louder than the others.

Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs". An RMS norm without gain commutes with a
rotation R, so the stream may be turned where it is written (embedding, o_proj, down_proj) and turned back where it is
read (q, k, v, gate, up, head), all in the weights and before the model is used. The gains are folded into the readers
first. The values of each head are turned in v_proj and back in o_proj the same way. What goes into down_proj is a
product of two outputs and cannot be turned in a weight: there the Hadamard transform runs with the model, and only if
asked for.

Integers that share a scale with a whole token are the better for values that are all alike. A block of FP4 has a scale
for 32 or 16 neighbours, so that a loud channel harms no other block, until a rotation of all channels takes it to
every one. With inputs in FP4 R turns each block in itself (Egiazarian et al. 2025, "Bridging the Gap Between Promise
and Performance for Microscaling FP4 Quantization").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from canopyq.methods.equivalence import require_known
from canopyq.methods.transaction import Transaction
from canopyq.nn.hadamard import OnlineHadamard, hadamard, largest_power_of_two
from canopyq.tensor.formats import BlockFormat
from canopyq.tensor.scheme import Recipe


def random_rotation(size: int, generator: torch.Generator, block: int | None = None) -> Tensor:
    """An orthogonal matrix (size, size), float64, that spreads every channel over all others, or over those of its
    ``block`` of neighbours where blocks divide the size.

    A Hadamard matrix with random signs for a power of two; otherwise one of the odd factor's size, drawn at random, in
    Kronecker product with the Hadamard matrix of the rest.
    """
    if block and size % block == 0:
        return torch.block_diag(*(random_rotation(block, generator) for _ in range(size // block)))
    power = largest_power_of_two(size)
    odd = size // power
    mixed = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q.contiguous()
    spread = hadamard(torch.eye(power, dtype=torch.float64), power)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1
    return signs * torch.kron(mixed, spread)


def needs_online(recipe: Recipe) -> bool:
    """Whether inputs are so coarse that those of down_proj, which no weight can turn, have to be turned at run time."""
    return recipe.activations is not None and recipe.activations.format.bits < 8


def block_of(recipe: Recipe) -> int | None:
    """The block that a rotation stays within; None if it turns all channels at once."""
    fmt = recipe.activations and recipe.activations.format
    return fmt.block_size if isinstance(fmt, BlockFormat) else None


def rotate_(
    model: nn.Module, transaction: Transaction, *, seed: int = 0, online: bool = False, block: int | None = None
) -> list[str]:
    """Rotate a model in place; its outputs stay the same, to rounding.

    Args:
        model: of an architecture that `equivalence` knows.
        transaction: takes the changes back if something later fails.
        seed: of the random signs.
        online: also transform what goes into down_proj while the model runs. `OnlineHadamard` hooks do it until the
            layer is quantized.
        block: turn each block of so many neighbours in itself; None turns all channels.

    Returns:
        What was done, in lines for the report.

    Raises:
        CanopyError: for another architecture.
    """
    require_known(model, "rotation")
    generator = torch.Generator().manual_seed(seed)
    config, body, head = model.config, model.model, model.lm_head
    notes = _untie(model, transaction)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fold(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), transaction)
        _fold(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), transaction)
    _fold(body.norm, (head,), transaction)

    device = body.embed_tokens.weight.device
    stream = random_rotation(config.hidden_size, generator, block).to(device)
    _turn_inputs(body.embed_tokens, stream, transaction)
    _turn_inputs(head, stream, transaction)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            _turn_inputs(reader, stream, transaction)
        for writer in (attention.o_proj, mlp.down_proj):
            _turn_outputs(writer, stream, transaction)
        values = random_rotation(attention.head_dim, generator, block).to(device)
        _turn_outputs(attention.v_proj, values, transaction)
        _turn_inputs(attention.o_proj, values, transaction)
    notes.append(
        f"rotated the residual stream ({config.hidden_size}) and the values of each head ({attention.head_dim})"
        + (f" in blocks of {block}" if block else "")
    )
    if online:
        size = min(largest_power_of_two(config.intermediate_size), block or config.intermediate_size)
        for layer in body.layers:
            down = layer.mlp.down_proj
            transaction.change(down.weight, hadamard(down.weight.double(), size))
            hook = OnlineHadamard(size)
            transaction.on_failure(down.register_forward_pre_hook(hook).remove)
        notes.append(
            f"down_proj's inputs pass a Hadamard transform of {size} at run time: plain transformers cannot do it"
        )
    return notes


def _untie(model: nn.Module, transaction: Transaction) -> list[str]:
    """Give the head a weight of its own: the final gain is folded into it, and not into the embedding."""
    head, embedding = model.lm_head, model.model.embed_tokens
    if head.weight is not embedding.weight:
        return []
    config, shared, tied = model.config, head.weight, model.config.tie_word_embeddings

    def tie() -> None:
        head.weight, config.tie_word_embeddings = shared, tied

    transaction.on_failure(tie)
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    config.tie_word_embeddings = False
    return [f"the head no longer shares the embedding's weight: {shared.nbytes:,} bytes more"]


def _fold(norm: nn.Module, readers: tuple[nn.Linear, ...], transaction: Transaction) -> None:
    for reader in readers:
        transaction.change(reader.weight, reader.weight.double() * norm.weight.double())
    transaction.change(norm.weight, torch.ones_like(norm.weight))


def _turn_inputs(module: nn.Module, rotation: Tensor, transaction: Transaction) -> None:
    """weight (N, K) -> weight · R, in runs of R's size along K."""
    weight = module.weight
    turned = weight.double().reshape(-1, len(rotation)) @ rotation
    transaction.change(weight, turned.reshape(weight.shape))


def _turn_outputs(module: nn.Linear, rotation: Tensor, transaction: Transaction) -> None:
    """weight (N, K) -> Rᵀ · weight, in runs of R's size along N; the bias likewise."""
    weight, size = module.weight, len(rotation)
    turned = rotation.t() @ weight.double().reshape(-1, size, weight.shape[1])
    transaction.change(weight, turned.reshape(weight.shape))
    if module.bias is not None:
        transaction.change(module.bias, (module.bias.double().reshape(-1, size) @ rotation).flatten())
