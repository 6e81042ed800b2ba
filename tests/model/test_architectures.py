"""`quantize_` on the architectures that people run, tiny and random: right outputs, nothing skipped without a word."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import canopyq as cq
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.errors import CanopyError
from canopyq.memory import bytes_held
from canopyq.nn.embedding import QuantizedEmbedding
from canopyq.nn.experts import QuantizedExperts
from canopyq.nn.linear import QuantizedLinear
from canopyq.tensor.scheme import Recipe

COMMON = {"vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = COMMON | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "intermediate_size": 256}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 4, "decoder_sparse_step": 1,
           "head_dim": 32}  # fmt: skip
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)),
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**LLAMA, head_dim=32)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**LLAMA, head_dim=32)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**LLAMA)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**LLAMA, head_dim=32)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA, head_dim=32)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=128, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**COMMON, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, ffn_dim=256,
                     word_embed_proj_dim=128)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3 moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**LLAMA, **EXPERTS)),
}  # fmt: skip
TOKENS = torch.arange(3, 39).reshape(2, 18)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for module in model.modules():  # new models have zero biases and unit gains, which hide mistakes
            if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
                module.bias.normal_(std=0.1)
    return model


def dequantized(model: nn.Module, recipe: str) -> nn.Module:
    """The same architecture with every target's weight replaced by what its codes stand for: the slow oracle."""
    from canopyq.nn.targets import find_targets

    model = copy.deepcopy(model)
    with torch.no_grad():
        for target in find_targets(model, Recipe.parse(recipe))[0]:
            target.weight.copy_(cq.quantize(target.weight, target.scheme).dequantize())
    return model


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g64-asym"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_are_those_of_the_dequantized_weights(name: str, recipe: str) -> None:
    model = make(name)
    expected = dequantized(model, recipe)(TOKENS).logits
    planned = cq.plan(model, recipe)
    before = sum(
        p.untyped_storage().nbytes() for p in {p.untyped_storage().data_ptr(): p for p in model.parameters()}.values()
    )
    report = cq.quantize_(model, recipe)
    got = model(TOKENS).logits
    assert float((got - expected).norm() / expected.norm()) < 1e-3
    assert {layer.name: layer.shape for layer in report.layers} == {n: s for n, (s, _, _) in planned.layers.items()}
    assert {layer.name: layer.bytes_after for layer in report.layers} == {
        n: b for n, (_, _, b) in planned.layers.items()
    }
    assert planned.kept == report.kept
    assert planned.bytes_before == report.bytes_before >= before
    assert planned.bytes_after == report.bytes_after == bytes_held(model)
    heavy = {n for n, m in model.named_modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
    assert heavy <= set(report.kept), "a matrix that is neither quantized nor named"
    assert "lm_head" in report.kept


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "qwen3 moe", "opt"])
def test_generate_runs(name: str) -> None:
    model = make(name)
    cq.quantize_(model, "w4a16-g64")
    assert model.generate(TOKENS[:1, :4], max_new_tokens=4, do_sample=False).shape == (1, 8)


def test_experts_become_three_layers_each() -> None:
    model = make("mixtral")
    report = cq.quantize_(model, "w4a16-g32")
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert [len(module) for module in experts] == [4, 4]
    names = [layer.name for layer in report.layers if ".experts." in layer.name]
    assert len(names) == 2 * 4 * 3 and names[0].endswith("experts.0.gate_proj")
    assert "MixtralTopKRouter" in report.kept["model.layers.0.mlp.gate"]


def test_one_expert_alone_cannot_be_kept() -> None:
    with pytest.raises(cq.CanopyError, match=r"'experts\.1' .*one by one"):
        cq.plan(make("mixtral"), cq.Recipe("mine", cq.Scheme("int4", "g32"), ignore="experts.1"))


def test_layers_whose_weight_the_model_reads_itself_stay() -> None:
    """Mamba's mixer multiplies by dt_proj's weight without calling it; codes would end in an error."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 32, "state_size": 8}
    model = tf.MambaForCausalLM(tf.MambaConfig(**sizes)).eval()
    expected = dequantized(model, "w8a16")(TOKENS).logits
    report = cq.quantize_(model, "w8a16")
    assert "MambaMixer computes with its weight itself" in report.kept["backbone.layers.0.mixer.dt_proj"]
    quantized = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert "in_proj" in quantized and "dt_proj" not in quantized
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-2, atol=1e-3)


MOE = LLAMA | {"num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
MAKES = {  # how families hold their experts -> config
    "gpt_oss": MOE | {"head_dim": 32},  # transposed, gate and up in turn, with biases and an activation of its own
    "llama4_text": MOE | {"intermediate_size_mlp": 256, "head_dim": 32, "num_experts_per_tok": 1,
                          "interleave_moe_layer_step": 1},  # transposed; each expert gets all tokens, most as zeros
    "jetmoe": MOE | {"kv_channels": 32},  # each projection a module of its own
    "dbrx": COMMON | {"d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
                      "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
                      "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},  # in a row
    "hy_v4": MOE | {"head_dim": 32},  # a clamped activation
    "nemotron_h": MOE | {"head_dim": 32, "layers_block_type": ["moe", "attention"], "mamba_num_heads": 8, "n_groups": 1,
                         "moe_shared_expert_intermediate_size": 64, "mamba_head_dim": 32},  # no gate
    "longcat_flash": COMMON | {"hidden_size": 128, "num_layers": 1, "num_attention_heads": 4, "ffn_hidden_size": 128,
                               "expert_ffn_hidden_size": 64, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
                               "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
                               "head_dim": 16, "v_head_dim": 32},  # some give back what they get
}  # fmt: skip


def of_make(name: str) -> nn.Module:
    if name not in tf.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(name, **MAKES[name])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.3 if parameter.dim() == 1 else 0, 0.05)  # experts are left without values
    return model


@pytest.mark.parametrize("name", MAKES)
@torch.no_grad()
def test_experts_of_every_make(name: str, tmp_path) -> None:
    model = of_make(name)
    expected = dequantized(model, "w8a16")(TOKENS).logits
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    ends = sum(end.weight.numel() for end in (model.get_input_embeddings(), model.get_output_embeddings()))
    report = cq.quantize_(model, "w8a16")
    got = model(TOKENS).logits
    assert float((got - expected).norm() / expected.norm()) < 1e-3
    assert sum(n * k for n, k in (layer.shape for layer in report.layers)) > 0.85 * (matrices - ends)
    cq.save(model, tmp_path / "model")
    of_make(name).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", "w8a16", tmp_path / "streamed")
    for folder in ("model", "streamed"):
        assert torch.equal(cq.load(tmp_path / folder)(TOKENS).logits, got)


BERT = COMMON | {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
HEADS = {  # the name of the head -> a model that has it
    "cls.predictions.decoder": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
    "output_projection": lambda: tf.BioGptForCausalLM(tf.BioGptConfig(**BERT)),
    "decoder": lambda: tf.ModernBertDecoderForCausalLM(tf.ModernBertDecoderConfig(**BERT | {"num_hidden_layers": 2})),
    "score": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**LLAMA, num_labels=8)),
    "classifier": lambda: tf.BertForTokenClassification(tf.BertConfig(**BERT, num_labels=8)),
    "out_head": lambda: nn.ModuleDict(
        {"tok_emb": nn.Embedding(96, 64), "pos_emb": nn.Embedding(16, 64), "ff": nn.Linear(64, 16, bias=False),
         "out_head": nn.Linear(64, 96, bias=False)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_the_output_head_stays_whatever_its_name(name: str) -> None:
    """Quantized it would lose the weight that it shares with the embedding, and the model would grow."""
    torch.manual_seed(0)
    model = HEADS[name]()
    head = model.get_submodule(name)
    report = cq.quantize_(model, "w8a16")
    assert model.get_submodule(name) is head and name in report.kept and len(report.layers) >= 1
    assert report.bytes_after < report.bytes_before
    other = HEADS[name]()
    assert name in {layer.name for layer in cq.quantize_(other, "w8a16+head").layers}


@pytest.mark.parametrize("name", ["llama tied", "llama", "gpt2"])
@pytest.mark.parametrize("extra", ["+head", "+embed", "+head+embed"])
@torch.no_grad()
def test_head_and_embedding_on_request(name: str, extra: str) -> None:
    model = make(name)
    planned = cq.plan(model, "w8a16" + extra)
    ends = (model.get_input_embeddings().weight.clone(), model.get_output_embeddings().weight.clone())
    report = cq.quantize_(model, "w8a16" + extra)
    assert planned.bytes_after == report.bytes_after
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, QuantizedLinear) == ("head" in extra)
    assert isinstance(embedding, QuantizedEmbedding) == ("embed" in extra)
    assert not model.config.tie_word_embeddings or name == "llama"
    scheme = Recipe.parse("w8a16").weights
    if "embed" in extra:
        expected = cq.quantize(ends[0], scheme).dequantize()[TOKENS]
        assert torch.equal(embedding(TOKENS), expected)
    else:
        assert torch.equal(embedding.weight, ends[0])
    if "head" in extra:
        x = torch.randn(20, 128)
        expected = x @ cq.quantize(ends[1], scheme).dequantize().t()
        assert float((head(x) - expected).norm() / expected.norm()) < 1e-5
    else:
        assert torch.equal(head.weight, ends[1])
    assert model(TOKENS).logits.isfinite().all()
    model.tie_weights()  # transformers calls it when it likes
    assert isinstance(model.get_output_embeddings(), QuantizedLinear) == ("head" in extra)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_output_errors_are_measured_on_the_data(name: str) -> None:
    model = make(name)
    layer = "model.layers.1.mlp.down_proj" if name == "llama" else "transformer.h.1.mlp.c_proj"
    seen = []
    old = model.get_submodule(layer)
    watching = old.register_forward_hook(lambda module, given, y: seen.append((given[0].detach(), y.detach())))
    twin = copy.deepcopy(old)
    report = cq.quantize_(model, "w2a16-g32", calibration=[TOKENS, TOKENS + 7])
    watching.remove()
    with torch.no_grad():
        quantized = [model.get_submodule(layer)(x) for x, _ in seen]
    noise = sum(float((a - y).square().sum()) for a, (_, y) in zip(quantized, seen, strict=True))
    signal = sum(float(y.square().sum()) for _, y in seen)
    found = {x.name: x.output_error for x in report.layers}
    assert found[layer] == pytest.approx((noise / signal) ** 0.5, rel=1e-2)
    assert report.worst[0].output_error == max(found.values())
    assert "output off by" in str(report) and twin is not None


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "calibration data is empty"), ([torch.zeros(3)], r"\(3,\)"), (["text"], "no tokenizer")],
)
def test_bad_calibration_leaves_the_model_as_it_was(batches: list, message: str) -> None:
    model = make("llama")
    with pytest.raises(CanopyError, match=message):
        cq.quantize_(model, "w4a16-g32", calibration=batches)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


def test_a_plan_needs_no_data() -> None:
    with torch.device("meta"):
        empty = MODELS["llama tied"]()
    real = cq.plan(make("llama tied"), "w4a16-g128")
    there = cq.plan(empty, "w4a16-g128")
    assert there.layers == real.layers and there.kept == real.kept
    assert there.bytes_after == real.bytes_after
    assert "14 weights to quantize" in str(real) and "kept: lm_head (named in the recipe's ignore list)" in str(real)


def test_strict_refuses_what_would_be_kept_or_slow() -> None:
    with pytest.raises(CanopyError, match=r"strict: model.layers.0.mlp.gate would be kept"):
        cq.quantize_(make("mixtral"), "w8a16", strict=True)
    model = make("llama")
    assert cq.quantize_(model, "w4a16-g32", strict=True).layers
    other = nn.Sequential(nn.Linear(64, 64))
    axis = Recipe("columns", cq.Scheme("int8", cq.Granularity("channel", axis=1)))
    with pytest.raises(CanopyError, match="strict: 0 would run on the reference"):
        cq.quantize_(other, axis, strict=True)
    assert type(other[0]) is nn.Linear


def test_explain_says_what_runs_and_why_not() -> None:
    model = make("llama")
    with pytest.raises(CanopyError, match="no quantized layer to explain"):
        cq.explain(model)
    cq.quantize_(model, "w4a16-g128")
    found = cq.explain(model)
    assert len(found.layers) == 14
    for layer in found.layers:
        assert layer.runs and layer.refused
        assert 8 * layer.nbytes / (layer.shape[0] * layer.shape[1]) <= 4.3
    text = str(found)
    assert "refused int8 by int8" in text
    for kernel in found.layers[0].runs:  # which ones differs from processor to processor
        assert text.count(f"runs    {kernel}:") == 1, "layers that run alike share a paragraph"
    assert text.startswith("model.layers.0.self_attn.q_proj and 13 more: 128x128, 64x128, 256x128, 128x256, int4 g128")


@pytest.mark.parametrize("recipe", ["w8a8", "fp8"])
@torch.no_grad()
def test_activations_are_quantized_per_token(recipe: str) -> None:
    model = make("llama")
    x = torch.randn(2, 5, 128) * torch.rand(2, 5, 1) * 10
    weight = model.model.layers[0].mlp.gate_proj.weight.clone()
    cq.quantize_(model, recipe)
    scheme = Recipe.parse(recipe)
    expected = cq.quantize(x, scheme.activations).dequantize() @ cq.quantize(weight, scheme.weights).dequantize().t()
    got = model.model.layers[0].mlp.gate_proj(x)
    assert float((got - expected).norm() / expected.norm()) < 4e-3  # few tokens: a kernel may round outputs to bfloat16


class Plain(nn.Linear):
    """An expert's projection in full precision, where `QuantizedExperts` expects a quantized one."""


def watched(model: nn.Module) -> tuple[nn.Module, dict[str, list[torch.Tensor]]]:
    """The model with a layer of its own for every projection of every expert, and a list of what each layer gets."""
    from canopyq.nn.sites import weight_holders

    model = copy.deepcopy(model)
    for holder in weight_holders(model):
        if any(site.part for site in holder.sites):
            layers = []
            for site in holder.sites:
                layers.append(Plain(site.weight.shape[1], site.weight.shape[0], bias=site.bias() is not None))
                layers[-1].weight.data.copy_(site.weight)
                if site.bias() is not None:
                    layers[-1].bias.data.copy_(site.bias())
            model.set_submodule(holder.name, holder.kind.replacement(holder.module, layers))
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Plain) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(
                lambda module, given, name=name: inputs.setdefault(name, []).append(given[0].flatten(0, -2))
            )
    return model, inputs


@pytest.mark.parametrize("name", [*MODELS, "gpt_oss", "llama4_text", "nemotron_h"])
@torch.no_grad()
def test_calibration_block_by_block_sees_what_the_whole_model_sees(name: str) -> None:
    from canopyq.calibration.calibrate import calibrate

    model = make(name) if name in MODELS else of_make(name)
    whole, inputs = watched(model)
    batches = [TOKENS, TOKENS[:1, :7] + 40]
    for batch in batches:
        whole(batch)
    found = calibrate(model, batches, hessian=True)
    inputs.pop("lm_head")
    assert found.by_blocks and set(found) == set(inputs) and len(found) >= 8
    for layer, seen in inputs.items():
        rows, statistics = torch.cat(seen).double(), found[layer]
        assert statistics.tokens == len(rows)
        torch.testing.assert_close(statistics.lo.double(), rows.amin(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(statistics.hi.double(), rows.amax(0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(statistics.hessian.double(), rows.t() @ rows / len(rows), rtol=1e-3, atol=1e-4)


def test_experts_that_no_token_reaches_are_named() -> None:
    from canopyq.calibration.calibrate import calibrate

    found = calibrate(make("mixtral"), [TOKENS[:2, :1]])  # two tokens with two experts each, of four
    assert found.unseen and all(".experts." in name for name in found.unseen)
    assert set(found.unseen.values()) == {"the router sent no token to it"} and "not calibrated: " in str(found)
