"""The public face as a program of a user's calls it, for type checkers: `make types`. It is not run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from typing_extensions import assert_type

import canopyq as cq


def tensors(x: torch.Tensor) -> None:
    q = cq.quantize(x, "int4", granularity="g128", symmetric=True)
    assert_type(q, cq.QuantizedTensor)
    assert_type(q.codes, torch.Tensor)
    assert_type(q.nbytes, int)
    assert_type(q.dequantize(), torch.Tensor)
    assert_type(cq.Recipe.parse("w4a16-g128").weights, cq.Scheme | None)


def models(folder: Path, texts: Sequence[str], text: str) -> None:
    model, tokenizer = cq.tutor.load()
    questions = cq.tutor.questions(170)
    before = cq.examine(model, tokenizer, questions, keep=True)
    assert_type(before.perplexity, float)
    assert_type(cq.plan(model, "w4a16-g128"), cq.Plan)
    assert_type(cq.quantize_(model, "w4a16-g128", method="gptq", calibration=texts), cq.Report)
    assert_type(cq.compare(before, model, tokenizer, questions).kl, float)
    assert_type(cq.compare_text(model, model, tokenizer, text).agreement, float)
    print(cq.explain(model), cq.inspect(folder, 2).tools, cq.advise("7B", memory="8GB"))
    cq.save(model, folder, tokenizer)
    loaded = cq.load(folder)
    cache = cq.QuantizedCache(loaded.config, "kv4")
    loaded.generate(torch.tensor([[1]]), past_key_values=cache)
    cq.export_gguf(loaded, folder / "model.gguf", tokenizer)
    tuned = cq.attach_lora(loaded)
    tuned.save_pretrained(str(folder))
    cq.harness(loaded, tokenizer)
    try:
        cq.load_gguf("model.gguf")
    except cq.CanopyError as error:
        print(error)
