"""The sliders: their callbacks write values and print nothing."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch

from canopyq.evaluate.quality import Comparison, Evaluation
from canopyq.lessons import explore
from canopyq.lessons.explore.bits import levels, nearest
from canopyq.lessons.explore.clip import Clip
from canopyq.lessons.explore.float import FORMATS, split_bits, stored
from canopyq.lessons.explore.groups import Groups
from canopyq.lessons.explore.outlier import Outlier
from canopyq.lessons.explore.rounding import Rounding
from canopyq.lessons.explore.static import Static
from canopyq.lessons.explore.words import Words
from canopyq.tensor.formats import get_format
from canopyq.tensor.quantized_tensor import quantize
from canopyq.tutor.exam import Question

X = torch.randn(1500, generator=torch.Generator().manual_seed(0))
TOKENS = X.reshape(30, 50) * torch.logspace(0, 2, 30)[:, None]  # from small to large
ASKED = [Question("add", 0, (("What is 2 + 2?", "4."),)), Question("spell", 0, (("Spell *ox*.", "o-x."),))]


def comparison(right: tuple[bool, ...], kl: float) -> Comparison:
    questions = tuple(ASKED)
    return Comparison(Evaluation(800, 2.0, 9, (True, True), questions), Evaluation(200, 2.1, 9, right, questions), kl)


RUNS = {
    4: (comparison((True, True), 0.001), ["4.", "o-x."]),
    8: (comparison((True, True), 1e-6), ["4.", "o-x."]),
    2: (comparison((False, True), 0.2), ["5 <b>.", "o-x."]),
}
EXPLORERS = {
    "answers": lambda: explore.answers(ASKED, RUNS),
    "bits": lambda: explore.bits(X),
    "float-bits": lambda: explore.float_bits(0.1),
    "clip": lambda: explore.clip(X),
    "outlier": lambda: explore.outlier(X),
    "choose": lambda: explore.choose(),
    "groups": lambda: explore.groups(X.reshape(15, 100)),
    "context": lambda: explore.context(),
    "turns": lambda: explore.turns(
        {"full": [(9, 90), (20, 200), (31, 310)], "kv4": [(9, 90), (20, 80), (31, 95)]}, 200
    ),
    "words": lambda: explore.words(X.reshape(15, 100)),
    "rounding": lambda: explore.rounding(0.4, 0.4),
    "static": lambda: explore.static(TOKENS),
    "squeeze": lambda: explore.squeeze(),
}
MOVES = {
    "answers": ("bits", 2),
    "bits": ("bits", 2),
    "float-bits": ("number", 17.3),
    "clip": ("clip", 0.4),
    "outlier": ("outlier", 200.0),
    "choose": ("memory", 24.0),
    "groups": ("scale", "g32"),
    "context": ("context", "256k"),
    "turns": ("turn", 3),
    "words": ("word", 3),
    "rounding": ("correlation", -0.5),
    "static": ("reach", 0.1),
    "squeeze": ("bits", 3),
}


@pytest.mark.parametrize("name", EXPLORERS)
def test_moving_a_control_updates_and_prints_nothing(name: str, capsys: pytest.CaptureFixture) -> None:
    explorer = EXPLORERS[name]()
    explorer.widget()
    line, picture = explorer.line.value, explorer.image.value
    control, value = MOVES[name]
    explorer.controls[control].value = value
    assert explorer.line.value != line
    if name not in ("float-bits", "choose"):
        assert explorer.image.value != picture and bytes(explorer.image.value).startswith(b"\x89PNG")
        assert len(explorer.image.value) < 150_000
    assert capsys.readouterr() == ("", "")
    assert not plt.get_fignums(), "no figure is left for the notebook to show"
    shown, other = explorer._repr_mimebundle_(), EXPLORERS[name]()
    html, text = shown["text/html"], shown["text/plain"]
    assert (html, text) == (other.static_html(), other.plain()), "the static form is the same each time"
    assert "<table" in html and "<img" not in html and text.startswith(f"Explore {name}: ")


@pytest.mark.parametrize("picture", ["staircase", "histogram"])
def test_every_setting_of_bits(picture: str) -> None:
    explorer = explore.bits(X + 1)
    explorer.widget()
    explorer.controls["picture"].value = picture
    for range in ("restricted", "asymmetric", "symmetric"):
        explorer.controls["range"].value = range
        assert f"INT4, {range}" in explorer.line.value


@pytest.mark.parametrize("options", [{}, {"restricted": True}, {"symmetric": False}])
def test_the_staircase_is_the_quantizer(options: dict) -> None:
    q = quantize(X, "int4", "tensor", **options)
    torch.testing.assert_close(levels(q)[nearest(X, levels(q))], q.dequantize())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.1, -0.75, 17.3, 1e-7, 0.0, 400.0])
def test_bits_are_those_of_the_number(name: str, value: float) -> None:
    fmt = get_format(name)
    sign, exponent, mantissa = split_bits(value, name)
    assert (len(sign), len(exponent), len(mantissa)) == (1, fmt.exponent_bits, fmt.mantissa_bits)
    raw, fraction = int(exponent, 2), int(mantissa, 2) / 2**fmt.mantissa_bits
    size = (fraction + (raw > 0)) * 2.0 ** (max(raw, 1) - fmt.bias)
    assert (-1) ** int(sign) * size == stored(value, name)


def test_numbers_that_are_too_large_say_so() -> None:
    explorer = explore.float_bits(70000.0)
    explorer.widget()
    assert explorer.line.value.count("infinity (too large)") == 2  # FP16 and E5M2
    assert "448 (its largest)" in explorer.line.value  # E4M3


def test_presets_and_the_typed_number_follow_each_other() -> None:
    explorer = explore.float_bits(0.1)
    explorer.widget()
    explorer.controls["presets"].value = 448.0
    assert explorer.controls["number"].value == 448.0
    explorer.controls["number"].value = 3.0
    assert explorer.controls["presets"].value is None and ">3<" in explorer.line.value


def test_clipping_and_rounding_pull_in_opposite_directions() -> None:
    view = Clip(torch.cat([X, torch.tensor([20.0])]))
    found = [view.at(share, 4) for share in (0.1, 0.3, 0.6, 1.0)]
    clipping, rounding = [each.clipping for each in found], [each.rounding for each in found]
    assert list(clipping) == sorted(clipping, reverse=True) and list(rounding) == sorted(rounding)
    assert clipping[-1] == 0 and 0.05 <= view.best(4) < 0.6


def test_an_outlier_takes_the_codes_of_the_others() -> None:
    view = Outlier(torch.linspace(-1, 1, 101))
    found = [view.crushed(size, 8) for size in (2.0, 20.0, 127.5, 500.0)]
    assert [f.codes for f in found] == sorted((f.codes for f in found), reverse=True) and found[-1].codes == 1
    assert found[2].step == 1.0 and found[3].zeros == 1.0 and found[3].error == 1.0


@pytest.mark.parametrize("bits", [4, 3])
def test_smaller_groups_cost_more_and_lose_less(bits: int) -> None:
    view = Groups(torch.randn(32, 1024, generator=torch.Generator().manual_seed(0)))
    assert view.names == ["tensor", "channel", "g512", "g256", "g128", "g64", "g32", "g16", "g8"]
    costs = [view.cost(name, bits) for name in view.names]
    assert [c.bits_per_weight for c in costs] == sorted(c.bits_per_weight for c in costs)
    assert [c.error for c in costs] == sorted((c.error for c in costs), reverse=True)
    assert [c.zeros for c in costs] == sorted((c.zeros for c in costs), reverse=True)
    assert [c.scales for c in costs[:3]] == [1, 32, 64]
    assert view.cost("g128", bits).bits_per_weight == bits + 16 / 128


def test_the_error_of_groups_is_counted_by_hand() -> None:
    x = torch.tensor([[8.0, 0.5, 0.1, 0.2], [1.0, 0.5, 0.1, 0.2]])
    rows = x.abs().amax(dim=1, keepdim=True) / 7.5
    rows = rows.bfloat16().float()
    codes = torch.round(x / rows).clamp(-8, 7)
    cost = Groups(x).cost("channel", 4)
    assert cost.error == pytest.approx(((codes * rows - x).norm() / x.norm()).item())
    assert cost.zeros == (codes == 0).float().mean().item() and cost.scales == 2


@pytest.mark.parametrize("shape", [(7,), (3, 70), (2, 5, 96)])
def test_groups_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert all(0 < Groups(x).cost(name, 4).error < 0.2 for name in Groups(x).names)
    explorer = explore.groups(x)
    explorer.widget()
    for name in (explorer.controls["scale"].options[0], explorer.controls["scale"].options[-1]):
        explorer.controls["scale"].value = name
        assert f"INT4, {name}" in explorer.line.value


def test_answers_are_shown_as_they_were_measured() -> None:
    explorer = explore.answers(ASKED, RUNS)
    explorer.widget()
    assert [value for _, value in explorer.controls["bits"].options] == [8, 4, 2]
    assert "KL 1e-06" in explorer.line.value and "wrong:" not in explorer.line.value
    explorer.controls["bits"].value = 2
    assert "50.0 %" in explorer.line.value and "200 B" in explorer.line.value
    assert "<b>wrong:</b> 5 &lt;b&gt;." in explorer.line.value, "a model's answer is never markup"
    assert "Spell ×ox×." in explorer.line.value and explorer.line.value.count("wrong:") == 1
    head, rows = explorer.rows()
    assert head == ["student", "8 bits", "4 bits", "2 bits"] and rows[1] == ["Spell ×ox×.", "o-x.", "o-x.", "o-x."]


def test_a_tensor_of_zeros() -> None:
    zeros = torch.zeros(10)
    for explorer in (explore.bits(zeros), explore.clip(zeros), explore.groups(zeros.reshape(1, 10)),
                     explore.outlier(zeros), explore.static(zeros.reshape(2, 5))):  # fmt: skip
        explorer.widget()
        explorer.static_html()


def test_context_shows_the_bytes_of_the_arithmetic() -> None:
    explorer = explore.context()
    explorer.widget()
    explorer.controls["model"].value = "llama-2-7b"
    assert "17.2 GB in BF16" in explorer.line.value  # 524,288 bytes a token, 32,768 tokens
    explorer.controls["chats"].value = 16
    assert "16 chats of 32,768 tokens" in explorer.line.value and "275 GB in BF16" in explorer.line.value


def test_turns_show_what_was_measured() -> None:
    explorer = EXPLORERS["turns"]()
    explorer.widget()
    explorer.controls["turn"].value, explorer.controls["cache"].value = 3, "kv4"
    assert "31 tokens" in explorer.line.value and "95 B, 48 % of the weights" in explorer.line.value
    assert "full" in explorer.static_html() and "310 B" in explorer.static_html()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 7, 40, 100])
def test_words_come_apart_as_they_were_packed(bits: int, columns: int) -> None:
    x = X[: 3 * columns].reshape(3, columns)
    view = Words(x)
    codes = quantize(x, f"int{bits}", "channel").codes[0]
    many = 32 // bits
    for place in range(view.last + 1):
        word = view.word(place, bits)
        assert word.codes == codes[place * many : (place + 1) * many].tolist()
        unpacked = [(word.number >> (bits * i)) % 2**bits - 2 ** (bits - 1) for i in range(len(word.codes))]
        assert unpacked == word.codes and int.from_bytes(word.bytes, "little") == word.number
        if place in (0, view.last):
            view.draw(plt.figure(), place, bits)
            plt.close("all")


def test_words_say_the_worked_value() -> None:
    word = Words(torch.tensor([[-8.0, -7, -1, 0, 1, 2, 6, 7]]) * 15 / 16).word(0, 4)
    assert word.number == 0xFEA98710 and word.bytes.hex() == "1087a9fe"


def test_every_control_of_the_tree_changes_what_it_says() -> None:
    explorer = explore.choose()
    explorer.widget()
    for control, value in [("priority", "compression"), ("model", "llama-2-7b"), ("memory", 40.0), ("context", 0)]:
        before = explorer.line.value
        explorer.controls[control].value = value
        assert explorer.line.value != before, control
    explorer.controls["memory"].value = 1.0
    assert "Nothing fits" in explorer.line.value and "more memory" in explorer.line.value


def test_one_range_for_all_tokens_clips_some_or_blurs_others() -> None:
    view = Static(TOKENS)
    wide, middle, own = view.fixed(1.0, 8), view.fixed(0.1, 8), view.own(8)
    assert wide.clipped == 0 < middle.clipped == int((TOKENS.abs().amax(1) > TOKENS.abs().max() * 0.1).sum())
    assert wide.spoiled > 5 and own.spoiled == 0 and own.whole < middle.whole
    q = quantize(TOKENS, "int8", "token").dequantize()
    torch.testing.assert_close(own.error, (q - TOKENS).norm(dim=1) / TOKENS.norm(dim=1))
    head, rows = view.rows()
    assert {len(row) for row in rows} == {len(head)} and rows[-1][0] == "each token's own"


def test_two_weights_make_up_for_each_other_when_their_inputs_go_together() -> None:
    view = Rounding(0.4, 0.4)
    alone, best = view.choices((0.4, 0.4), 0.98)
    assert alone.point == (0, 0) and sum(best.point) == 1
    assert best.error < 0.2 * alone.error
    alone, best = view.choices((0.4, 0.4), 0.0)
    assert alone == best and alone.error == pytest.approx(0.32)


def test_an_answer_breaks_with_few_bits_and_is_mended_by_more_scales() -> None:
    explorer = explore.squeeze()
    explorer.widget()
    assert "(right)" in explorer.line.value
    explorer.controls["bits"].value = 3
    assert "(wrong)" in explorer.line.value
    explorer.controls["scale"].value = "g128"
    assert "(right)" in explorer.line.value


def test_a_picture_stays_where_it_is_while_a_slider_moves() -> None:
    """The second drawing takes the places of the first: to find them takes longer than to draw."""
    explorer = explore.clip(X)
    explorer.widget()
    before = explorer._places.copy()
    explorer.controls["clip"].value = 0.5
    assert len(before) == 1 and explorer._places == before
