"""A tiny random model of every causal LM class that the installed transformers has, put through canopyq.

    python tools/families.py                    all of them, into docs/families.md
    python tools/families.py --resume           the same, without those that a run that was stopped has done already
    python tools/families.py llama gpt_oss      these, printed

Rows are kept in build/families.jsonl as they are made. Each check says "yes", or in a few words what came instead.
Models are a few hundred kilobytes and their weights random: this shows that shapes, names and code go together, and
nothing of quality.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers as tf
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import canopyq as cq
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.errors import CanopyError, one_line
from canopyq.methods.equivalence import foldable, rescale
from canopyq.methods.rotation import rotate_
from canopyq.methods.structure import scale_pairs
from canopyq.methods.transaction import Transaction

TARGET = Path(__file__).parents[1] / "docs" / "families.md"
ROWS = TARGET.parents[1] / "build" / "families.jsonl"
CHECKS = ("save + load", "disk to disk", "transformers", "gptq", "hqq", "awq", "smoothquant", "rotation", "w8a8",
          "w8a8-static", "kv8")  # fmt: skip
RECIPE = "w4a16-g32"
TOKENS = torch.arange(3, 35).reshape(2, 16)
# Sizes by the names that configs give them; what a config does not have is left out.
SIZES = {
    **dict.fromkeys(["vocab_size", "text_vocab_size", "vocab_size_per_layer_input"], 96),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "n_embed", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["embedding_size", "attention_hidden_size"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "encoder_attention_heads"], 4),
    "decoder_attention_heads": 4,
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
                     "intermediate_size_mlp", "shared_expert_intermediate_size", "ff_dim"], 128),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size",
                     "shared_intermediate_size"], 64),
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"], 2),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "kv_channels", "global_head_dim",
                     "linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input", "mamba_head_dim",
                     "ssm_state_size"], 32),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 16),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_sequence_length"], 64),
    **dict.fromkeys(["bos_token_id"], 1), **dict.fromkeys(["eos_token_id"], 2), "pad_token_id": 0,
    "n_group": 1, "topk_group": 1, "num_shared_experts": 1, "n_shared_experts": 1, "first_k_dense_replace": 0,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
# What the default config of a family leaves open, or what its code takes for granted.
OWN_SIZES = {
    **dict.fromkeys(["hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"], {"head_dim": 32}),
    "helium": {"head_dim": 16}, "nemotron": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "kimi_linear": {"num_experts_per_token": 2}, "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def shrunk(model_type: str) -> tf.PretrainedConfig:
    """The default config of a family with the sizes above, in all its parts."""
    default = tf.AutoConfig.for_model(model_type)

    def small(config: tf.PretrainedConfig) -> dict:
        content = config.to_diff_dict() if config is default else config.to_dict()
        own = {
            name: value
            for name, value in SIZES.items()
            if getattr(config, name, None) is not None and not isinstance(getattr(type(config), name, None), property)
        }
        if "qk_rope_head_dim" in own and "head_dim" in own:
            own["head_dim"] = own["qk_rope_head_dim"]
        if "kv_lora_rank" in own:  # keys are of one latent, for as many heads
            own["num_key_value_heads"] = own["num_attention_heads"]
        for part in getattr(type(config), "sub_configs", None) or ():
            if isinstance(of := getattr(config, part, None), tf.PretrainedConfig):
                own[part] = small(of)
        layers = getattr(config, "num_hidden_layers", 0)
        for name, value in vars(config).items():  # one entry a layer: of two kinds, if there are
            if isinstance(value, list) and len(value) == layers > 2 and name not in own:
                own[name] = [value[0], next((other for other in value if other != value[0]), value[0])]
        return {k: v for k, v in content.items() if k not in ("transformers_version", "model_type")} | own

    return tf.AutoConfig.for_model(model_type, **small(default) | OWN_SIZES.get(model_type, {}))


def build(model_type: str) -> nn.Module:
    """A tiny random model of a family, in float32."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(shrunk(model_type), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # some are left without values
            nn.init.normal_(parameter, std=0.05)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def row(model_type: str) -> dict[str, str]:
    """What becomes of a family: column -> "yes" or what came instead."""
    with quiet():
        found = {"family": model_type, "date": str(date.today())}
        try:
            model = build(model_type)
            logits(model)
        except Exception as error:
            return found | {"built": short(error)}
        found["built"] = type(model).__name__
        packed = copy.deepcopy(model)
        try:
            report = cq.quantize_(packed, RECIPE)
        except Exception as error:
            return found | {"share": short(error)}
        kept = Counter(reason.split(":")[0] for reason in report.kept.values() if not usual(reason))
        found |= {"share": f"{100 * report.share:.0f} %", "kept": ", ".join(f"{n}× {why}" for why, n in kept.items())}
        with tempfile.TemporaryDirectory() as folder:
            found["save + load"] = check(lambda: saved(packed, Path(folder)))
            found["transformers"] = check(lambda: read_by_transformers(packed, Path(folder)))
            found["disk to disk"] = check(lambda: streamed(model, packed, report.share, Path(folder)))
        for method in ("gptq", "hqq", "awq"):
            found[method] = check(lambda method=method: works(model, RECIPE, method))
        found["smoothquant"] = check(lambda: works(model, "w8a8", "smoothquant"))
        found["rotation"] = check(lambda: works(model, RECIPE, "rotation"))
        for recipe in ("w8a8", "w8a8-static"):
            found[recipe] = check(lambda recipe=recipe: works(model, recipe, "rtn"))
        found["kv8"] = check(lambda: generated(packed))
    return found


def usual(reason: str) -> bool:
    return any(part in reason for part in ("a norm", "an embedding", "ignore list"))


def check(work: Callable[[], str | None]) -> str:
    try:
        return work() or "yes"
    except Exception as error:
        return short(error)


def short(error: Exception) -> str:
    """An error of canopyq's in its first words; another one with its class, since it should not have come up raw."""
    words = one_line(error).replace(tempfile.gettempdir(), "")[:70]
    return words if isinstance(error, CanopyError) else f"{type(error).__name__}: {words}"


def saved(packed: nn.Module, folder: Path) -> str | None:
    cq.save(packed, folder / "saved")
    return None if torch.equal(logits(cq.load(folder / "saved")), logits(packed)) else "other logits"


def streamed(model: nn.Module, packed: nn.Module, share: float, folder: Path) -> str | None:
    model.save_pretrained(folder / "source")
    plan = quantize_checkpoint(folder / "source", RECIPE, folder / "streamed").plan
    if plan.share < share:
        return f"{100 * plan.share:.0f} %" if logits(cq.load(folder / "streamed")).isfinite().all() else "not finite"
    return None if torch.equal(logits(cq.load(folder / "streamed")), logits(packed)) else "other logits"


def read_by_transformers(packed: nn.Module, folder: Path) -> str | None:
    """Whether plain transformers reads it, which is what `inspect` has to say of it; after `saved`."""
    verdict = cq.inspect(folder / "saved").tools["transformers"]
    dequantize = {"quantization_config": tf.CompressedTensorsConfig(dequantize=True)}
    options = dequantize if verdict.startswith("only") else {}
    wanted = logits(packed)
    try:
        model = type(packed).from_pretrained(folder / "saved", dtype=torch.float32, **options).eval()
        got = logits(model)
        wrong = "" if float((got - wanted).norm() / wanted.norm()) < 0.05 else "other logits"  # it rounds to bfloat16
    except Exception as error:
        wrong = f"{type(error).__name__}: {one_line(error)}"
    if bool(wrong) != verdict.startswith("no"):
        return f"inspect is wrong: {wrong or 'it is read'}"
    return None if verdict.startswith("yes") else verdict.split(",")[0]


def works(model: nn.Module, recipe: str, method: str) -> str | None:
    model = copy.deepcopy(model)
    if method in ("awq", "smoothquant", "rotation") and (wrong := changed(copy.deepcopy(model), method)):
        return wrong
    data = [TOKENS] if method in ("gptq", "awq", "smoothquant") or recipe.endswith("static") else None
    report = cq.quantize_(model, recipe, method=method, calibration=data)
    if not logits(model).isfinite().all():
        return "not finite"
    scaled = sum("not scaled" not in " ".join(layer.notes) for layer in report.layers)
    return None if 2 * scaled >= len(report.layers) else f"{scaled} of {len(report.layers)} layers"


@torch.no_grad()
def changed(model: nn.Module, method: str) -> str | None:
    """Whether what a method does before rounding changes the logits by more than rounding."""
    for parameter in model.parameters():
        if parameter.dim() == 1:  # gains that are all 1 hide mistakes
            parameter += 0.1 * torch.randn_like(parameter)
    before = logits(model)
    with Transaction() as transaction:
        if method == "rotation":
            rotate_(model, transaction)
        else:
            found, _ = scale_pairs(model, method)
            for pair in (pair for pairs in found.values() for pair in pairs):
                rescale(pair, foldable(pair, 0.3 + 2 * torch.rand(len(pair.gain))), transaction)
    moved = float((logits(model) - before).abs().max() / before.abs().max())
    return None if moved < 1e-4 else f"moves the logits by {moved:.0e}"


def generated(model: nn.Module) -> str | None:
    text = model.generate(TOKENS[:1], past_key_values=cq.QuantizedCache(model.config, "kv8"), max_new_tokens=4,
                          do_sample=False)  # fmt: skip
    return None if text.shape[1] > TOKENS.shape[1] else "no token"


@contextlib.contextmanager
def quiet():
    """Warnings, and what libraries print of random models, help nobody here."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        tf.logging.set_verbosity_error()
        yield


def page(rows: list[dict[str, str]]) -> str:
    """docs/families.md."""
    columns = ["family", "share", *CHECKS, "kept beside norms, embedding and head"]
    built = [row for row in rows if "share" in row]
    counts = ", ".join(
        f"{name} {sum(row.get(name) == 'yes' for row in built)} of {sum(name in row for row in built)}"
        for name in CHECKS
    )
    dates = sorted(row["date"] for row in rows)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    lines = [
        "# Families", "",
        f"Written by `make families`, {when}, with transformers {tf.__version__} and torch "
        f"{torch.__version__.split('+')[0]}: a tiny random model of",
        f"every causal LM class, quantized to `{RECIPE}`. *share* is that of the linear parameters; a check that is",
        "not *yes* says what came instead; a percentage is the share from disk to disk. *transformers* loads what was",
        "saved, without canopyq. *awq*, *smoothquant* and *rotation* are *yes* if what they do before rounding leaves",
        "the logits within 1e-4, and if the first two scale at least half of the layers. What is empty was not",
        "tried.", "",
        f"Tried: {len(rows)} of {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} model types; built at these sizes: "
        f"{len(built)}. Yes: {counts}.", "",
        "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
    ]  # fmt: skip
    for row in built:
        cells = [row.get("kept" if name.startswith("kept") else name, "") for name in columns]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    left = [f"{row['family']} ({row['built']})" for row in rows if "share" not in row]
    return "\n".join([*lines, "", "Not built at these sizes: " + "; ".join(left) + "."]) + "\n"


def main(names: list[str]) -> None:
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    ROWS.parent.mkdir(exist_ok=True)
    if not names:
        ROWS.unlink(missing_ok=True)
    done = kept() if names in ([], ["--resume"]) else {}
    for name in every if names in ([], ["--resume"]) else names:
        if name in done:
            continue
        done[name] = row(name)
        print("; ".join(f"{column}: {cell}" for column, cell in done[name].items()), flush=True)
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[name]) + "\n")
    if names in ([], ["--resume"]):
        TARGET.write_text(page([done[name] for name in every]), encoding="utf-8")


def kept() -> dict[str, dict[str, str]]:
    """The rows that runs before have left, the newest of each family."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    return {found["family"]: found for found in map(json.loads, lines)}


if __name__ == "__main__":
    main(sys.argv[1:])
