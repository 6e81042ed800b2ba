"""Greedy generation, one CUDA graph a token.

transformers launches some fifteen kernels a block for every token, each from Python, and a GPU waits for most of them.
Here a step of a Llama-family model is ten operations a block on tensors that never move, so that a graph recorded once
is replayed for every token. Query, key and value projections are one product, gate and up another (`nn.fused_linear`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from canopyq import checks
from canopyq.errors import CanopyError, shown
from canopyq.kernels.cuda import attention, decode_step, quantize_rows
from canopyq.kernels.decode_step import add_rms_norm, attend, rotate_and_append, silu_mul
from canopyq.nn.fused_linear import UnfusedLinears, fuse_linears
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.formats import get_cache_format, kv_group_size
from canopyq.tensor.quantized_tensor import QuantizedTensor

if TYPE_CHECKING:
    from canopyq.kv_cache import StaticQuantizedCache

FAMILIES = ("llama", "mistral", "qwen2")
LOOK = 16  # tokens between two looks at whether all sequences have ended


@torch.no_grad()
def fast_generate(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int = 100,
    *,
    eos_token_id: int | None = None,
    cache: str | None = None,
) -> Tensor:
    """What ``model.generate(input_ids, do_sample=False)`` gives, faster: (B, T) -> (B, T + new).

    For many prompts keep one `Decoder`: recording its graph takes a moment.

    Args:
        model: of a Llama-family architecture, quantized or not.
        input_ids: (B, T) prompts of one length, without padding.
        max_new_tokens: at most so many tokens are added.
        eos_token_id: ends a sequence; None takes the model's own. What follows it in a longer batch is padding.
        cache: what holds keys and values on a GPU, ``"kv8"``, ``"kv4"``, ``"kv2"`` or ``"kv-fp8"``; None leaves them in
            the model's dtype.

    Raises:
        CanopyError: for another architecture, padded or empty prompts, more tokens than the model's context, or a cache
            that the attention kernel does not read here.
    """
    _check(model), _check_request(model, input_ids, max_new_tokens, eos_token_id)
    batch, length = input_ids.shape
    decoder = Decoder(model, batch, length + max_new_tokens, cache)
    return decoder._generate(input_ids, max_new_tokens, eos_token_id)


class Decoder:
    """A model with a cache of fixed size, ready to generate.

    Args:
        model: of a Llama-family architecture, quantized or not. Its projections come to share memory with fused ones.
        batch: how many sequences at a time.
        length: room for so many tokens, prompt included.
        cache: as for `fast_generate`.

    Attributes:
        logits: (batch, vocabulary) of the newest step.
        notes: what does not run as fast as it could here, and why.

    Raises:
        CanopyError: for another architecture, more room than the model's context, or a cache that cannot be read here.
    """

    def __init__(self, model: nn.Module, batch: int, length: int, cache: str | None = None) -> None:
        _check(model)
        checks.count("batch", batch, 1)
        limit = checks.context(model) or length
        if checks.count("length", length, 1) > limit:
            raise CanopyError(f"{length} tokens are more than the model's context of {limit}; make length smaller")
        self.model, self.config, self.batch, self.length = model, model.config, batch, length
        inner = model.model
        device, dtype = inner.norm.weight.device, inner.norm.weight.dtype
        d = inner.layers[0].self_attn.head_dim
        self.cache = None if cache is None else _quantized_cache(model, cache, batch, length, dtype, device, d)
        # Keys and values of all tokens; of the newest alone, where codes hold the others.
        shape = (batch, self.config.num_key_value_heads, length if cache is None else 1, d)
        self.blocks = [
            _Block(layer, torch.zeros(2, *shape, device=device, dtype=dtype), self.cache) for layer in inner.layers
        ]
        places = torch.arange(length, device=device).unsqueeze(0)
        cos, sin = inner.rotary_emb(torch.zeros(1, device=device), places)  # float32, both halves of a head alike
        self.cos, self.sin = cos[0, :, : d // 2].contiguous(), sin[0, :, : d // 2].contiguous()
        self.ids = torch.zeros(batch, length, device=device, dtype=torch.int64)
        self.token = torch.zeros(batch, device=device, dtype=torch.int64)
        self.position = torch.zeros(1, device=device, dtype=torch.int64)
        self.logits = torch.zeros(batch, self.config.vocab_size, device=device, dtype=dtype)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.notes = self._notes(device, dtype, d)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, *, eos_token_id: int | None = None) -> Tensor:
        """As `fast_generate`, for prompts (batch, T) that fit."""
        _check_request(self.model, input_ids, max_new_tokens, eos_token_id)
        batch, start = input_ids.shape
        if batch != self.batch or start + max_new_tokens > self.length:
            raise CanopyError(
                f"this decoder holds {self.batch} sequences of {self.length} tokens; {batch} of "
                f"{start} + {max_new_tokens} do not fit"
            )
        return self._generate(input_ids, max_new_tokens, eos_token_id)

    @torch.no_grad()
    def _generate(self, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None) -> Tensor:
        start = input_ids.shape[1]
        ends, pad = self._ends(eos_token_id)
        self._read(input_ids)
        if self.graph is None and self.ids.is_cuda and max_new_tokens > 1:
            self._record()
        stop = start + max_new_tokens
        for place in range(start + 1, stop):
            if ends is not None and (place - start) % LOOK == 0 and self._all_ended(start, place, ends):
                stop = place
                break
            self.step()
        return self._trimmed(start, stop, ends, pad)

    def step(self) -> None:
        """Feed every sequence's newest token to the model, and append what it says next."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()

    def _notes(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
        notes = []
        if reason := decode_step.unsupported_reason(device, dtype, self.config.hidden_size, head_dim):
            notes.append(f"norms, rotary embedding, attention and gates run in PyTorch: {reason}")
        if device.type != "cuda":
            notes.append(
                f"every step is launched from Python: CUDA graphs are for NVIDIA GPUs, the model lies on {device}"
            )
        for what, fused in (("query, key and value", self.blocks[0].qkv), ("gate and up", self.blocks[0].gate_up)):
            if isinstance(fused, UnfusedLinears):
                notes.append(f"{what} stay separate products: {fused.reason}")
        return notes

    def _read(self, input_ids: Tensor) -> None:
        """The prompt, in one pass; its keys and values go into the cache, its next token becomes the newest."""
        from transformers import DynamicCache

        from canopyq.kv_cache import as_argument

        start = input_ids.shape[1]
        ids = input_ids.to(self.ids.device)
        cache = DynamicCache(config=self.config)
        logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **as_argument(cache)).logits
        if self.cache is not None:
            self.cache.prefill((layer.keys, layer.values) for layer in cache.layers)
        else:
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                block.keys[:, :, :start] = layer.keys
                block.values[:, :, :start] = layer.values
        self.ids[:, :start] = ids
        self.position.fill_(start)
        self._append(logits[:, -1])

    def _step(self) -> None:
        inner = self.model.model
        residual, change = inner.embed_tokens(self.token), None
        for block in self.blocks:
            change = block(residual, change, self)
        last = add_rms_norm(residual, change, inner.norm.weight, inner.norm.variance_epsilon)
        self.position += 1
        self._append(self.model.lm_head(last))

    def _append(self, logits: Tensor) -> None:
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1))
        self.ids.index_copy_(1, self.position, self.token.unsqueeze(1))

    def _record(self) -> None:
        """Record one step as a graph. Steps that warm up write to places which the replays then write again."""
        moved = [self.token, self.position] + ([] if self.cache is None else [self.cache.count])
        before = [x.clone() for x in moved]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        for x, was in zip(moved, before, strict=True):
            x.copy_(was)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph
        if self.cache is not None:
            self.cache.synchronize()

    def _ends(self, eos_token_id: int | None) -> tuple[Tensor | None, int]:
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ends = own if eos_token_id is None else eos_token_id
        if ends is None:
            return None, 0
        ends = torch.tensor([ends] if isinstance(ends, int) else ends, device=self.ids.device)
        pad = self.model.generation_config.pad_token_id
        return ends, int(ends[0]) if pad is None else pad

    def _all_ended(self, start: int, stop: int, ends: Tensor) -> bool:
        return bool(torch.isin(self.ids[:, start:stop], ends).any(1).all())

    def _trimmed(self, start: int, stop: int, ends: Tensor | None, pad: int) -> Tensor:
        """Padding after each sequence's end, nothing after the last one's."""
        ids = self.ids[:, :stop].clone()
        if ends is None:
            return ids
        ended = torch.isin(ids[:, start:], ends).int().cumsum(1)
        after = (ended - torch.isin(ids[:, start:], ends).int()) > 0
        ids[:, start:].masked_fill_(after, pad)
        return ids[:, : start + int((~after).sum(1).max())]


class _Block:
    """One decoder layer, its keys and values, and its fused projections."""

    def __init__(self, layer: nn.Module, states: Tensor, cache: StaticQuantizedCache | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.keys, self.values = states.unbind(0)
        self.cache, self.index = cache, attention.layer_idx
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.qkv = fuse_linears(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = fuse_linears(mlp.gate_proj, mlp.up_proj)
        self.out, self.down = attention.o_proj, mlp.down_proj

    def __call__(self, residual: Tensor, change: Tensor | None, decoder: Decoder) -> Tensor:
        """What this block adds to the residual stream (B, H), which takes the last block's ``change`` on the way."""
        before, after = self.norms
        qkv = _normed_product(residual, change, before, self.qkv)
        q = rotate_and_append(qkv, decoder.cos, decoder.sin, decoder.position, self.keys, self.values)
        change = self.out(self._attend(q, decoder.position))
        return _gated_product(_normed_product(residual, change, after, self.gate_up), self.down)

    def _attend(self, q: Tensor, position: Tensor) -> Tensor:
        """(B, Hq, D) -> (B, Hq · D)."""
        if self.cache is None:
            return attend(q, self.keys, self.values, position)
        view, _ = self.cache.update(self.keys, self.values, self.index)
        out = attention.attend(q.unsqueeze(2), view, q.shape[2] ** -0.5)
        return out.reshape(len(q), -1)


# Where a layer takes 8-bit codes, the step before it writes them at once: three kernels a block less.


def _normed_product(residual: Tensor, change: Tensor | None, norm: nn.Module, layer: nn.Module) -> Tensor:
    """A layer's output for the norm of the residual stream (B, H), to which ``change`` is added on the way."""
    if isinstance(layer, QuantizedLinear) and layer.takes_codes_of(residual):
        format = layer.activations.format.name
        codes = quantize_rows.quantize_normed(residual, change, norm.weight, norm.variance_epsilon, format)
        return _product(codes, residual, layer)
    return layer(add_rms_norm(residual, change, norm.weight, norm.variance_epsilon))


def _gated_product(gate_up: Tensor, layer: nn.Module) -> Tensor:
    """A layer's output for silu(gate) · up of ``gate_up`` (B, 2 I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    if isinstance(layer, QuantizedLinear) and layer.takes_codes_of(gate):
        return _product(quantize_rows.quantize_gated(gate, up, layer.activations.format.name), gate, layer)
    return layer(silu_mul(gate_up))


def _product(found: tuple[Tensor, Tensor], x: Tensor, layer: QuantizedLinear) -> Tensor:
    codes, scale = found
    return layer.multiply(QuantizedTensor(codes, scale, None, layer.activations, x.shape, x.dtype))


def _quantized_cache(
    model: nn.Module, format: str, batch: int, length: int, dtype: torch.dtype, device: torch.device, head_dim: int
) -> StaticQuantizedCache:
    from canopyq.kv_cache import StaticQuantizedCache

    codes, group_size = get_cache_format(format), kv_group_size(head_dim)
    if reason := attention.unsupported_reason(codes, head_dim, dtype, "channel", group_size, device):
        raise CanopyError(
            f"fast_generate cannot read a {codes.name} cache here: {reason}; use model.generate with cq.QuantizedCache"
        )
    return StaticQuantizedCache(model.config, codes, batch=batch, capacity=length, dtype=dtype, device=device)


def _check_request(model: nn.Module, input_ids: Tensor, max_new_tokens: int, eos_token_id: int | None) -> None:
    checks.tokens("input_ids", input_ids, model), checks.count("max_new_tokens", max_new_tokens, 1)
    if eos_token_id is not None:
        checks.count("eos_token_id", eos_token_id)


def _check(model: nn.Module) -> None:
    config = checks.language_model("model", model).config
    family = getattr(config, "model_type", type(model).__name__)
    rope = (getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}).get("rope_type")
    windows = getattr(config, "layer_types", None) or []
    activation = getattr(config, "hidden_act", None)
    for misfit, reason in (
        (family not in FAMILIES, f"knows {', '.join(FAMILIES)}, not {family}"),
        (rope in ("dynamic", "longrope"), f"needs rotary tables that stay the same, not rope_type {shown(rope)}"),
        (activation != "silu", f"knows gated SiLU, not {activation}"),
        (
            "sliding_attention" in windows or (family == "mistral" and getattr(config, "sliding_window", None)),
            "attends to all tokens, and this model has a sliding window",
        ),
    ):
        if misfit:
            raise CanopyError(f"fast_generate {reason}; use model.generate")
