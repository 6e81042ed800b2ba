"""Advice meets the needs, its bytes are sums, more memory never makes it worse; where nothing fits, what must give."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import canopyq as cq
from canopyq import advisor
from canopyq.advisor import Measurement, Needs, advise, recorded
from canopyq.advisor.choose import Option, costs, noise_of
from canopyq.advisor.measured import split
from canopyq.checkpoint.layout import disk_format
from canopyq.errors import CanopyError
from canopyq.memory import MODEL_SHAPES, cache_bytes, model_bytes

NAMES = st.sampled_from(sorted(MODEL_SHAPES))
NEEDS = st.builds(
    lambda name, memory, context, batch, accuracy, priority, server: Needs(
        name, name, MODEL_SHAPES[name], memory and round(memory * 2 * MODEL_SHAPES[name].parameters), context, batch,
        accuracy if name == "tutor" else None, None, priority, server,
    ),
    NAMES, st.none() | st.floats(0.2, 3), st.sampled_from([0, 100, 4096, 32768]), st.sampled_from([1, 3, 16]),
    st.sampled_from([0.0, 0.9, 0.98, 0.995]), st.sampled_from(sorted(advisor.PRIORITIES)),
    st.sampled_from([None, "vllm"]),
)  # fmt: skip


def advice(needs: Needs):
    try:
        return advise(needs)
    except CanopyError:
        return None


# Properties -----------------------------------------------------------------------------------------------------------


@given(NEEDS)
@settings(max_examples=60, deadline=None)
def test_the_recommendation_meets_the_needs(needs: Needs) -> None:
    found = advice(needs)
    assume(found is not None)
    assert not found.best.here or found.best.measured.accuracy.value >= (needs.accuracy or 0)
    assert found.best.here == (needs.model == "tutor")
    assert needs.memory is None or found.best.total <= needs.memory
    if needs.server == "vllm":
        recipe, cache = found.best.measured.parts
        assert cache in (None, "kv-fp8")
        if recipe is not None and recipe.activations is None:
            assert recipe.weights.granularity.group_size in (None, 32, 64, 128)
            assert recipe.weights.format.bits in (4, 8)
    if needs.priority == "throughput":
        assert found.best.measured.parts[0].activations is not None


@given(NEEDS)
@settings(max_examples=60, deadline=None)
def test_bytes_are_sums(needs: Needs) -> None:
    found = advice(needs)
    assume(found is not None)
    recipe, cache = found.best.measured.parts
    held = model_bytes(needs.shape, recipe)
    assert found.best.weights == held and held.total == held.codes + held.scales + held.zero_points + held.plain
    assert found.best.cache == cache_bytes(needs.shape, needs.context, needs.batch, cache)
    assert found.best.total == held.total + found.best.cache
    said = found.to_dict()["bytes"]
    assert sum(count for name, count in said.items() if name != "total") == said["total"]


@given(NEEDS, st.floats(1, 4))
@settings(max_examples=60, deadline=None)
def test_more_memory_is_never_worse(needs: Needs, factor: float) -> None:
    assume(needs.memory is not None)
    little = advice(needs)
    assume(little is not None)
    much = advice(replace(needs, memory=round(needs.memory * factor)))
    cost = costs(recorded(), needs.priority)
    assert (much.best.doubtful, *cost(much.best)) <= (little.best.doubtful, *cost(little.best))
    assert much.best.measured.kl <= little.best.measured.kl


@given(NEEDS)
@settings(max_examples=40, deadline=None)
def test_nothing_that_meets_the_needs_is_better(needs: Needs) -> None:
    """Against brute force over the definition."""
    found = advice(needs)
    options = [Option.of(m, needs) for m in recorded() if needs.context or m.parts[1] is None]
    floor = 0.98 if needs.accuracy is None else needs.accuracy
    able = [o for o in options if o.refused is None and (not o.here or o.measured.accuracy.value >= floor)
            and (needs.memory is None or o.total <= needs.memory)]  # fmt: skip
    assert (found is None) == (not able)
    if able:
        noise, rate = noise_of(recorded()), advisor.PRIORITIES[needs.priority]

        def cost(option: Option) -> float:
            kl = 0 if option.measured.recipe == "bf16" else option.measured.kl
            return (kl + noise) * (option.total / 1e6) ** rate

        kept = [o for o in able if o.measured.accuracy.value >= 0.98]  # elsewhere they come before what cost answers
        assert cost(found.best) <= min(map(cost, able if found.best.here else kept or able)) * (1 + 1e-9)
        assert {o.name for o in (found.best, *found.others)} == {o.name for o in able}


# The decision table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("priority", "recipe"), [("accuracy", "w8a16"), ("balanced", "w4a16-g128"), ("compression", "w4a16-g256")]
)
@pytest.mark.parametrize("model", ["7B", "8B", "13B", "70B"])
def test_the_first_three_rows_of_the_table(model: str, priority: str, recipe: str) -> None:
    found = advise(model, priority=priority)
    assert found.recipe == recipe and found.table[0].endswith(f"gives {recipe}: agreed")


@pytest.mark.parametrize("priority", ["accuracy", "balanced", "compression"])
def test_the_fourth_row_long_chats(priority: str) -> None:
    found = advise("llama-2-7b", context="32k", priority=priority)
    assert found.best.measured.parts[1] is not None and "agreed" in found.table[1]


def test_it_disagrees_when_the_row_does_not_fit() -> None:
    found = advise("7B", memory="6GB", priority="accuracy")
    assert found.recipe.startswith("w4a16") and "gives w8a16. Not here" in found.table[0]
    assert f"{cq.memory.human(Option.of(measured('w8a16'), found.needs).total)}" in found.table[0]


def test_it_disagrees_when_16_bits_fit() -> None:
    found = advise("7B", memory="24GB", priority="accuracy")
    assert found.recipe == "w8a16" and "in 16 bits everything takes 14.5 GB and fits" in found.table[-1]


def test_it_disagrees_on_the_cache_when_chats_are_short() -> None:
    known = [measured("w8a16"), replace(measured("w8a16"), recipe="w8a16+kv8", kl=measured("w8a16").kl + 1e-6)]
    assert advise("7B", context="32k", priority="accuracy", measurements=known).recipe == "w8a16+kv8"
    found = advise("7B", context=64, priority="accuracy", measurements=known)
    assert found.recipe == "w8a16" and "Not here: the cache takes" in found.table[1]


def test_it_disagrees_when_the_priority_pays_for_another_recipe() -> None:
    cheap = [Measurement("w8a16", 1e-4, 100, 100), Measurement("w4a16-g32", 1.1e-4, 100, 100)]
    found = advise("7B", priority="accuracy", measurements=cheap)
    assert found.recipe == "w4a16-g32" and "% of memory and" in found.table[0]


def measured(name: str) -> Measurement:
    return next(m for m in recorded() if m.recipe == name)


# Nothing fits ---------------------------------------------------------------------------------------------------------


def test_memory_must_give() -> None:
    with pytest.raises(CanopyError, match="One of them has to give: ") as caught:
        advise("llama-2-7b", memory="2GB")
    message = str(caught.value)
    assert message.count("\n") == 0
    least = min((Option.of(m, Needs.parse("llama-2-7b")) for m in recorded()), key=lambda option: option.total)
    assert f"{cq.memory.human(least.total - 2 * 10**9)} more memory" in message and least.name in message
    found = advise("llama-2-7b", memory=least.total)
    assert found.best.total == least.total


def test_context_and_batch_must_give_and_what_is_said_fits() -> None:
    words = {"memory": "8GB", "context": "128k", "batch": 4}
    with pytest.raises(CanopyError) as caught:
        advise("llama-2-7b", **words)
    message = str(caught.value)
    context = int(message.split("a context of at most ")[1].split(" tokens")[0].replace(",", ""))
    assert advise("llama-2-7b", **(words | {"context": context})).best.total <= 8e9
    with pytest.raises(CanopyError):
        advise("llama-2-7b", **(words | {"context": context + 64}))
    with pytest.raises(CanopyError, match="a batch of at most 1,|a batch of at most 1$|more memory"):
        advise("llama-2-7b", memory="8GB", context="32k", batch=50)


def test_accuracy_must_give() -> None:
    with pytest.raises(CanopyError, match=r"an accuracy floor of 9\d\.\d+ %"):
        advise("tutor", memory="3.5MB")
    with pytest.raises(CanopyError, match="an accuracy floor of 100 %.*|accuracy floor of 99"):
        advise("7B", accuracy=1.0, measurements=[Measurement("w8a16", 1e-5, 509, 510)])


def test_answers_of_another_model_are_no_floor() -> None:
    """They order recipes: those that cost the tutor answers come last, and with a word of warning."""
    with pytest.raises(CanopyError, match=r"accuracy=0\.9 "):
        advise("7B", accuracy=0.9)
    tight, roomy = advise("7B", memory="3GB"), advise("7B", priority="compression")
    assert measured(tight.recipe).accuracy.value < 0.98 and roomy.others[-1].name == tight.best.name
    assert [any("lost answers" in line for line in found.remarks) for found in (tight, roomy)] == [True, False]
    assert "% right" not in str(tight) and "at least 98 % right" in str(advise("tutor"))


def test_the_gpu_must_give() -> None:
    with pytest.raises(CanopyError, match="a GPU of compute capability 8.9 for fp8"):
        advise("7B", gpu="a100", measurements=[measured("fp8")])
    with pytest.raises(CanopyError, match="No single one of them can give enough"):
        advise("7B", gpu="a100", memory="1GB", measurements=[measured("fp8")])


# Measurements ---------------------------------------------------------------------------------------------------------


def test_every_recorded_recipe_can_be_saved_and_names_its_source() -> None:
    names = [m.recipe for m in recorded()]
    assert len(names) == len(set(names)) and {"bf16", "w8a16", "w4a16-g128", "w4a16-g256"} <= set(names)
    for m in recorded():
        assert "tutor" in m.source and m.n >= 200
        recipe, _ = m.parts
        if recipe is not None:
            disk_format(recipe.weights, recipe.activations)


def test_measurements_of_ones_own(tmp_path) -> None:
    mine = [Measurement("w8a16", 1e-5, 100, 100), Measurement("w4a16-g128", 2e-3, 99, 100)]
    advisor.write(tmp_path / "mine.json", mine)
    assert advisor.read(tmp_path / "mine.json") == mine
    found = advise("tutor", memory=6e6, measurements=mine)
    assert found.recipe == "w4a16-g128" and "your own measurement" in str(found)
    with pytest.raises(CanopyError, match="one source"):
        advisor.write(tmp_path / "two.json", [mine[0], replace(mine[1], source="another")])


def test_the_better_of_two_methods_is_taken() -> None:
    known = [Measurement("w4a16-g128", 2e-3, 99, 100), Measurement("w4a16-g128", 4e-4, 99, 100, method="gptq")]
    assert advise("7B", measurements=known).best.name == "w4a16-g128 by gptq"


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "does not hold measurements"), ("[]", "does not hold"),
     ('{"source": "me", "rows": [{"recipe": "w8a16"}]}', "does not hold"),
     ('{"source": "me", "rows": [{"recipe": "w9a16", "kl": 0, "right": 1, "n": 1}]}', "unknown recipe 'w9a16'"),
     ('{"source": "me", "rows": [{"recipe": "w8a16", "kl": -1, "right": 1, "n": 1}]}', "no divergence"),
     ('{"source": "me", "rows": [{"recipe": "w8a16", "kl": 0, "right": 2, "n": 1}]}', "right=2")],
)  # fmt: skip
def test_a_damaged_file_of_measurements(tmp_path, content: str, message: str) -> None:
    (tmp_path / "m.json").write_text(content)
    with pytest.raises(CanopyError, match=message):
        advisor.read(tmp_path / "m.json")
    with pytest.raises(CanopyError, match="none.json"):
        advisor.read(tmp_path / "none.json")


def test_two_caches_are_refused() -> None:
    with pytest.raises(CanopyError, match="names 2 caches"):
        split("w8a16+kv8+kv4")


def test_advice_reads_well() -> None:
    found = advise("7B", memory="8GB", context="32k", priority="accuracy")
    text = str(found)
    assert "the nearest that is known to 7B" in text and "32,768 tokens" in text and found.recipe in text
    assert json.loads(json.dumps(found.to_dict()))["bytes"]["total"] == found.best.total
    assert "<pre>" in found._repr_html_()


@pytest.mark.parametrize("priority", sorted(advisor.PRIORITIES))
@pytest.mark.parametrize(("hidden", "ffn", "fits"), [(576, 1536, (32, 64)), (64, 96, (32,)), (96, 40, ())])
def test_groups_divide_every_layer(tmp_path, hidden: int, ffn: int, fits: tuple[int, ...], priority: str) -> None:
    """576 is SmolLM2's width, which groups of 128 do not divide."""
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_attention_heads=4, num_hidden_layers=1,
                vocab_size=96).save_pretrained(tmp_path)  # fmt: skip
    found = advise(str(tmp_path), priority=priority)
    sizes = {option.measured.parts[0].weights.granularity.group_size
             for option in (found.best, *found.others) if option.measured.parts[0] is not None}  # fmt: skip
    assert sizes <= {None, *fits} and (priority == "throughput" or sizes == {None, *fits})


@pytest.mark.parametrize("model", ["7B", "llama-3.1-8b", "folder"])
@pytest.mark.parametrize("words", [{}, {"memory": "6GB", "priority": "accuracy"}, {"context": "8k"}], ids=str)
def test_no_quality_is_promised_that_was_measured_on_another_model(tmp_path, model: str, words: dict) -> None:
    if model == "folder":
        from transformers import LlamaConfig

        LlamaConfig().save_pretrained(tmp_path)
        model = str(tmp_path)
    found = advise(model, **words)
    said = json.dumps(found.to_dict())
    for text in (said, str(found)):
        assert not any(f"{o.measured.kl:.2g}" in text for o in (found.best, *found.others)) and "% (" not in text
    assert '"quality": null' in said and "not measured on this model" in str(found)
    assert any(found.best.measured.source in line for line in found.remarks)
    assert advise("tutor", **words).to_dict()["quality"]["kl"] > 0
    mine = [replace(m, model=None, source="mine") for m in recorded()]
    assert f"{found.best.measured.kl:.2g}" in str(advise(model, measurements=mine, **words)).split("also")[0]


def test_measurements_without_answers_ask_for_no_accuracy() -> None:
    known = [Measurement("w8a16", 0.004, perplexity=31.9), Measurement("w4a16-g32", 0.4, perplexity=41.9)]
    found = advise("7B", memory="5GB", measurements=known)
    assert found.recipe == "w4a16-g32" and "perplexity 41.9" in str(found) and "% right" not in str(found)
    assert json.loads(json.dumps(found.to_dict()))["quality"]["accuracy"] is None
    with pytest.raises(CanopyError, match="accuracy=0.9"):
        advise("7B", accuracy=0.9, measurements=known)
    with pytest.raises(CanopyError, match="n=None of w8a16"):
        Measurement("w8a16", 0.004, 3)
