"""Mixture-of-experts layers: transformers keeps all experts in two 3-D tensors; here each is three quantized layers."""

from __future__ import annotations

from inspect import signature

import torch
from torch import Tensor, nn

from canopyq.nn.linear import QuantizedLinear

FLAGS = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False,
         "has_post_expert_norm": False}  # fmt: skip


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
        """What takes the place of a module that `is_experts`; its projections in the order of `expert_weights`."""
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


def is_experts(module: nn.Module) -> bool:
    """Whether a module is what `QuantizedExperts` can stand for: fused gate and up, (experts, out, in), no biases."""
    named = dict(module.named_parameters(recurse=False))
    if set(named) != {"gate_up_proj", "down_proj"} or any(weight.dim() != 3 for weight in named.values()):
        return False
    (experts, both, hidden), gate = named["gate_up_proj"].shape, getattr(type(module), "_apply_gate", None)
    return (
        named["down_proj"].shape == (experts, hidden, both // 2)  # Llama 4 has them the other way round
        and len(signature(module.forward).parameters) >= 3
        and all(getattr(module, flag, value) is value for flag, value in FLAGS.items())
        and (gate is None or gate.__module__ == "transformers.integrations.moe")
        and hasattr(module, "act_fn")
    )


def expert_weights(module: nn.Module) -> dict[str, Tensor]:
    """The weight of every projection of every expert, (out_features, in_features), as views: ``"0.gate_proj"`` …"""
    found = {}
    for i, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
        gate, up = gate_up.chunk(2)
        found |= {f"{i}.gate_proj": gate, f"{i}.up_proj": up, f"{i}.down_proj": down}
    return found
