"""One pass over the data: right statistics, nothing of padding in them, and the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import canopyq as cq
from canopyq.calibration.calibrate import calibrate, calibration_blocks
from canopyq.calibration.data import read_batches
from canopyq.calibration.statistics import ActivationStats
from canopyq.errors import CanopyError
from tests.model.test_architectures import make

TOKENS = torch.arange(3, 75).reshape(4, 18)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model() -> nn.Module:
    return make("llama")


def watch(model: nn.Module, name: str, batches: list[Tensor]) -> list[Tensor]:
    """What the layer really gets, batch by batch."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return seen


def assert_describes(found: ActivationStats, inputs: list[Tensor]) -> None:
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).double()
    assert found.tokens == len(rows)
    torch.testing.assert_close(found.lo.double(), rows.amin(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.hi.double(), rows.amax(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mean_abs.double(), rows.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert int(found.histogram.counts.sum()) == rows.numel()
    if found.hessian is not None:
        expected = rows.t() @ rows / len(rows)
        assert float((found.hessian - expected).norm() / expected.norm()) < 1e-5


def test_statistics_of_every_sample(model: nn.Module) -> None:
    batches = [TOKENS[:3], TOKENS[3:]]
    found = calibrate(model, batches, hessian=True)
    assert found.samples == 4 and found.tokens == 72 and found.by_blocks and not found.unseen
    assert list(found) == [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    inputs = watch(model, DOWN, batches)
    assert_describes(found[DOWN], inputs)
    samples = torch.cat(inputs)
    expected = torch.stack([samples.amin((1, 2)), samples.amax((1, 2))], 1)
    torch.testing.assert_close(found[DOWN].ranges, expected)
    assert torch.equal(found[DOWN].running()[-1], torch.stack([found[DOWN].lo.min(), found[DOWN].hi.max()]))


def test_a_cap_shrinks_loud_tokens_and_no_others(model: nn.Module) -> None:
    found = calibrate(model, [TOKENS], layers=[DOWN], hessian=True, token_norm_cap=1.2, histograms=False)[DOWN]
    rows = watch(model, DOWN, [TOKENS])[0].flatten(0, 1).double()
    longest = 1.2 * rows.norm(dim=1).median()
    capped = torch.stack([row * min(1.0, float(longest / row.norm())) for row in rows])
    assert 0 < int((rows.norm(dim=1) > longest).sum()) < len(rows)
    torch.testing.assert_close(found.hessian.double(), capped.t() @ capped / len(rows), rtol=1e-4, atol=1e-6)
    assert int(found.histogram.counts.sum()) == 0
    torch.testing.assert_close(found.hi.double(), rows.amax(0), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_padding_leaves_no_trace(model: nn.Module) -> None:
    alone = calibrate(model, [TOKENS[:1, :5], TOKENS[1:2], TOKENS[2:3, :11]], hessian=True)
    ids, mask = torch.zeros(3, 18, dtype=torch.long), torch.zeros(3, 18, dtype=torch.long)
    for row, length in enumerate((5, 18, 11)):
        ids[row, :length], mask[row, :length] = TOKENS[row, :length], 1
    padded = calibrate(model, {"input_ids": ids, "attention_mask": mask}, hessian=True)
    assert padded.tokens == 34
    for name, one in alone.items():
        other = padded[name]
        assert one.tokens == other.tokens
        for part in ("lo", "hi", "mean_abs", "ranges", "hessian"):
            torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=1e-4, atol=1e-5)
        assert int((one.histogram.counts.cumsum(0) - other.histogram.counts.cumsum(0)).abs().max()) <= 8


def test_the_model_is_as_it_was(model: nn.Module) -> None:
    before = model(TOKENS).logits
    model.train()
    model.model.layers[1].eval()
    calibrate(model, [TOKENS])
    assert model.training and not model.model.layers[1].training
    model.eval()
    assert torch.equal(model(TOKENS).logits, before)
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_what_the_loop_changes_is_what_later_blocks_see(model: nn.Module) -> None:
    order, found = [], {}
    first = watch(model, "model.layers.0.mlp.down_proj", [TOKENS])
    for block, statistics in calibration_blocks(model, read_batches([TOKENS], model), hessian=True):
        order.append(block)
        assert all(name.startswith(block) for name in statistics) and len(statistics) == 7
        found |= statistics
        model.get_submodule(f"{block}.mlp.down_proj").weight.mul_(0.5)
        model.set_submodule(f"{block}.self_attn", copy.deepcopy(model.get_submodule(f"{block}.self_attn")))
    assert order == ["model.layers.0", "model.layers.1"]
    assert_describes(found["model.layers.0.mlp.down_proj"], first)
    later = "model.layers.1.self_attn.q_proj"
    assert_describes(found[later], watch(model, later, [TOKENS]))


def test_between_blocks_the_model_is_as_it_was(model: nn.Module) -> None:
    model.train()
    before = model(TOKENS).logits
    for _ in calibration_blocks(model, read_batches([TOKENS], model)):
        assert all(module.training and not module._forward_pre_hooks for module in model.modules())
        assert torch.equal(model(TOKENS).logits, before)
        break


def test_layers_outside_the_blocks_come_last(model: nn.Module) -> None:
    batches = read_batches([TOKENS], model)
    blocks = list(calibration_blocks(model, batches, layers=["lm_head", DOWN]))
    assert [(block, *statistics) for block, statistics in blocks] == [
        ("model.layers.0",), ("model.layers.1", DOWN), ("", "lm_head")
    ]  # fmt: skip
    assert_describes(blocks[-1][1]["lm_head"], watch(model, "lm_head", [TOKENS]))
    assert_describes(calibrate(model, [TOKENS], layers=["lm_head"])["lm_head"], watch(model, "lm_head", [TOKENS]))


class Recurrent(nn.Module):
    """Its list of blocks is not a chain: the second block runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(3)])
        self.spare = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i in (0, 1, 1, 2):
            x = self.blocks[i](x)
        return x


def test_a_model_without_a_chain_of_blocks_is_watched_whole() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    found = calibrate(model, [TOKENS])
    assert not found.by_blocks and found["blocks.1.0"].tokens == 2 * TOKENS.numel()
    once = list(calibration_blocks(model, read_batches([TOKENS], model)))
    assert [(block, len(statistics)) for block, statistics in once] == [("", 3)]
    assert found.unseen == {"spare": "the model never called it"}
    assert "watched in one go" in str(found) and "not calibrated: spare" in str(found)
    plain = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 8))
    assert calibrate(plain, [TOKENS])["1"].tokens == TOKENS.numel()


def test_it_says_whether_more_data_would_change_the_ranges(model: nn.Module) -> None:
    same = calibrate(model, [TOKENS[:1].repeat(6, 1)])
    assert same.settled and "ranges settled: the second half of the 6 samples widened none" in str(same)
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = torch.eye(128)[5]  # after the norm, all of it in one feature
    odd = torch.full((1, 18), 90)
    changed = calibrate(model, [torch.cat([TOKENS[:3], odd])])
    assert not changed.settled and "ranges not settled" in str(changed)
    assert changed.growth["model.layers.0.self_attn.q_proj"] > 0.5
    with pytest.warns(UserWarning, match="one sample: its ranges are thin"):
        thin = calibrate(model, [TOKENS[:1]])
    assert thin.samples == 1 and not thin.settled and "thin" in str(thin)


def test_half_precision_is_counted_in_float32(model: nn.Module) -> None:
    found = calibrate(model.to(torch.bfloat16), [TOKENS], hessian=True)
    assert {x.dtype for x in (found[DOWN].lo, found[DOWN].mean_abs, found[DOWN].hessian)} == {torch.float32}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_nan_activations_name_the_layer(model: nn.Module, bad: float) -> None:
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[5] = bad
    with pytest.raises(CanopyError, match=r"^model\.layers\.1\.mlp\.gate_proj: its inputs hold \d+ NaN and"):
        calibrate(model, [TOKENS])
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": []}, "calibration data is empty"),
        ({"batches": [TOKENS + 50]}, "vocabulary of 96"),
        ({"layers": ["model.layers.0.mlp.down"]}, "unknown linear layer 'model.layers.0.mlp.down'; did you mean"),
        ({"layers": []}, "no linear layer to calibrate"),
    ],
)
def test_what_cannot_be_calibrated(model: nn.Module, options: dict, message: str) -> None:
    with pytest.raises(CanopyError, match=message):
        calibrate(model, **({"batches": [TOKENS]} | options))


def test_the_tutor_has_data_of_its_own() -> None:
    model, tokenizer = cq.tutor.load()
    data = cq.tutor.calibration(tokenizer, 5, 64, rows=2)
    assert [tuple(batch.shape) for batch in data] == [(2, 64), (2, 64), (1, 64)]
    assert torch.equal(torch.cat(data)[:3], torch.cat(cq.tutor.calibration(tokenizer, 3, 64)))
    assert not torch.equal(data[0], cq.tutor.calibration(tokenizer, 2, 64, seed=1)[0])
    found = calibrate(model, data)
    assert len(found) == 56 and found.tokens == 320


def test_calibration_chats_ask_no_question_that_is_scored() -> None:
    _, tokenizer = cq.tutor.load()
    text = "".join(tokenizer.decode(row) for batch in cq.tutor.calibration(tokenizer, 12) for row in batch)
    asked = {turn.split("<bot>")[0] for turn in text.split("<user>")[1:]}
    scored = {question.prompt for question in cq.tutor.questions(600) if len(question.turns) == 1}
    assert len(asked) > 100 and not asked & scored
