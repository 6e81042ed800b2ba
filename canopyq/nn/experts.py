"""Mixture-of-experts layers: transformers keeps all experts in two 3-D tensors; here each is three quantized layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from canopyq.nn.linear import QuantizedLinear


class QuantizedExpert(nn.Module):
    """One gated feed-forward network: down(act(gate(x)) · up(x))."""

    def __init__(self, gate_proj: QuantizedLinear, up_proj: QuantizedLinear, down_proj: QuantizedLinear) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj


class QuantizedExperts(nn.ModuleList):
    """The experts of one layer, under the names that checkpoints give them: ``0.gate_proj``, ``0.up_proj`` …

    Args:
        experts: one each.
        act_fn: the activation between them.
    """

    def __init__(self, experts: list[QuantizedExpert], act_fn: nn.Module) -> None:
        super().__init__(experts)
        self.act_fn = act_fn

    @classmethod
    def like(cls, module: nn.Module, projections: list[QuantizedLinear]) -> QuantizedExperts:
        """What takes the place of a module of fused experts; its projections in the order of `sites.Experts.split`."""
        experts = [QuantizedExpert(*projections[i : i + 3]) for i in range(0, len(projections), 3)]
        return cls(experts, module.act_fn).train(module.training)

    def __len__(self) -> int:
        return sum(isinstance(module, QuantizedExpert) for module in self._modules.values())

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
            if index >= len(self):  # transformers marks an expert that lies elsewhere by the number after the last
                continue
            expert = self[index]
            token, place = torch.where(top_k_index == index)
            x = hidden_states[token]
            y = expert.down_proj(self.act_fn(expert.gate_proj(x)) * expert.up_proj(x))
            total.index_add_(0, token, (y * top_k_weights[token, place, None]).to(total.dtype))
        return total
