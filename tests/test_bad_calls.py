"""The public face, given what is not wanted in every parameter: one line that says so, and nothing has changed.

A row of `CALLS` is a function, arguments that are right, and for each parameter the `KINDS` of wrong values to put in
their place.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import canopyq as cq
from canopyq import memory
from canopyq.advisor import Needs
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.errors import CanopyError, shown
from canopyq.evaluate import bench, stats
from canopyq.evaluate.chat import Conversation
from canopyq.evaluate.generate import Decoder
from canopyq.lessons import outliers, roofline, saturation
from canopyq.tensor import affine, packing

NAN, INF = float("nan"), float("inf")
SIZES = {"vocab_size": 1280, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IDS = torch.arange(3, 39).reshape(2, 18)
X = torch.linspace(-1, 1, 256).reshape(4, 64)

OTHER = (None, 3, "text", b"bytes", [], {}, object(), 10**400)  # things of every sort


def without(values: tuple, *kinds: type) -> tuple:
    """Those of the values that are of none of these types."""
    return tuple(value for value in values if not isinstance(value, kinds))


@cache
def thing(name: str) -> Any:
    """What calls need that takes a moment to make; nothing changes it."""
    torch.manual_seed(0)
    match name:
        case "model":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()
        case "quantized":
            model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()
            cq.quantize_(model, "w8a16")
            return model
        case "meta":
            with torch.device("meta"):
                return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()
        case "t5":
            return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1,
                                                             num_heads=2, decoder_start_token_id=0)).eval()  # fmt: skip
        case "tokenizer":
            return tf.AutoTokenizer.from_pretrained(cq.tutor.path())
        case "questions":
            return cq.tutor.questions(2)
        case "evaluation":
            return cq.examine(thing("model"), thing("tokenizer"), thing("questions"), keep=True)
        case "weight":
            return cq.quantize(torch.linspace(-1, 1, 512).reshape(8, 64), "int8", "channel")
        case "layer":
            return cq.QuantizedLinear(thing("weight"))
        case "linear":
            return nn.Linear(64, 8)
        case "config":
            return thing("model").config


class Thing(str):
    """The name of a `thing`, in the place of one."""


class Folder(str):
    """A name in the test's folder, in the place of a path."""


M, Q, T = Thing("model"), Thing("quantized"), Thing("tokenizer")
SPARSE, META = torch.eye(4).to_sparse(), torch.empty(2, 3, device="meta")
SHORT = torch.ones(3)
NO_FLOATS = (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn)
KINDS: dict[str, tuple] = {
    "flag": (None, "False", "", 0, 1, NAN, [], torch.tensor(True)),
    "count": (*without(OTHER, int), True, "3", 1.5, NAN, INF, -1, 1e23, 10**400),
    "count or none": (*without(OTHER, int, type(None)), True, "3", 1.5, NAN, -1, 1e23, 10**400),
    "number": (*without(OTHER, int), True, "3", NAN, INF, 10**400, 1j),
    "any thing": (*without(OTHER, int), True),
    "no number": (*without(OTHER, int), True, NAN, INF, 1j, 10**400),
    "share": (*without(OTHER, int), True, NAN, INF, -0.5, 1.5, 10**400),
    "share or none": (*without(OTHER, int, type(None)), True, NAN, INF, -0.5, 1.5, 10**400),
    "zero": (0,),
    "words": (*without(OTHER, int), True, NAN, -1, 10**400, "", "nonsense", "x" * 5000, "a\nb"),
    "words or none": (*without(OTHER, int, type(None)), True, NAN, -1, 10**400, "", "nonsense"),
    "name": (*OTHER, True, 3.5, "", "nonsense", "x" * 5000, "a\nb"),
    "name or none": (*without(OTHER, type(None)), True, 3.5, "", "nonsense"),
    "tensor": (*OTHER, 3.5, torch.empty(0, 4), *(torch.ones(2, 3).to(each) for each in NO_FLOATS), META, SPARSE),
    "not finite": (torch.full((4, 64), NAN), torch.full((4, 64), INF)),
    "codes": (*OTHER, 3.5, torch.empty(0, 4, dtype=torch.int8), X, torch.tensor(3), META),
    "ids": (*OTHER, 3.5, ["text"], IDS[0], IDS[None], IDS[:, :0], IDS.float(), IDS.bool(), IDS.to(torch.complex64),
            IDS.to("meta"), IDS.to_sparse(), torch.tensor([[-5]]), torch.tensor([[1280]]), torch.tensor([[2**62]])),
    "too long": (torch.ones(1, 65, dtype=torch.int64),),
    "data": (None, 3, object(), 10**400, [], {}, [3], [["text"]], [None], b"bytes", [IDS.float()], torch.tensor([[-5]]),
             torch.tensor([[1280]]), [IDS.to("meta")], [IDS.to_sparse()], {"input_ids": None},
             {"input_ids": IDS, "attention_mask": "x"}, {"input_ids": IDS, "attention_mask": IDS[:1]}, [""], ["a", 3]),
    "module": (*OTHER, 3.5, torch.ones(2), nn.Linear),
    "other module": (nn.Linear(4, 4), nn.Sequential(nn.ReLU())),
    "no language model": (nn.Linear(4, 4), Thing("t5")),
    "meta": (Thing("meta"),),
    "quantized": (Q,),
    "not quantized": (M,),
    "recipe": (*OTHER, True, "", "w9a16", "kv4+head", "w4a16-g0", "w4a16-g" + "9" * 5000, "w4a16-g128\n"),
    "tokenizer": (*OTHER, 3.5, nn.Linear),
    "tokenizer or none": without((*OTHER, 3.5, nn.Linear), type(None)),
    "questions": (*OTHER, ["text"], [None], Thing("model")),
    "cache": (*without(OTHER, type(None)), True, "kv3", "", 3.5, [1]),
    "config": (*OTHER, Thing("model")),
    "path": (None, 3, 3.5, b"bytes", [], {}, object(), 10**400, "", "a\0b", "x" * 5000, Thing("model")),
    "absent": (Folder("absent"), Folder("file"), Folder("file/below")),
    "taken": (Folder("file"), Folder("file/below"), Folder("."), "/dev/null"),
    "device": (3.5, b"bytes", [], {}, object(), True, "", "nonsense", "cuda:99", "meta", "cpu\n", -1, 10**400),
    "dtype": (*without(OTHER, type(None)), True, "float99", torch.int8, "int8", torch.complex64, torch.float8_e4m3fn),
    "none": (None,),
    "function": (*OTHER, 3.5),
    "list": (None, 3, 3.5, object(), 10**400),
    "text": (None, 3, 3.5, b"bytes", [], {}, object(), 10**400, True),
}  # fmt: skip

CALLS: dict[str, tuple[Callable, dict[str, Any], dict[str, str]]] = {
    "quantize": (cq.quantize, {"x": X}, {
        "x": "tensor+not finite", "format": "name", "granularity": "name or none", "symmetric": "flag",
        "restricted": "flag", "observer": "name", "scale_dtype": "dtype"}),
    "Scheme": (cq.Scheme, {}, {
        "format": "name", "granularity": "name or none", "symmetric": "flag", "restricted": "flag", "observer": "name",
        "scale_dtype": "dtype"}),
    "Granularity": (cq.Granularity, {"kind": "group", "group_size": 32}, {
        "kind": "name", "group_size": "count+zero+none", "axis": "count"}),
    "Granularity.parse": (cq.Granularity.parse, {"spec": "g32"}, {"spec": "name"}),
    "get_format": (cq.get_format, {"name": "int4"}, {"name": "name"}),
    "Recipe": (cq.Recipe, {"name": "mine", "weights": cq.Scheme("int8", "channel")}, {
        "name": "text", "weights": "module", "ignore": "list", "embeddings": "flag", "activations": "name or none",
        "static": "flag", "cache": "name or none", "exceptions": "list"}),
    "Recipe.parse": (cq.Recipe.parse, {"spec": "w8a16"}, {"spec": "recipe"}),
    "QuantizedLinear": (cq.QuantizedLinear, {"weight": Thing("weight")}, {
        "weight": "module", "bias": "tensor-none+not finite", "activations": "name or none",
        "input_scale": "tensor-none+not finite", "input_zero_point": "codes-none"}),
    "QuantizedLinear.from_linear": (cq.QuantizedLinear.from_linear, {
        "linear": Thing("linear"), "scheme": cq.Scheme("int8", "channel")}, {
        "linear": "module+not quantized", "scheme": "module", "activations": "name or none"}),
    "QuantizedLinear.forward": (lambda x: thing("layer")(x), {"x": X}, {"x": "module"}),
    "QuantizedTensor.dequantize": (lambda dtype: thing("weight").dequantize(dtype), {"dtype": torch.float32}, {
        "dtype": "dtype"}),
    "plan": (cq.plan, {"model": M, "recipe": "w8a16"}, {"model": "module+other module+quantized", "recipe": "recipe"}),
    "quantize_": (cq.quantize_, {"model": M, "recipe": "w8a16"}, {
        "model": "module+other module+quantized+meta", "recipe": "recipe", "method": "name", "calibration": "data-none",
        "strict": "flag"}),
    "quantize_ texts": (cq.quantize_, {"model": M, "recipe": "w8a16", "calibration": ["text"], "tokenizer": T}, {
        "tokenizer": "tokenizer"}),
    "calibrate": (cq.calibrate, {"model": M, "batches": [IDS]}, {
        "model": "module+other module+meta", "batches": "data+too long", "layers": "list-none", "hessian": "flag",
        "histograms": "flag", "examples": "count", "token_norm_cap": "number-none+zero"}),
    "calibrate texts": (cq.calibrate, {"model": M, "batches": ["some text"], "tokenizer": T}, {
        "tokenizer": "tokenizer", "length": "count or none+zero"}),
    "sensitivity": (cq.sensitivity, {"model": M, "recipe": "w8a16", "data": [IDS]}, {
        "model": "module+other module+quantized+meta+no language model", "recipe": "recipe", "data": "data"}),
    "mixed_precision": (cq.mixed_precision, {
        "model": M, "budget": 9, "data": [IDS], "choices": ("w4a16-g32", "w8a16-g32")}, {
        "model": "module+other module+quantized+meta+no language model", "budget": "number+zero", "data": "data",
        "choices": "name"}),
    "examine": (cq.examine, {"model": M, "tokenizer": T, "questions": Thing("questions")}, {
        "model": "module+no language model+meta", "tokenizer": "tokenizer", "questions": "questions", "keep": "flag",
        "cache": "cache"}),
    "compare": (cq.compare, {
        "reference": Thing("evaluation"), "model": M, "tokenizer": T, "questions": Thing("questions")}, {
        "reference": "module+no language model+meta", "model": "module+no language model+meta",
        "tokenizer": "tokenizer", "questions": "questions", "cache": "cache"}),
    "examine_text": (cq.examine_text, {
        "model": M, "tokenizer": T, "text": "2 + 2 is 4. " * 9, "tokens": 16, "length": 8}, {
        "model": "module+no language model+meta", "tokenizer": "tokenizer", "text": "text", "tokens": "count+zero",
        "length": "count or none+zero", "cache": "cache"}),
    "compare_text": (cq.compare_text, {
        "reference": M, "model": M, "tokenizer": T, "text": "2 + 2 is 4. " * 9, "tokens": 16, "length": 8}, {
        "reference": "module+no language model+meta", "model": "module+no language model+meta",
        "tokenizer": "tokenizer", "text": "text", "tokens": "count+zero", "length": "count or none+zero",
        "cache": "cache"}),
    "harness": (cq.harness, {"model": M, "tokenizer": T}, {
        "model": "module+no language model+meta", "tokenizer": "tokenizer", "batch_size": "count+zero",
        "max_length": "count or none+zero"}),
    "explain": (cq.explain, {"model": Q}, {"model": "module+other module+not quantized"}),
    "fast_generate": (cq.fast_generate, {"model": M, "input_ids": IDS[:, :4], "max_new_tokens": 2}, {
        "model": "module+no language model+meta", "input_ids": "ids+too long", "max_new_tokens": "count+zero",
        "eos_token_id": "count or none", "cache": "cache"}),
    "Decoder": (Decoder, {"model": M, "batch": 2, "length": 8}, {
        "model": "module+no language model+meta", "batch": "count+zero", "length": "count+zero", "cache": "cache"}),
    "fuse_attention": (cq.fuse_attention, {"model": M, "format": "kv8"}, {
        "model": "module+no language model+meta", "format": "cache"}),
    "QuantizedCache": (cq.QuantizedCache, {"config": Thing("config")}, {
        "config": "config", "format": "cache", "key_granularity": "name", "residual_length": "count",
        "group_size": "count or none+zero"}),
    "StaticQuantizedCache": (cq.StaticQuantizedCache, {
        "config": Thing("config"), "batch": 1, "capacity": 64, "dtype": torch.float32, "device": "cpu"}, {
        "config": "config", "format": "cache+none", "batch": "count+zero", "capacity": "count+zero",
        "dtype": "dtype+none", "device": "device+none", "residual_length": "count"}),
    "inspect": (cq.inspect, {"folder": Folder("saved")}, {"folder": "path+absent"}),
    "load": (cq.load, {"folder": Folder("saved")}, {
        "folder": "path+absent", "device": "device+none", "dtype": "dtype", "strict": "flag"}),
    "save": (cq.save, {"model": Q, "folder": Folder("new"), "check": False}, {
        "model": "module+no language model+not quantized+meta", "folder": "path+taken",
        "tokenizer": "tokenizer or none", "dtype": "dtype", "max_shard_bytes": "count+zero", "check": "flag"}),
    "quantize_checkpoint": (quantize_checkpoint, {"source": Folder("plain"), "recipe": "w8a16", "out": Folder("new")}, {
        "source": "path+absent", "recipe": "recipe", "out": "path+taken", "shard_bytes": "count+zero",
        "say": "function"}),
    "export_gguf": (cq.export_gguf, {"model": M, "path": Folder("new.gguf"), "tokenizer": T}, {
        "model": "module+no language model+meta", "path": "path+taken", "tokenizer": "tokenizer or none",
        "base": "path-none+absent", "requantize": "name or none"}),
    "load_gguf": (cq.load_gguf, {"path": Folder("file")}, {"path": "path+absent", "dtype": "dtype+none"}),
    "attach_lora": (cq.attach_lora, {"model": Q}, {
        "model": "module+no language model+not quantized+meta", "config": "name or none", "adapter_name": "text"}),
    "load_lora": (cq.load_lora, {"model": Q, "folder": Folder("plain")}, {
        "model": "module+no language model+not quantized+meta", "folder": "path+absent", "trainable": "flag"}),
    "advise": (cq.advise, {"model": "7B"}, {
        "model": "words", "memory": "words or none", "context": "words", "batch": "count+zero",
        "accuracy": "share or none", "gpu": "words or none", "priority": "name", "server": "name or none",
        "measurements": "questions-none"}),
    "Needs.parse": (Needs.parse, {"model": "7B"}, {
        "model": "words", "memory": "words or none", "context": "words", "batch": "count+zero",
        "accuracy": "share or none", "gpu": "words or none", "priority": "name", "server": "name or none"}),
    "advisor.measure": (cq.advisor.measure, {"model": M, "tokenizer": T, "text": "one two three " * 20, "tokens": 32}, {
        "model": "module+no language model+meta", "tokenizer": "tokenizer", "tokens": "count+zero", "source": "text"}),
    "advisor.read": (cq.advisor.read, {"path": Folder("measurements")}, {"path": "path+absent"}),
    "tutor.load": (cq.tutor.load, {}, {"dtype": "dtype", "device": "device"}),
    "tutor.questions": (cq.tutor.questions, {"n": 1}, {
        "n": "count", "skill": "name or none", "split": "name", "seed": "count"}),
    "tutor.questions recall": (cq.tutor.questions, {"n": 1, "skill": "recall", "fillers": 2}, {
        "fillers": "count or none"}),
    "tutor.calibration": (cq.tutor.calibration, {"tokenizer": T, "n": 1, "length": 8}, {
        "tokenizer": "tokenizer", "n": "count+zero", "length": "count+zero", "seed": "count", "rows": "count+zero"}),
    "tutor.encode": (cq.tutor.encode, {"tokenizer": T, "turns": (("a", "b"),)}, {
        "tokenizer": "tokenizer", "turns": "questions"}),
    "tutor.ask": (cq.tutor.ask, {"model": M, "tokenizer": T, "question": "1+1?", "max_new_tokens": 1}, {
        "model": "module+no language model+meta", "tokenizer": "tokenizer", "question": "text", "history": "list",
        "max_new_tokens": "count+zero"}),
    "Conversation": (Conversation, {"model": M, "tokenizer": T}, {
        "model": "module+no language model+meta", "tokenizer": "tokenizer", "cache": "cache"}),
    "Conversation.ask": (lambda **given: Conversation(thing("model"), thing("tokenizer")).ask(**given), {
        "question": "1+1?", "max_new_tokens": 1}, {"question": "text", "max_new_tokens": "count+zero"}),
    "quiz": (cq.lessons.quiz, {"name": "memory"}, {"name": "name"}),
    "quiz.answer": (lambda letter: cq.lessons.quiz("memory").answer(letter), {"letter": "c"}, {"letter": "name"}),
    "exercise": (cq.lessons.exercise, {"name": "02-symmetric"}, {"name": "name"}),
    "exercise.hint": (lambda number: cq.lessons.exercise("02-symmetric").hint(number), {"number": 1}, {
        "number": "count+zero"}),
    "predict": (cq.lessons.predict, {"name": "02-x", "question": "How?"}, {
        "name": "text", "question": "text", "unit": "text"}),
    "predict.say": (lambda number: cq.lessons.predict("02-x", "How?").say(number), {"number": 1}, {
        "number": "no number"}),
    "predict.reveal": (lambda **given: cq.lessons.predict("02-x", "How?").reveal(**given), {"value": 1}, {
        "value": "any thing", "fmt": "text"}),
    "recorded": (cq.lessons.recorded, {"name": "decode"}, {"name": "name"}),
    "lessons.table": (cq.lessons.table, {"head": ("a",), "rows": [(1,)]}, {"head": "list", "rows": "list"}),
    "parameter_count": (memory.parameter_count, {"text": "7B"}, {"text": "words"}),
    "weight_bytes": (memory.weight_bytes, {"parameters": 7e9, "format": "int4", "group_size": 128}, {
        "parameters": "number+zero", "format": "name", "group_size": "count or none+zero", "symmetric": "flag",
        "scale_bits": "count+zero"}),
    "cache_bytes": (memory.cache_bytes, {"shape": memory.MODEL_SHAPES["tutor"], "tokens": 64}, {
        "shape": "module", "tokens": "count", "batch": "count+zero", "format": "cache"}),
    "model_bytes": (memory.model_bytes, {"shape": memory.MODEL_SHAPES["tutor"]}, {
        "shape": "module", "recipe": "cache"}),
    "bytes_held": (memory.bytes_held, {"model": M}, {"model": "module"}),
    "tensors_held": (memory.tensors_held, {"model": M}, {"model": "module"}),
    "ModelShape.of": (memory.ModelShape.of, {"config": Thing("config")}, {"config": "config"}),
    "human": (memory.human, {"count": 3}, {"count": "number"}),
    "pack": (packing.pack, {"codes": torch.ones(2, 8, dtype=torch.int8), "bits": 4}, {
        "codes": "codes", "bits": "count+zero", "signed": "flag"}),
    "unpack": (packing.unpack, {"words": torch.ones(2, 1, dtype=torch.int32), "bits": 4, "n": 8}, {
        "words": "codes", "bits": "count+zero", "n": "count+zero", "signed": "flag"}),
    "scale_and_zero_point": (affine.scale_and_zero_point, {"lo": -SHORT, "hi": SHORT}, {
        "format": "name", "symmetric": "flag", "restricted": "flag", "check": "flag"}),
    "affine.quantize": (affine.quantize, {"x": SHORT, "scale": SHORT}, {"format": "name", "restricted": "flag"}),
    "affine.fake_quantize": (affine.fake_quantize, {"x": SHORT, "scale": SHORT}, {
        "format": "name", "restricted": "flag"}),
    "affine.dequantize": (affine.dequantize, {"codes": torch.ones(3, dtype=torch.int8), "scale": SHORT}, {
        "format": "name", "dtype": "dtype+none"}),
    "wilson": (stats.wilson, {"right": 1, "n": 2}, {"right": "count", "n": "count+zero", "z": "number"}),
    "mcnemar": (stats.mcnemar, {"lost": 1, "gained": 2}, {"lost": "count", "gained": "count"}),
    "bootstrap": (stats.bootstrap, {"values": [1.0, 2.0]}, {
        "values": "list", "resamples": "count+zero", "seed": "count"}),
    "bench": (bench.bench, {"recipes": ("w8a16",), "shapes": ((64, 64),), "rows": (1,)}, {
        "recipes": "list", "device": "device+none", "shapes": "list-none", "rows": "list-none"}),
    "linear_work": (roofline.linear_work, {"rows": 1, "inputs": 64, "outputs": 64}, {
        "rows": "count+zero", "inputs": "count+zero", "outputs": "count+zero", "bits": "number+zero"}),
    "wrap": (saturation.wrap, {"codes": torch.tensor([128])}, {"bits": "count+zero"}),
    "salient": (outliers.salient, {"magnitude": SHORT}, {"share": "share+zero"}),
    "exaggerate_": (outliers.exaggerate_, {"model": M, "channels": [1]}, {
        "model": "module+no language model+quantized", "channels": "list+ids", "factor": "number+zero"}),
}  # fmt: skip


RESULTS = ("Calibration", "CanopyError", "Plan", "QuantizedTensor", "Report")  # what functions give back


def test_the_table_has_every_public_function_and_every_flag_of_them() -> None:
    known: dict[Callable, dict[str, str]] = {}
    for function, _, wrong in CALLS.values():
        known.setdefault(function, {}).update(wrong)
    public = {name: getattr(cq, name) for name in cq.__all__ if name not in RESULTS}
    assert not [name for name, given in public.items() if callable(given) and given not in known]
    for function, wrong in known.items():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.annotation in (bool, "bool"):
                assert wrong[parameter.name] == "flag", f"{function}({parameter.name})"


def wrong_values(kinds: str) -> list:
    """``"a+b-none"``: the values of both kinds, without None."""
    kinds, _, left_out = kinds.partition("-none") if "-none" in kinds else (kinds, "", None)
    words = (kinds + (left_out or "")).split("+")
    values = [value for word in words for value in KINDS[word]]
    return values if left_out is None else [value for value in values if value is not None]


def resolved(value: object, folder: Path) -> object:
    if isinstance(value, Thing):
        return thing(value)
    return str(folder / value) if isinstance(value, Folder) else value


ELSEWHERE = {parameter: ("calibration data", "attention_mask") for parameter in ("batches", "calibration", "data")}


def words_for(parameter: str, value: object) -> tuple[str, ...]:
    """One of these a message must have: the parameter, or the value, whole or in part."""
    part = f"+{value.split('+')[-1]}" if isinstance(value, str) else type(value).__name__
    return (parameter, shown(value).strip("'")[:40], part, *ELSEWHERE.get(parameter, ()))


def state(folder: Path) -> tuple:
    """What a refused call must leave as it is: the models, and the files."""
    models = []
    for name in ("model", "quantized"):
        model = thing(name)
        kinds = tuple((part, type(module), module.training) for part, module in model.named_modules())
        sums = tuple(float(x.detach().double().sum()) for x in [*model.parameters(), *model.buffers()])
        models.append((kinds, sums, model.config._attn_implementation, model.config.tie_word_embeddings))
    files = sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))
    return (*models, files)


def too_long(*_: object) -> None:
    raise TimeoutError("it took over 10 seconds")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    (folder / "file").write_text("a file")
    cq.save(thing("quantized"), folder / "saved", check=False)
    thing("model").save_pretrained(folder / "plain")
    cq.advisor.write(folder / "measurements", cq.advisor.recorded())
    return folder


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_value_is_named_in_one_line(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANOPYQ_PROGRESS", str(folder / "progress.json"))
    monkeypatch.chdir(folder)
    signal.signal(signal.SIGALRM, too_long)
    function, right, wrong = CALLS[name]
    right = {parameter: resolved(value, folder) for parameter, value in right.items()}
    before, faults = state(folder), []
    for parameter, kinds in wrong.items():
        for value in wrong_values(kinds):
            value = resolved(value, folder)
            said = f"{name}({parameter}={shown(value)})"
            try:
                signal.alarm(10)  # a call that takes so long has not looked at what it was given
                function(**right | {parameter: value})
                faults.append(f"{said} was taken")
            except CanopyError as error:
                text = str(error)
                if "\n" in text or len(text) > 700:
                    faults.append(f"{said} is not one line: {text[:200]}")
                elif not any(word in text for word in words_for(parameter, value)):
                    faults.append(f"{said} does not say what is wrong: {text[:200]}")
            except Exception as error:
                faults.append(f"{said}: {type(error).__name__}: {str(error)[:100]!r}")
            finally:
                signal.alarm(0)
    if state(folder) != before:
        thing.cache_clear()
        faults.append(f"{name} changed something")
    assert not faults, "\n".join([f"{len(faults)} faults:", *faults])


def test_a_model_of_another_vocabulary() -> None:
    small = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES | {"vocab_size": 96})).eval()
    with pytest.raises(CanopyError, match="the model's vocabulary of 96; use its own"):
        Conversation(small, thing("tokenizer")).ask("what is 2 plus 2?")


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch) -> None:
    """It would take a new folder's name, and whoever is in it would be left in one without a name."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "", tmp_path / "here", "../here/"):
        with pytest.raises(CanopyError, match="is the current folder; name one in it"):
            cq.save(thing("quantized"), name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_home_is_understood(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    saved = cq.save(thing("quantized"), "~/models/w8", check=False)
    assert saved.folder == tmp_path / "home" / "models" / "w8" and cq.load("~/models/w8") is not None
