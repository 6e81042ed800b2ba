"""A tiny random model of every causal LM class that the installed transformers has, put through canopyq.

    python tools/families.py                    all of them, into docs/families.md
    python tools/families.py llama gpt_oss      these, printed

Each check says "yes", or in a few words what came instead. Models are a few hundred kilobytes and their weights random:
this shows that shapes, names and code go together, and nothing of quality.
"""

from __future__ import annotations

import contextlib
import copy
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

TARGET = Path(__file__).parents[1] / "docs" / "families.md"
RECIPE = "w4a16-g32"
TOKENS = torch.arange(3, 35).reshape(2, 16)
# Sizes by the names that configs give them; what a config does not have is left out.
SIZES = {
    **dict.fromkeys(["vocab_size", "text_vocab_size", "vocab_size_per_layer_input"], 96),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "dim", "n_embed", "word_embed_proj_dim"], 64),
    "embedding_size": 64,
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

    return tf.AutoConfig.for_model(model_type, **small(default))


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
        try:
            model = build(model_type)
            logits(model)
        except Exception as error:
            return {"family": model_type, "built": short(error)}
        found = {"family": model_type, "built": type(model).__name__}
        packed = copy.deepcopy(model)
        try:
            report = cq.quantize_(packed, RECIPE)
        except Exception as error:
            return found | {"share": short(error)}
        kept = Counter(reason.split(":")[0] for reason in report.kept.values() if not usual(reason))
        found |= {"share": f"{100 * report.share:.0f} %", "kept": ", ".join(f"{n}× {why}" for why, n in kept.items())}
        with tempfile.TemporaryDirectory() as folder:
            found["save + load"] = check(lambda: saved(packed, Path(folder)))
            found["disk to disk"] = check(lambda: streamed(model, packed, report.share, Path(folder)))
        for method in ("gptq", "hqq"):
            found[method] = check(lambda method=method: works(model, RECIPE, method))
        found["w8a8"] = check(lambda: works(model, "w8a8", "rtn"))
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


def works(model: nn.Module, recipe: str, method: str) -> str | None:
    model = copy.deepcopy(model)
    cq.quantize_(model, recipe, method=method, calibration=[TOKENS] if method == "gptq" else None)
    return None if logits(model).isfinite().all() else "not finite"


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
    checks = ["save + load", "disk to disk", "gptq", "hqq", "w8a8", "kv8"]
    columns = ["family", "share", *checks, "kept beside norms, embedding and head"]
    built = [row for row in rows if "share" in row]
    counts = ", ".join(f"{name} {sum(row.get(name) == 'yes' for row in built)}" for name in checks)
    lines = [
        "# Families", "",
        f"Written by `make families` on {date.today()}, with transformers {tf.__version__} and torch "
        f"{torch.__version__.split('+')[0]}: a tiny random model of",
        f"every causal LM class, quantized to `{RECIPE}`. *share* is that of the linear parameters; a check that is",
        "not *yes* says what came instead; a percentage is the share from disk to disk.", "",
        f"Tried: {len(rows)} of {len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)} model types; built at these sizes: "
        f"{len(built)}. Of these, yes: {counts}.", "",
        "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns),
    ]  # fmt: skip
    for row in built:
        cells = [row.get("kept" if name.startswith("kept") else name, "") for name in columns]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    left = [f"{row['family']} ({row['built']})" for row in rows if "share" not in row]
    return "\n".join([*lines, "", "Not built at these sizes: " + "; ".join(left) + "."]) + "\n"


def main(names: list[str]) -> None:
    rows = []
    for name in names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(row(name))
        print("; ".join(f"{column}: {cell}" for column, cell in rows[-1].items()), flush=True)
    if not names:
        TARGET.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
