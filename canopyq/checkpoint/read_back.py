"""What was written, loaded again and compared with the model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from canopyq.checkpoint.load import load_as
from canopyq.errors import CanopyError
from canopyq.mode import eval_mode

MOST_KL = 0.01  # nats per token between the model and its file: beyond that the file does not hold the model
TOKENS = 64


@dataclass(frozen=True)
class Check:
    """What came back from the disk beside the model in memory, on a fixed batch of tokens.

    Attributes:
        tokens: how many.
        max_abs_difference: of any logit.
        kl: mean KL divergence, nats per token.
    """

    tokens: int
    max_abs_difference: float
    kl: float


@torch.inference_mode()
def read_back(model: nn.Module, folder: Path) -> Check:
    """Load what was written, and look at the logits of both.

    Raises:
        CanopyError: if it gives other answers than the model.
    """
    parameter = next(model.parameters())
    loaded = load_as(
        folder, parameter.device, parameter.dtype, attention=getattr(model.config, "_attn_implementation", None)
    )
    ids = (
        torch.arange(TOKENS, device=parameter.device).mul(2654435761).remainder(model.config.vocab_size).reshape(2, -1)
    )
    with eval_mode(model):
        before, after = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, loaded))
    p, q = F.log_softmax(before, -1), F.log_softmax(after, -1)
    kl = max(float((p.exp() * (p - q)).sum(-1).mean()), 0.0)  # in this order NaN stays NaN
    found = Check(ids.numel(), float((before - after).abs().max()), kl)
    if not found.kl <= MOST_KL:
        raise CanopyError(
            f"what was written gives other answers than the model (KL {found.kl:.2g} nats per token), and was removed; "
            "look for logits that are not finite, or leave dtype out"
        )
    return found
