"""What each tool makes of each recipe, found out and written to docs/serving.md: `make serving`.

python tools/serving.py            all recipes; the sources of vLLM and SGLang lie in build/servers, as archives
python tools/serving.py w8a8 fp8   these, printed

The tutor is quantized to each recipe and saved. transformers loads the folder and llama.cpp its GGUF file, and both
are compared with canopyq on prompts of the exam; vLLM's and SGLang's own classes are asked by tools/servers.py. Of
Ollama only the list of tensor types in its source was read.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import canopyq as cq
from canopyq.cli.calibrated import quantize_tutor
from canopyq.errors import CanopyError, one_line
from canopyq.tensor.scheme import RECIPES, Recipe

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "serving.md"
SERVERS = ROOT / "build" / "servers"
PROMPTS = 20
OLLAMA = {"Q8_0", "Q4_0", "Q4_1", "MXFP4"}  # of fs/ggml/type.go, commit 1f9b1de; canopyq writes NVFP4 beside these
SCHEMES = ("w4a16-tensor", "w4a16-g16")  # beside `RECIPES`: what servers have no kernel for, and what few have


def source(package: str) -> Path | None:
    """The unpacked source of a server; None where `make serving` has not fetched it."""
    archive = next(iter(sorted(SERVERS.glob(f"{package}-*.tar.gz")) + sorted(SERVERS.glob(f"{package}-*.whl"))), None)
    if archive is None:
        return None
    place = SERVERS / package
    if not place.is_dir():
        if archive.suffix == ".whl":
            zipfile.ZipFile(archive).extractall(place)
        else:
            with tarfile.open(archive) as packed:
                packed.extractall(place, filter="data")
    return place if (place / package).is_dir() else next(place.glob(f"{package}-*"))


def version_of(package: str) -> str:
    return next(SERVERS.glob(f"{package}-*.*")).name.split("-")[1].removesuffix(".tar.gz")


def asked(package: str, folders: list[Path]) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Folder -> ranks -> layer -> what a server's own classes say (tools/servers.py); {} without its source."""
    if (where := source(package)) is None:
        return {}
    command = [sys.executable, str(ROOT / "tools" / "servers.py"), str(where), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def verdict(layers: dict[str, dict[str, str]]) -> str:
    """One cell of what a server says of all layers."""
    if errors := [found["error"] for found in layers.values() if "error" in found]:
        return "no: " + errors[0].split(" for layer_name")[0].split(" Reasons")[0].rstrip(".")
    kinds = Counter((found["scheme"].removeprefix("CompressedTensors"), found["kernel"]) for found in layers.values())
    return ", ".join(scheme + (f" by {kernel.removesuffix('LinearKernel')}" if kernel else "")
                     for scheme, kernel in kinds)  # fmt: skip


def prompts(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": one.turns[0][0]}] for one in cq.tutor.questions(170)[:: 170 // PROMPTS]]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
            for chat in chats[:PROMPTS]]  # fmt: skip


@torch.no_grad()
def distributions(model: Any, asked_of: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of the first token of each answer."""
    return [model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for ids in asked_of]


def compared(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    kl = sum(float((a.exp() * (a - b)).sum()) for a, b in zip(ours, theirs, strict=True)) / len(ours)
    alike = sum(int(a.argmax() == b.argmax()) for a, b in zip(ours, theirs, strict=True))
    return f"{alike} of {len(ours)} first tokens alike, KL " + (f"{kl:.0e}" if kl >= 1e-6 else "below 1e-6")


def by_transformers(folder: Path, ours: list[torch.Tensor], asked_of: list[list[int]]) -> str:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    fp4 = "fp4" in folder.name
    for dequantize in (False, True):
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
        try:
            dtype = torch.bfloat16 if fp4 else torch.float32
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
            words = compared(ours, distributions(model, asked_of))
        except Exception as error:
            said = f"no: {type(error).__name__}: {one_line(error)[:60]}"
            continue
        return words + (", in bfloat16" if fp4 else "") + (", by `dequantize=True`" if dequantize else "")
    return said


def by_llama_cpp(model: Any, tokenizer: Any, ours: list[torch.Tensor], asked_of: list[list[int]]) -> tuple[str, str]:
    """Of llama.cpp, what came of it; of Ollama, what its source says of the file's types."""
    import xllamacpp as llama

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        try:
            done = cq.export_gguf(model, file, tokenizer)
        except CanopyError as error:
            return f"no: {one_line(error).split(';')[0]}", "no, for the same reason"
        params = llama.CommonParams()
        params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = str(file), 512, 0, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        server, theirs = llama.Server(params), []
        vocabulary = model.config.vocab_size
        for ids in asked_of:
            given = {"prompt": ids, "n_predict": 1, "temperature": 0, "top_k": 1, "n_probs": vocabulary,
                     "cache_prompt": False}  # fmt: skip
            first = server.handle_completions(given)["choices"][0]["logprobs"]["content"][0]
            logs = torch.full((vocabulary,), -100.0, dtype=torch.float64)
            for token in first["top_logprobs"]:
                logs[token["id"]] = token["logprob"]
            theirs.append(logs)
    types = set(done.types) - {"F32", "F16", "BF16"}
    unknown = types - OLLAMA
    ollama = f"{' and '.join(sorted(unknown))} is not in its source" if unknown else "by its source; not run"
    inputs = "; inputs as llama.cpp rounds them" if any(one.activations for one in _layers(model)) else ""
    return f"{' and '.join(sorted(types))}: {compared(ours, theirs)}{inputs}", ollama


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, cq.QuantizedLinear)]


def rows(recipes: list[str]) -> list[dict[str, str]]:
    original, tokenizer = cq.tutor.load()
    asked_of, found = prompts(tokenizer), []
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folders = []
        for recipe in recipes:
            model, folder = copy.deepcopy(original), Path(place) / recipe
            quantize_tutor(model, tokenizer, Recipe.parse(recipe), 8)
            ours = distributions(model, asked_of)
            llama_cpp, ollama = by_llama_cpp(model, tokenizer, ours, asked_of)
            row = {"recipe": f"`{recipe}`", "llama.cpp": llama_cpp, "Ollama": ollama}
            try:
                cq.save(model, folder, tokenizer, check=False)
            except CanopyError as error:
                why = f"no: {one_line(error).split(': ', 1)[-1].split(';')[0]}"
                found.append(row | dict.fromkeys(("vLLM", "SGLang", "transformers"), why))
                continue
            folders.append(folder)
            found.append(row | {"folder": str(folder), "transformers": by_transformers(folder, ours, asked_of)})
            print(found[-1], flush=True)
        for package, name in (("vllm", "vLLM"), ("sglang", "SGLang")):
            said = asked(package, folders)
            for row in found:
                if row.get("folder") in said:
                    row[name] = verdict(said[row["folder"]]["1"])
    return found


def page(found: list[dict[str, str]]) -> str:
    versions = {"vLLM": version_of("vllm"), "SGLang": version_of("sglang"), "transformers": version("transformers"),
                "llama.cpp": version("xllamacpp"), "Ollama": ""}  # fmt: skip
    lines = ["| recipe | " + " | ".join(f"{name} {number}".strip() for name, number in versions.items()) + " |",
             "|" + "---|" * (1 + len(versions))]  # fmt: skip
    for row in found:
        lines.append("| " + " | ".join(row.get(name, "").replace("|", "/") for name in ("recipe", *versions)) + " |")
    return (Path(__file__).with_suffix(".md")).read_text(encoding="utf-8").format(
        date=date.today(), table="\n".join(lines), prompts=PROMPTS, torch=torch.__version__,
        compressed=version("compressed-tensors"), llama_cpp=versions["llama.cpp"],
        **{name: number for name, number in versions.items() if name != "llama.cpp"},
    )  # fmt: skip


def main(names: list[str]) -> None:
    found = rows(names or [*RECIPES, *SCHEMES])
    if names:
        for row in found:
            print("; ".join(f"{name}: {cell}" for name, cell in row.items()))
    else:
        TARGET.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
