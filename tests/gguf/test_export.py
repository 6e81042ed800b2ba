"""GGUF files against the `gguf` library, which dequantizes their blocks, and llama.cpp, which answers from them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import canopyq as cq
from canopyq.cli import app
from canopyq.gguf.architectures import ARCHITECTURES
from canopyq.gguf.base import read
from canopyq.gguf.blocks import to_blocks

gguf = pytest.importorskip("gguf")

EXACT = ["w8a16", "w8a16-g128", "w6a16-g64", "w4a16-g32", "w4a16-g128", "w4a16-channel", "w4a16-tensor", "w3a16-g64",
         "w2a16-g32", "mxfp4", "nvfp4"]  # fmt: skip
TINY = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1280, "max_position_embeddings": 512, "bos_token_id": 1,
        "eos_token_id": 4, "pad_token_id": 0, "initializer_range": 0.1}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
FAMILIES = {
    "llama": {}, "llama3": {"family": "llama", "rope_parameters": LLAMA3}, "mistral": {"sliding_window": None},
    "linear": {"family": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "qwen2": {}, "yarn": {"family": "qwen2", "rope_parameters": YARN}, "qwen3": {"head_dim": 64},
    "gemma2": {"head_dim": 64, "sliding_window": 16, "query_pre_attn_scalar": 64},
    "gemma3_text": {"head_dim": 64, "sliding_window": 16, "query_pre_attn_scalar": 64, "num_hidden_layers": 7},
    "phi3": {}, "partial": {"family": "phi3", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                  "partial_rotary_factor": 0.5}},
    "biases": {"family": "llama", "attention_bias": True},
}  # fmt: skip


def tiny(family: str = "llama", **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**TINY, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that would be missed if they were not written
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def tutor():
    return cq.tutor.load()


def llama_cpp(path, prompts, tokens: int = 1, probabilities: int = 1280):
    """Each prompt with the token ids that llama.cpp continues it with, and its log-probabilities of the first
    (vocabulary,), of which it gives the largest so many. Without prompts after which it says nothing."""
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp's wheel is for Linux alone")
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = str(path), 512, 0, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cpuparams.poll = params.cpuparams_batch.poll = 0  # do not spin: other tests run beside
    server, found = llama.Server(params), []
    for prompt in prompts:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": tokens,
                "temperature": 0,
                "top_k": 1,
                "n_probs": probabilities,
                "cache_prompt": False,
            }
        )
        if (chosen := answer["choices"][0])["logprobs"] is None:  # the first token ends the text: it gives none
            continue
        content = chosen["logprobs"]["content"]
        logs = torch.full((1280,), -100.0, dtype=torch.float64)
        for token in content[0]["top_logprobs"]:
            logs[token["id"]] = token["logprob"]
        found.append((prompt, [token["id"] for token in content], logs))
    return found


def kl(model, ids: list[int], other: torch.Tensor) -> float:
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    return float((own.exp() * (own - other)).sum())


@pytest.mark.parametrize("recipe", EXACT)
def test_every_code_and_scale_is_kept(recipe: str) -> None:
    torch.manual_seed(0)
    weight = cq.quantize(torch.randn(48, 256) * 0.05, cq.Recipe.parse(recipe).weights)
    rows = np.random.default_rng(0).permutation(48)
    blocks = to_blocks(weight, rows)
    got = gguf.quants.dequantize(blocks.data, gguf.GGMLQuantizationType[blocks.type]) * (blocks.tensor_scale or 1)
    wanted = weight.dequantize(torch.float32).numpy()[rows]
    # NVFP4 multiplies two scales in another order: an ulp or two of float32
    np.testing.assert_allclose(got, wanted, rtol=3e-7 if recipe == "nvfp4" else 0, atol=0)


@pytest.mark.parametrize("recipe", ["w4a16-g32-asym", "w3a16-g128-asym", "w4a16-channel-asym"])
def test_zero_points_become_minima_rounded_to_float16(recipe: str) -> None:
    torch.manual_seed(0)
    weight = cq.quantize(torch.randn(48, 256) * 0.05, cq.Recipe.parse(recipe).weights)
    blocks = to_blocks(weight)
    got = gguf.quants.dequantize(blocks.data, gguf.GGMLQuantizationType.Q4_1)
    step, zero_point = weight.float_scale(), weight.zero_point.float()
    bound = ((zero_point + 8).abs() * step).max().item() * 2.0**-11 + 1e-9  # half an ulp of the largest minimum
    assert np.abs(got - weight.dequantize(torch.float32).numpy()).max() <= bound
    assert blocks.rounded < 0.05 * blocks.count


@pytest.mark.parametrize(
    ("scheme", "says"),
    [
        (cq.Scheme("nf4"), "nf4"),
        (cq.Scheme("fp8", "channel"), "fp8"),
        (cq.Scheme("int8", "g32", symmetric=False), "asymmetric"),
        (cq.Scheme("int4", "g16"), "16"),
        (cq.Scheme("int4", "g48"), "48"),
        (cq.Scheme("int4", "token"), "token"),
    ],
)
def test_codes_that_no_type_holds_are_refused(scheme: cq.Scheme, says: str) -> None:
    with pytest.raises(cq.CanopyError, match=says):
        to_blocks(cq.quantize(torch.randn(8, 64 if says != "48" else 192), scheme))


def test_scales_that_float16_does_not_hold_are_refused() -> None:
    with pytest.raises(cq.CanopyError, match="float16"):
        to_blocks(cq.quantize(torch.randn(8, 64), cq.Scheme("int4", "g32", scale_dtype=torch.float32)))
    with pytest.raises(cq.CanopyError, match="float16"):
        to_blocks(cq.quantize(torch.randn(8, 64) * 1e-6, cq.Scheme("int4", "g32", scale_dtype=torch.bfloat16)))


@pytest.mark.parametrize("recipe", [None, "w4a16-g32", "w4a16-g128", "w8a16", "nvfp4", "w4a16-g32-asym"])
def test_llama_cpp_answers_as_canopyq_does(recipe, tmp_path) -> None:
    model, tokenizer = cq.tutor.load()
    if recipe:
        cq.quantize_(model, recipe)
    cq.export_gguf(model, tmp_path / "tutor.gguf", tokenizer)
    questions = [question.turns[0][0] for question in cq.tutor.questions(170)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in chats]
    few = prompts[:: 5 if recipe == "w4a16-g32" else 20]
    first = llama_cpp(tmp_path / "tutor.gguf", few[:4])
    divergences = [kl(model, ids, logs) for ids, _, logs in first]
    assert np.mean(divergences) < 1e-4
    other = 0
    for ids, tokens, _ in llama_cpp(tmp_path / "tutor.gguf", few, 8, 1):
        with torch.no_grad():
            own = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1].double()
        lead = own.max(-1).values - own[range(len(tokens)), tokens]
        other += bool((lead > 0).any())
        assert lead.max() < 0.5, "llama.cpp rounds inputs to 8 bits: it may decide a tie, and nothing else"
    assert other <= 0.02 * len(few)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_gives_its_logits(name: str, tutor, tmp_path) -> None:
    options = dict(FAMILIES[name])
    model = tiny(options.pop("family", name), **options)
    cq.quantize_(model, "w8a16-g32")
    cq.export_gguf(model, tmp_path / "tiny.gguf", tutor[1])
    draw = np.random.default_rng(0)
    prompts = [[1] + draw.integers(5, 1280, 60).tolist() for _ in range(3)]  # beyond the sliding windows
    found = llama_cpp(tmp_path / "tiny.gguf", prompts)
    assert found
    # llama.cpp rounds each 32 inputs of a product to 8 bits, an error of some 0.4 %; a wrong number in the metadata or
    # a row out of place gives a divergence of 0.1 to 5.
    assert all(kl(model, ids, logs) < 3e-3 for ids, _, logs in found)


def test_a_window_that_llama_cpp_does_not_know_ends_the_context(tutor, tmp_path) -> None:
    model = tiny("mistral", sliding_window=16)
    cq.quantize_(model, "w4a16-g32")
    done = cq.export_gguf(model, tmp_path / "m.gguf", tutor[1])
    assert read(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 16
    assert any("16" in note for note in done.notes)


def test_a_sentencepiece_tokenizer_cuts_text_in_llama_cpp_as_in_transformers(tmp_path) -> None:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = [text for question in cq.tutor.questions(400) for turn in question.turns for text in turn]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special))
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    backend = Tokenizer.from_str(json.dumps(content))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    model = tiny()
    cq.quantize_(model, "w8a16-g32")
    cq.export_gguf(model, tmp_path / "sp.gguf", tokenizer)
    prompts = [*texts[:6], "Grüße, 世界! 7*8"]
    found = llama_cpp(tmp_path / "sp.gguf", prompts)
    assert len(found) > 3
    for prompt, _, logs in found:
        assert kl(model, tokenizer(prompt)["input_ids"], logs) < 3e-3, prompt


def test_a_base_gives_metadata_and_what_did_not_change(tutor, tmp_path) -> None:
    model, tokenizer = cq.tutor.load()
    cq.export_gguf(model, tmp_path / "base.gguf", tokenizer)
    cq.quantize_(model, "w4a16-g32")
    cq.export_gguf(model, tmp_path / "own.gguf", tokenizer)
    cq.export_gguf(model, tmp_path / "over.gguf", base=tmp_path / "base.gguf")
    own, over, base = (read(tmp_path / f"{name}.gguf") for name in ("own", "over", "base"))
    tensors = {tensor.name: tensor for tensor in over.tensors}
    assert tensors.keys() == {tensor.name for tensor in own.tensors}
    for tensor in own.tensors:
        assert tensors[tensor.name].tensor_type == tensor.tensor_type
        assert np.array_equal(tensors[tensor.name].data, tensor.data)
    for name, field in base.fields.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            assert over.fields[name].contents() == field.contents()
    with pytest.raises(cq.CanopyError, match=r"\(1280, 128\)"):
        cq.export_gguf(tiny(), tmp_path / "wrong.gguf", base=tmp_path / "base.gguf")
    with pytest.raises(cq.CanopyError, match="qwen2"):
        cq.export_gguf(tiny("qwen2"), tmp_path / "wrong.gguf", base=tmp_path / "base.gguf")
    assert not list(tmp_path.glob("*wrong*"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_family_that_is_not_described_takes_the_order_of_its_base(family, tutor, tmp_path, monkeypatch) -> None:
    options = {**({"attention_bias": True} if family == "llama" else {}), **FAMILIES[family]}
    cq.export_gguf(tiny(family, **options), tmp_path / "base.gguf", tutor[1])
    model = tiny(family, **options)
    cq.quantize_(model, "w2a16-g32")  # as far from its base as codes get
    cq.export_gguf(model, tmp_path / "known.gguf", base=tmp_path / "base.gguf")
    monkeypatch.delitem(ARCHITECTURES, family)
    cq.export_gguf(model, tmp_path / "unknown.gguf", base=tmp_path / "base.gguf")
    assert (tmp_path / "unknown.gguf").read_bytes() == (tmp_path / "known.gguf").read_bytes()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.mul_(1.1)  # as AWQ and SmoothQuant do
    with pytest.raises(cq.CanopyError, match="blk.1.attn_norm"):
        cq.export_gguf(model, tmp_path / "wrong.gguf", base=tmp_path / "base.gguf")
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(model.config)
    cq.quantize_(other, "w4a16-g32")
    with pytest.raises(cq.CanopyError, match="is not what the base has"):
        cq.export_gguf(other, tmp_path / "wrong.gguf", base=tmp_path / "base.gguf")
    assert not list(tmp_path.glob("*wrong*"))


def test_a_base_of_nvfp4_leaves_no_scale_behind(tutor, tmp_path) -> None:
    models = [tiny(), tiny(), tiny()]
    for model, recipe, base, out in zip(
        models, ["nvfp4", "w4a16-g32", "nvfp4"], [None, "0", "1"], ["0", "1", "2"], strict=True
    ):
        cq.quantize_(model, recipe)
        file = None if base is None else tmp_path / f"{base}.gguf"
        cq.export_gguf(model, tmp_path / f"{out}.gguf", None if file else tutor[1], base=file)
    scales = [sum(t.name.endswith(".scale") for t in read(tmp_path / f"{n}.gguf").tensors) for n in "012"]
    assert scales == [21, 0, 21]
    ids = [1, 50, 600, 7]
    ((_, _, logs),) = llama_cpp(tmp_path / "1.gguf", [ids]) or [(0, 0, None)]
    assert logs is None or kl(models[1], ids, logs) < 3e-3


def test_rows_that_fill_no_block_are_refused_or_left_in_16_bits(tutor, tmp_path) -> None:
    model = tiny(intermediate_size=272)
    cq.quantize_(model, "w8a16")
    for requantize, says in [(None, "272"), ("q8_0", "272")]:
        with pytest.raises(cq.CanopyError, match=says):
            cq.export_gguf(model, tmp_path / "m.gguf", tutor[1], requantize=requantize)
    assert cq.export_gguf(model, tmp_path / "m.gguf", tutor[1], requantize="bf16").types["BF16"] == 3
    assert read(tmp_path / "m.gguf").fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


def test_what_cannot_be_written_leaves_nothing(tutor, tmp_path) -> None:
    model, tokenizer = tiny(), tutor[1]
    cq.quantize_(model, "nf4")
    path = tmp_path / "out.gguf"
    for call, says in [
        (lambda: cq.export_gguf(model, path, tokenizer), "nf4"),
        (lambda: cq.export_gguf(model, path), "tokenizer"),
        (lambda: cq.export_gguf(model, path, tokenizer, requantize="q3_k"), "q3_k"),
        (lambda: cq.export_gguf(model, tmp_path / "no" / "out.gguf", tokenizer), "no"),
        (lambda: cq.export_gguf(tiny("gpt_neox"), path, tokenizer), "gpt_neox"),
        (lambda: cq.export_gguf(tiny("mixtral"), path, tokenizer), "experts"),
        (lambda: cq.export_gguf(torch.nn.Linear(4, 4), path, tokenizer), "Linear"),
        (lambda: cq.export_gguf(model, path, base=tmp_path / "none.gguf"), "none.gguf"),
    ]:
        with pytest.raises(cq.CanopyError, match=says):
            call()
        assert list(tmp_path.iterdir()) == []
    done = cq.export_gguf(model, path, tokenizer, requantize="q8_0")
    assert done.types["Q8_0"] == len(done.requantized) == 21
    with pytest.raises(cq.CanopyError, match="exists"):
        cq.export_gguf(model, path, tokenizer)


def test_damaged_files_are_refused_in_one_line(tutor, tmp_path) -> None:
    cq.export_gguf(tiny(), tmp_path / "base.gguf", tutor[1])
    whole, draw = (tmp_path / "base.gguf").read_bytes(), random.Random(0)
    for _ in range(40):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(min(len(damaged), 2048)) if damaged else 0
            damaged[at : at + 8] = draw.randbytes(8) if draw.random() < 0.5 else b"\xff" * 7 + b"\x7f"
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        try:
            read(tmp_path / "damaged.gguf")
        except cq.CanopyError as error:
            assert "\n" not in str(error) and "damaged.gguf" in str(error)


def test_the_command_exports_what_quantize_wrote(tmp_path) -> None:
    run = CliRunner().invoke
    folder, file = tmp_path / "w4", tmp_path / "w4.gguf"
    assert run(app, ["quantize", "tutor", "--recipe", "w4a16-g32", "--out", str(folder)]).exit_code == 0
    done = run(app, ["export", str(folder), "--gguf", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["types"] == {"BF16": 1, "Q4_0": 56} and file.is_file()
    again = run(app, ["export", str(folder), "--gguf", str(file)])
    assert isinstance(again.exception, cq.CanopyError)
