"""Mixture-of-experts layers: transformers keeps all experts in two 3-D tensors; here each projection of each expert is
a quantized layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

DEFAULT_GATE = "transformers.integrations.moe"  # where act(gate) · up is written


class QuantizedExperts(nn.ModuleList):
    """The experts of one layer, under the names that checkpoints give them: ``0.gate_proj``, ``0.up_proj`` …

    Each is down(act(gate(x)) · up(x)), or what the original module's class has in the place of act and the product; or,
    without a gate, down(act(up(x))).

    Args:
        experts: the projections of each, by name and in this order.
        original: the module whose place it takes. Its activation, limits and norms are kept.
    """

    def __init__(self, experts: list[dict[str, nn.Module]], original: nn.Module) -> None:
        super().__init__([nn.ModuleDict(projections) for projections in experts])
        gate = getattr(type(original), "_apply_gate", None)
        self.own_gate = None if gate is None or gate.__module__ == DEFAULT_GATE else gate
        self.concatenated = getattr(original, "is_concatenated", True)
        for name, value in vars(original).items():  # alpha, limit and the like, which its gate reads
            if not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)
        for name, child in original.named_children():
            self.add_module(name, child)
        self.train(original.training)

    def __len__(self) -> int:
        return sum(name.isdigit() for name in self._modules)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Each token's chosen experts, weighted and summed.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), the experts of each token.
            top_k_weights: (tokens, k).

        Returns:
            (tokens, hidden).
        """
        total = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == index)
            y = hidden_states[token]
            if index < len(self):
                y = self.expert(index, y)
            elif not hasattr(self, "identity_expert"):  # transformers marks an expert that lies elsewhere by the number
                continue  # after the last; LongCat's experts of such numbers give back what they get
            total.index_add_(0, token, (y * top_k_weights[token, place, None]).to(total.dtype))
        return total

    def expert(self, index: int, x: Tensor) -> Tensor:
        """What one expert makes of tokens (…, hidden)."""
        *first, last = self[index].values()
        y = last(self._between([projection(x) for projection in first]))
        return self.post_expert_norm(y) if hasattr(self, "post_expert_norm") else y

    def _between(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return self.act_fn(parts[0])
        if self.own_gate is None:
            return self.act_fn(parts[0]) * parts[1]
        joined = torch.cat(parts, -1) if self.concatenated else torch.stack(parts, -1).flatten(-2)
        return self.own_gate(self, joined)


class QuantizedSortedExperts(QuantizedExperts):
    """Experts that get the tokens of each of them behind one another, as many for each, zeros where a token was not
    routed to it: Llama 4's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(experts · tokens, hidden) to the same shape."""
        x = hidden_states.reshape(len(self), -1, hidden_states.shape[-1])
        out = torch.zeros_like(x)
        for index, rows in enumerate(x):
            routed = rows.any(-1)
            if bool(routed.any()):
                out[index, routed] = self.expert(index, rows[routed])
        return out.reshape(hidden_states.shape)


class QuantizedParallelExperts(nn.ModuleList):
    """One projection of all experts, which gets the tokens of each of them behind one another: JetMoE's."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """(rows, in_features) to (rows, out_features).

        Args:
            expert_size: how many of the rows belong to each expert.
        """
        parts = inputs.split(list(expert_size))
        return torch.cat([layer(rows) for layer, rows in zip(self, parts, strict=True)])


class QuantizedStackedExperts(nn.ModuleList):
    """The experts of one layer that is called once for each of them, with its weights as the module around it finds
    them in ``w1``, ``v1`` and ``w2``: DBRX's. Here those are layers.

    Args:
        experts: the projections of each, by name.
        activation_fn: between them.
    """

    def __init__(self, experts: list[dict[str, nn.Module]], activation_fn: nn.Module) -> None:
        super().__init__([nn.ModuleDict(projections) for projections in experts])
        self.activation_fn = activation_fn

    def __getattr__(self, name: str) -> object:
        return _OfEach(self, name) if name in ("w1", "v1", "w2") else super().__getattr__(name)

    def forward(self, x: Tensor, w1: nn.Module, v1: nn.Module, w2: nn.Module) -> Tensor:
        """What one expert makes of its tokens (…, hidden)."""
        return w2(self.activation_fn(w1(x)) * v1(x))


class _OfEach:
    """A projection of all experts, which is cut into experts as a tensor is: ``.view(…)[number]``."""

    def __init__(self, experts: QuantizedStackedExperts, name: str) -> None:
        self.experts, self.name = experts, name

    def view(self, shape: tuple[int, ...]) -> _OfEach:
        return self

    def __getitem__(self, number: Tensor) -> nn.Module:
        return self.experts[int(number)][self.name]
