"""Attack canopyq with damaged and malicious checkpoints, as a stranger would who knows only its public face.

    python tools/fuzz_checkpoints.py --count 10000           mutants 0 to 9999; a table of what became of them
    python tools/fuzz_checkpoints.py --replay 4711           one of them alone, with its traceback

Each mutant is a tiny checkpoint in which one or two things were changed, all drawn from its number. It is inspected
and loaded, quantized from disk to disk, or loaded with its tokenizer. What may come of that: one printable line of a
`CanopyError`, exit code 2; or a model whose values and answers are numbers. Anything else is a failure: another
exception, a crash, more than some seconds or some memory, raw escape sequences, NaN. Exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
os.environ.pop("CANOPYQ_MODEL", None)

import torch

import canopyq as cq
from canopyq import cli

CPU_SECONDS = 10  # of one mutant: some hundred times what a whole checkpoint takes
WALL_SECONDS = 120  # until one that waits for something is ended
MEMORY = 150_000_000  # bytes beside twice the mutant's files, of which computed buffers may take 64 MB
ADDRESSES = 4_000_000_000  # bytes of address space beside what the process has when it begins
BATCH = 50  # mutants of one process
SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.arange(3, 19)[None]
LONG, ESCAPES = "x" * 300, "\x1b[31m\r\n\u202e\u2028"
WEIGHTS = re.compile(r".*\.safetensors$")


# The checkpoints that are damaged -------------------------------------------------------------------------------------


def make_bases(folder: Path) -> dict[str, Path]:
    """A model as transformers writes it, in one file and in several, and as canopyq does, in four recipes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).eval()
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(93))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)
    bases = {}
    for name, shard in (("source", "1GB"), ("sharded", "20KB")):
        bases[name] = folder / name
        model.save_pretrained(bases[name], max_shard_size=shard)
        fast.save_pretrained(bases[name])
    for recipe in ("w4a16-g32-asym", "w8a16+head", "w8a8-static", "fp8"):
        quantized = LlamaForCausalLM.from_pretrained(bases["source"], dtype=torch.float32)
        cq.quantize_(quantized, recipe, calibration=[TOKENS] if "static" in recipe else None)
        bases[recipe] = folder / recipe
        shards = {} if recipe != "w8a16+head" else {"max_shard_bytes": 20_000}
        cq.save(quantized, bases[recipe], fast, check=False, **shards)
    return bases


# Mutations: each changes a folder, and says what it did ---------------------------------------------------------------


def odd_value(draw: random.Random, old: object = None) -> object:
    """A value that a careful reader would not expect there."""
    deep: object = 1
    for _ in range(draw.choice([5, 70, 600])):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    values = [
        None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 10**30, 10**8, 10**5, 0.5, -0.0, 1e308, -1e308, math.nan,
        math.inf, -math.inf, "", "x", LONG, ESCAPES, "\ud800", "../../../../etc/passwd", "/dev/zero", "9" * 5000,
        [], {}, [None], [0] * 1000, [[]] * 2000, {"a": {}}, deep, "re:(.*)*!", "float64", "auto", "int4", "group",
    ]  # fmt: skip
    if isinstance(old, int) and not isinstance(old, bool) and draw.random() < 0.5:
        return draw.choice([old + 1, old - 1, 2 * old, old // 2, -old, 1000 * old, old * 10**6, float(old), str(old)])
    if isinstance(old, str) and draw.random() < 0.3:
        return draw.choice([old + "x", old[:-1], old.upper(), old + ESCAPES, old * 50, [old]])
    return draw.choice(values)


HOSTILE_KEYS = [
    "num_labels", "id2label", "label2id", "architectures", "auto_map", "model_type", "dtype", "torch_dtype",
    "text_config", "vision_config", "quantization_config", "compression_config", "attn_implementation",
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path",
    "per_layer_config", "rope_scaling", "rope_theta",
    "rope_parameters", "layer_types", "head_dim", "num_experts", "sliding_window", "pruned_heads", "torchscript",
    "return_dict", "output_attentions", "output_hidden_states", "use_return_dict", "problem_type", "is_decoder",
    "tie_word_embeddings", "chunk_size_feed_forward", "base_model_tp_plan", "transformers_weights", "to_dict", "self",
    "__dict__", "name_or_path", "kv_cache_scheme", "sparsity_config", "transform_config", "ignore", "weight_map",
]  # fmt: skip


def places(content: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values below the root."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate_json(content: dict, draw: random.Random) -> str:
    """Change one value, key or branch in place."""
    paths = list(places(content)) or [("a",)]
    *above, key = draw.choice(paths)
    holder: object = content
    for step in above:
        holder = holder[step]
    how = draw.choice(["set", "set", "set", "delete", "rename", "add", "add", "swap"])
    where = ".".join(map(str, (*above, key)))[:80]
    if how == "delete":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[draw.choice([LONG, ESCAPES, "", "a", str(key) + "x"])] = holder.pop(key)
    elif how == "add":
        places_to_add = [content] + [x for x in _dicts(content)]
        target, new = draw.choice(places_to_add), draw.choice(HOSTILE_KEYS)
        target[new] = odd_value(draw)
        where = f"{new} = {str(target[new])[:40]}"
    elif how == "swap":
        other = content
        for step in (path := draw.choice(paths))[:-1]:
            other = other[step]
        with contextlib.suppress(KeyError, IndexError, TypeError):
            other[path[-1]] = json.loads(json.dumps(holder[key]))
    else:
        with contextlib.suppress(KeyError, IndexError, TypeError):
            holder[key] = odd_value(draw, holder[key])
            where += f" = {str(holder[key])[:40]}"
    return f"{how} {where}"


def _dicts(content: object) -> Iterator[dict]:
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        if isinstance(value, dict):
            yield value
        yield from _dicts(value)


def pick(folder: Path, draw: random.Random, pattern: re.Pattern | str) -> Path | None:
    found = sorted(file for file in folder.iterdir() if re.fullmatch(pattern, file.name) and file.is_file())
    return draw.choice(found) if found else None


def read_shard(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_shard(file: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def header_bytes(folder: Path, draw: random.Random) -> str:
    file = pick(folder, draw, WEIGHTS)
    raw = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", raw[:8])
    for _ in range(draw.randint(1, 4)):
        place = min(draw.randrange(8 + size) if draw.random() < 0.8 else draw.randrange(8), len(raw) - 1)
        how = draw.choice(["flip", "set", "insert", "delete"])
        if how == "insert":
            raw.insert(place, draw.randrange(256))
        elif how == "delete":
            del raw[place]
        else:
            raw[place] = (
                raw[place] ^ 1 << draw.randrange(8) if how == "flip" else draw.choice(b'0123456789"{}[],:-x\xff\0')
            )
    file.write_bytes(raw)
    return file.name


def header_fields(folder: Path, draw: random.Random) -> str:
    file = pick(folder, draw, WEIGHTS)
    header, data = read_shard(file)
    name = draw.choice(sorted(header))
    how = draw.choice(["dtype", "shape", "offsets", "name", "metadata", "any", "twin", "drop", "cut", "empty", "many"])
    entry = header[name] if name != "__metadata__" else header[name := draw.choice(sorted(set(header) - {name}))]
    if how == "dtype":
        entry["dtype"] = draw.choice(
            ["F32", "F16", "BF16", "I8", "I32", "I64", "F8_E4M3", "F64", "U8", "BOOL", "F4", "", LONG]
        )
    elif how == "shape":
        shape = entry["shape"]
        entry["shape"] = draw.choice(
            [shape[::-1], [*shape, 1], [1, *shape], [math.prod(shape)], [], [0], [-1], [2**40, 2**40], [2**62, 0],
             [x // 2 for x in shape], odd_value(draw, 32)]
        )  # fmt: skip
    elif how == "offsets":
        first, last = entry["data_offsets"]
        entry["data_offsets"] = draw.choice(
            [[last, first], [first + 1, last + 1], [0, last - first], [first, last + 8], [0, 0], [-8, 0],
             [2**63, 2**64], [first, first], odd_value(draw)]
        )  # fmt: skip
    elif how == "name":
        new = draw.choice(
            [LONG, ESCAPES, "", name + "x", name.replace("weight", "bias"), "__metadata__", name.upper(), "\ud800"]
        )
        header[new] = header.pop(name)
    elif how == "metadata":
        header["__metadata__"] = draw.choice([{"format": LONG * 100}, {"format": ESCAPES}, {}, odd_value(draw)])
    elif how == "any":
        header[name] = odd_value(draw)
    elif how == "twin":
        header[draw.choice([name + ".copy", "lm_head.weight", "model.norm.weight"])] = dict(entry)
    elif how == "drop":  # the tensors after it move up
        first, last = header.pop(name)["data_offsets"]
        data = data[:first] + data[last:]
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= last:
                other["data_offsets"] = [x - (last - first) for x in other["data_offsets"]]
    elif how == "cut":
        data = data[: draw.randrange(len(data) + 1)]
    elif how == "empty":
        header, data = {}, b""
    else:
        end = len(data)
        header |= {
            f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [end, end]} for i in range(draw.choice([3, 3000]))
        }
    write_shard(file, header, data)
    return f"{how} of {name[:60]} in {file.name}"


def tensor_values(folder: Path, draw: random.Random) -> str:
    """Values of one tensor. What canopyq cannot know to be wrong, such as another code, makes another model."""
    file = pick(folder, draw, WEIGHTS)
    header, data = read_shard(file)
    name = draw.choice(sorted(set(header) - {"__metadata__"}))
    first, last = header[name]["data_offsets"]
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
              "I8": torch.int8, "I32": torch.int32, "I64": torch.int64}  # fmt: skip
    if first == last or header[name]["dtype"] not in dtypes:
        return "nothing"
    values = torch.frombuffer(bytearray(data[first:last]), dtype=dtypes[header[name]["dtype"]]).clone()
    place = draw.randrange(len(values)) if draw.random() < 0.7 else slice(None)
    if values.dtype.is_floating_point:
        value = draw.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-30, 1.5])
    else:
        limits = torch.iinfo(values.dtype)
        value = draw.choice([0, -1, 1, limits.max, limits.min])
    values[place] = value
    write_shard(file, header, data[:first] + values.view(torch.uint8).numpy().tobytes() + data[last:])
    return f"{name} = {value}{'' if isinstance(place, int) else ' everywhere'}"


def json_values(pattern: str) -> Callable[[Path, random.Random], str]:
    """A mutation of the values of a JSON file."""

    def mutate(folder: Path, draw: random.Random) -> str:
        file = pick(folder, draw, pattern)
        if file is None:
            return "nothing"
        content = json.loads(file.read_text())
        done = [mutate_json(content, draw) for _ in range(draw.choice([1, 1, 1, 2]))]
        file.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
        return f"{file.name}: {', '.join(done)}"

    return mutate


def json_text(folder: Path, draw: random.Random) -> str:
    file = pick(folder, draw, r".*\.json")
    text = file.read_text()
    how = draw.choice(["cut", "byte", "deep", "wide", "twice", "other", "large", "empty", "BOM", "UTF-16", "open"])
    place = draw.randrange(len(text) + 1)
    if how == "cut":
        text = text[:place]
    elif how == "byte":
        text = text[:place] + chr(draw.randrange(256)) + text[place + 1 :]
    elif how == "deep":
        text = '{"a":' * (depth := draw.choice([100, 990, 100_000])) + "1" + "}" * depth
    elif how == "wide":
        text = (
            text.rstrip()[:-1]
            + ', "a": ['
            + draw.choice(["{},", "[],", "0,", '"",']) * draw.choice([5000, 300_000])
            + "1]}"
        )
    elif how == "twice":
        text = text.rstrip()[:-1] + "," + text.lstrip()[1:]
    elif how == "other":
        text = draw.choice(["[]", "null", "1", '"a"', "NaN", "{", "9" * 5000, "{}"])
    elif how == "large":
        text = text.rstrip()[:-1] + ', "a": "' + "y" * draw.choice([10_000, 3_000_000]) + '"}'
    elif how == "empty":
        text = ""
    elif how == "open":
        text = "[" * draw.choice([500, 9_000, 200_000])
    file.write_bytes(text.encode({"BOM": "utf-8-sig", "UTF-16": "utf-16"}.get(how, "utf-8")))
    return f"{how} {file.name}"


def file_kinds(folder: Path, draw: random.Random) -> str:
    file = pick(folder, draw, r".*")
    how = draw.choice(["missing", "pipe", "folder", "empty", "sparse", "zero", "random", "passwd", "dangling", "loop",
                       "null", "other", "locked", "pickle"])  # fmt: skip
    other = pick(folder, draw, r".*")
    content = other.read_bytes()
    file.unlink()
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "empty":
        file.touch()
    elif how == "sparse":
        file.touch()
        os.truncate(file, 10**12)
    elif how in ("zero", "random", "null"):
        file.symlink_to({"zero": "/dev/zero", "random": "/dev/random", "null": "/dev/null"}[how])
    elif how == "passwd":
        file.symlink_to("/etc/passwd")
    elif how == "dangling":
        file.symlink_to("nowhere")
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "other":
        file.write_bytes(content)
    elif how == "locked":
        file.write_bytes(b"{}")
        file.chmod(0)
    elif how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    return f"{how} {file.name}"


def file_ends(folder: Path, draw: random.Random) -> str:
    file = pick(folder, draw, r".*")
    raw = file.read_bytes()
    how = draw.choice(["cut", "longer", "start", "hole"])
    place = draw.randrange(len(raw) + 1)
    longer = raw + bytes(draw.choice([1, 8, 1000]))
    file.write_bytes(
        {"cut": raw[:place], "longer": longer, "start": raw[place:], "hole": raw[:place] + raw[place + 8 :]}[how]
    )
    return f"{how} {file.name}"


def extra_files(folder: Path, draw: random.Random) -> str:
    name = draw.choice(["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json",
                        "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json",
                        "chat_template.jinja", "preprocessor_config.json", "configuration_llama.py"])  # fmt: skip
    content = draw.choice([b"", b"{}", b"[]", b"{% for a in range(9) %}" * 9, b"\xff\xfe", ESCAPES.encode(),
                           b'{"a": 1}', b'{"weight_map": {"a": "../a"}}', b'{"base_model_name_or_path": "/etc"}',
                           b"raise SystemExit(7)"])  # fmt: skip
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    return f"{name}: {content[:20]!r}"


MUTATIONS: dict[str, Callable[[Path, random.Random], str]] = {
    "header bytes": header_bytes,
    "header fields": header_fields,
    "tensor values": tensor_values,
    "config values": json_values(r"config\.json"),
    "index values": json_values(r"model\.safetensors\.index\.json"),
    "canopyq.json values": json_values(r"(canopyq|generation_config)\.json"),
    "tokenizer values": json_values(r"tokenizer.*\.json"),
    "JSON text": json_text,
    "file kinds": file_kinds,
    "file ends": file_ends,
    "extra files": extra_files,
}
BASES = {
    "index values": ["sharded", "w8a16+head"],
    "tokenizer values": ["source"],
    "canopyq.json values": ["w4a16-g32-asym", "w8a16+head", "w8a8-static", "fp8"],
}


def make_mutant(seed: int, bases: dict[str, Path], folder: Path) -> tuple[str, str, str]:
    """Write mutant number ``seed`` into ``folder``. Returns its kind, the base, and what was done."""
    draw = random.Random(seed)
    kind = list(MUTATIONS)[seed % len(MUTATIONS)]
    base = draw.choice(BASES.get(kind, sorted(bases)))
    shutil.copytree(bases[base], folder)
    done = MUTATIONS[kind](folder, draw)
    if draw.random() < 0.25:
        with contextlib.suppress(Exception):  # the first may have left nothing that can be changed so
            done += f"; {MUTATIONS[kind](folder, draw)}"
    return kind, base, done


# The attack -----------------------------------------------------------------------------------------------------------


class Failure(Exception):
    """What must not come of a mutant."""


def attack(kind: str, base: str, folder: Path) -> str:
    """What becomes of a mutant: "refused", or "loaded".

    Raises:
        Failure: for anything else, and whatever canopyq itself raises.
    """
    out = folder.with_name("out")
    if kind == "tokenizer values":
        return _with_tokenizer(folder)
    if base in ("source", "sharded"):
        if not _command("quantize", str(folder), "--recipe", "w4a16-g32", "--out", str(out)):
            if out.exists():
                raise Failure("refused, and written all the same")
            return "refused"
        folder = out
    else:
        _command("inspect", str(folder))
        _command("inspect", str(folder), "--json", whole=True)
    try:
        model = cq.load(folder)
    except cq.CanopyError as error:
        _readable(str(error))
        if folder == out:
            raise Failure(f"what canopyq wrote is refused: {error}") from None
        return "refused"
    _numbers(model)
    return "loaded"


def _with_tokenizer(folder: Path) -> str:
    os.environ["CANOPYQ_MODEL"] = str(folder)
    try:
        model, tokenizer = cq.tutor.load()
        answer = cq.tutor.ask(model, tokenizer, "w1 w2", max_new_tokens=2)
        assert isinstance(answer, str)
    except cq.CanopyError as error:
        _readable(str(error))
        return "refused"
    finally:
        del os.environ["CANOPYQ_MODEL"]
    _numbers(model)
    return "loaded"


def _command(*arguments: str, whole: bool = False) -> bool:
    """`canopyq …` in this process, of which ``whole`` values may be printed. Returns whether it succeeded."""
    sys.argv = ["canopyq", *arguments]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        saved, stdout = (os.dup(1), os.dup(2)), sys.stdout
        stdout.flush()
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.stdout = stdout  # which the command puts away when it cannot be written
            stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
        out.seek(0)
        err.seek(0)
        said, complaint = out.read().decode(), err.read().decode()
    lines = complaint.splitlines()  # one of an error; any number of warnings beside a result
    if code not in (0, 2) or (code == 2 and len(lines) != 1) or not all(x.startswith("canopyq: ") for x in lines):
        raise Failure(f"{arguments[0]} ended with {code}: {complaint[-300:]!r}")
    for line in [*said.split("\n"), complaint.rstrip("\n")]:
        _readable(line[:80] if whole and code == 0 else line)
    return code == 0


def _readable(line: str) -> None:
    if not line.isprintable():
        raise Failure(f"not printable: {line[:300]!r}")
    if "x" * 100 in line or len(line) > 1200:
        raise Failure(f"endless: {line[:300]}")
    if re.search(r"alloc|out of memory|MemoryError|not enough memory", line):
        raise Failure(f"memory was asked for: {line[:300]}")


def _numbers(model: torch.nn.Module) -> None:
    """Raise unless the model's values and answers are finite."""
    with torch.inference_mode():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.float().isfinite().all():
                raise Failure(f"silent NaN in {name}")
        answer = model(input_ids=TOKENS, use_cache=False, return_dict=True).logits
    if not answer.isfinite().all():
        raise Failure("silent NaN in the answers")


# Processes ------------------------------------------------------------------------------------------------------------


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    return 0


def run_one(seed: int, bases: dict[str, Path], work: Path) -> tuple[str, str, str]:
    """Kind, outcome and description of a mutant, in this process."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    kind, base, done = make_mutant(seed, bases, work / "mutant")
    size = sum(file.stat().st_size for file in work.rglob("*") if file.is_file() and file.stat().st_size < 10**9)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory use is counted from now on
    before = _memory("VmRSS")
    try:
        outcome = attack(kind, base, work / "mutant")
        if (taken := _memory("VmHWM") - before) > MEMORY + 2 * size:
            outcome = f"memory: {taken:,} bytes"
    except Failure as failure:
        outcome = f"failure: {failure}"
    except BaseException as error:
        trace = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"traceback: {type(error).__name__}: {str(error)[:200]} ({Path(trace.filename).name}:{trace.lineno})"
    return kind, outcome, f"{base}, {done}"


def _child(seeds: list[int], bases: dict[str, Path], work: Path, pipe: int) -> None:
    limit = _memory("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for seed in seeds:
        os.write(pipe, (json.dumps([seed]) + "\n").encode())
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
        result = run_one(seed, bases, work)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(pipe, (json.dumps([seed, *result]) + "\n").encode())


def run_batch(seeds: list[int], bases: dict[str, Path], work: Path) -> Iterator[tuple[int, str, str, str]]:
    """Seed, kind, outcome and description of each mutant, from processes that may die."""
    left = list(seeds)
    while left:
        reader, writer = os.pipe()
        if (process := os.fork()) == 0:
            code = 1
            try:
                os.close(reader)
                _child(left, bases, work, writer)
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        text, running, ended = b"", None, ""
        while True:
            if not select.select([reader], [], [], WALL_SECONDS)[0]:
                os.kill(process, signal.SIGKILL)
                ended = f"hang: more than {WALL_SECONDS} s"
            if not (block := os.read(reader, 65536)):
                break
            text += block
            *lines, text = text.split(b"\n")
            for line in lines:
                running, *result = json.loads(line)
                if result:
                    left.remove(running)
                    yield running, *result
                    running = None
        os.close(reader)
        _, status = os.waitpid(process, 0)
        if running is not None:
            left.remove(running)
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            hung = f"hang: more than {CPU_SECONDS} s" if number == signal.SIGPROF else f"crash: status {status}"
            kind = list(MUTATIONS)[running % len(MUTATIONS)]
            yield running, kind, ended or hung, "see --replay"
        elif left and status:
            raise RuntimeError(f"a process of the fuzzer ended with {status}")


def fuzz(first: int, count: int) -> list[tuple[int, str, str, str]]:
    """All mutants from number ``first`` on; prints failures as they come, and a table at the end."""
    torch.set_num_threads(1)
    begin, found = time.time(), []
    with tempfile.TemporaryDirectory(prefix="canopyq-fuzz-") as place:
        bases = make_bases(Path(place))
        for base in ("w4a16-g32-asym", "w8a8-static"):  # so that each process finds everything imported
            _numbers(cq.load(bases[base]))
        _with_tokenizer(bases["source"])
        for start in range(first, first + count, BATCH):
            seeds = list(range(start, min(start + BATCH, first + count)))
            for seed, kind, outcome, done in run_batch(seeds, bases, Path(place) / "work"):
                found.append((seed, kind, outcome, done))
                if outcome not in ("refused", "loaded"):
                    print(f"seed {seed} ({kind}: {done!r}): {outcome!r}", flush=True)
    bad = [x for x in found if x[2] not in ("refused", "loaded")]
    counts = collections.Counter(
        (kind, outcome if outcome in ("refused", "loaded") else "failed") for _, kind, outcome, _ in found
    )
    print(f"{'kind':<22}{'mutants':>8}{'refused':>9}{'loaded':>8}{'failed':>8}")
    for kind in MUTATIONS:
        each = [counts[kind, outcome] for outcome in ("refused", "loaded", "failed")]
        print(f"{kind:<22}{sum(each):>8}{each[0]:>9}{each[1]:>8}{each[2]:>8}")
    print(f"{len(found)} mutants in {time.time() - begin:.0f} s, {len(bad)} failures")
    return bad


def replay(seed: int) -> None:
    """One mutant in this process, without limits."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="canopyq-fuzz-") as place:
        bases, mutant = make_bases(Path(place)), Path(place) / "mutant"
        kind, base, done = make_mutant(seed, bases, mutant)
        print(f"seed {seed}: {kind} of {base}: {done!r}", flush=True)
        print(attack(kind, base, mutant))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="how many mutants")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--replay", type=int, help="run this one alone, and show its traceback")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        replay(arguments.replay)
        return 0
    return int(bool(fuzz(arguments.first, arguments.count)))


if __name__ == "__main__":
    sys.exit(main())
