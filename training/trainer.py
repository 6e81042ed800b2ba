"""How the tutor model learns: the plan, one step, and the loop over all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from training.batches import Batches
from training.log import Log
from training.model import Shape, build


@dataclass(frozen=True)
class Plan:
    """Everything that decides how training goes."""

    steps: int = 6300
    tokens: int = 65_536  # in one step
    longest: int = 2048  # row
    learning_rate: float = 2e-3
    warmup: int = 200  # steps
    decay: float = 0.4  # of all steps, at the end
    weight_decay: float = 0.05
    clip: float = 1.0
    other_weight: float = 0.1  # of the loss on tokens that are not an answer's
    precision: str = "bfloat16 autocast on float32 weights"
    seed: int = 0
    validation: int = 48  # questions of every skill while training
    test: int = 300  # questions of every skill at the end

    def rate(self, step: int) -> float:
        """The learning rate: up over the warm-up, level, then straight down."""
        left = 1 - step / self.steps
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.01, left / self.decay))


def token_losses(model: LlamaForCausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy at every position, from normed hidden states (rows, length, hidden)."""
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


class Trainer:
    """The model with its optimizer: takes a step on a batch, and predicts."""

    def __init__(self, plan: Plan, shape: Shape, device: torch.device) -> None:
        self.plan, self.device, self.on_gpu = plan, device, device.type == "cuda"
        self.model = build(shape, plan.seed, torch.bfloat16 if self.on_gpu else torch.float32).to(device)
        self.token_losses = token_losses
        if self.on_gpu:
            torch._dynamo.config.recompile_limit = 64  # each row length compiles once with gradient, once without
            for block in self.model.model.layers:
                block.compile(dynamic=False)
            self.token_losses = torch.compile(token_losses, dynamic=False)
        groups = [
            {"params": [p for p in self.model.parameters() if p.ndim == 2], "weight_decay": plan.weight_decay},
            {"params": [p for p in self.model.parameters() if p.ndim == 1], "weight_decay": 0.0},  # the norms' gains
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=self.on_gpu)

    def backward(self, ids: Tensor, in_answer: Tensor) -> Tensor:
        """Leave the gradients of one batch; return the mean loss on its answers."""
        ids = ids.to(self.device, non_blocking=True).long()
        graded = in_answer.to(self.device, non_blocking=True)[:, 1:].flatten()
        with self._autocast():
            losses = self.token_losses(self.model, self._hidden(ids[:, :-1]), ids[:, 1:])
        weights = torch.where(graded, 1.0, self.plan.other_weight)
        ((losses * weights).sum() / weights.sum()).backward()
        return ((losses * graded).sum() / graded.sum()).detach()

    def step(self, number: int, ids: Tensor, in_answer: Tensor) -> Tensor:
        """Learn from one batch; return the mean loss on its answers."""
        loss = self.backward(ids, in_answer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def predict(self, ids: Tensor) -> Tensor:
        """The most likely next token at every position."""
        with self._autocast():
            return self.model.lm_head(self._hidden(ids)).argmax(-1)

    def _hidden(self, ids: Tensor) -> Tensor:
        """What the last block leaves in the residual stream, normed."""
        return self.model.model(input_ids=ids, use_cache=False).last_hidden_state

    def warm_up(self, batches: Batches, examine: Callable[[], object]) -> None:
        """Compile for every shape before the clock runs; what these batches would teach is thrown away."""
        for length in batches.lengths():
            self.backward(*batches.draw(Random(f"warm-up/{length}"), length))
            self.optimizer.zero_grad(set_to_none=True)
        examine()
        self.wait()

    def wait(self) -> None:
        """Until the GPU has done what was asked of it, so that a clock sees work done and not work queued."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu)


def run(
    trainer: Trainer,
    batches: Iterator[tuple[Tensor, Tensor]],
    examine: Callable[[], dict[str, float]],
    log: Log,
    every: float,
) -> None:
    """All the steps, with a line in the log every so many seconds.

    ``examine`` gives the accuracy of every skill; the time that it takes does not count as training time.
    """
    plan, trained, waited, tokens, logged = trainer.plan, 0.0, 0.0, 0, 0
    losses: list[Tensor] = []
    began = time.perf_counter()
    for step in range(plan.steps):
        asked = time.perf_counter()
        ids, in_answer = next(batches)
        waited += time.perf_counter() - asked
        losses.append(trainer.step(step, ids, in_answer))
        tokens += ids.shape[0] * (ids.shape[1] - 1)
        last = step + 1 == plan.steps
        if step % 20 == 0 or last:
            trainer.wait()
        if time.perf_counter() - began >= every or last:
            trainer.wait()
            seconds = time.perf_counter() - began
            trained += seconds
            record = {
                "step": step + 1,
                "seconds": round(trained, 1),
                "tokens": tokens,
                "row_length": ids.shape[1] - 1,
                "learning_rate": round(plan.rate(step), 6),
                "answer_loss": round(torch.stack(losses).mean().item(), 5),
                "tokens_per_second": round((tokens - logged) / seconds),
                "seconds_waiting_for_data": round(waited, 2),
                "validation": examine(),
            }
            log.write(record)
            waited, logged, losses = 0.0, tokens, []
            began = time.perf_counter()
