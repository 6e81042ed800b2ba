"""Checkpoints of somebody who means harm: refused in one line, before they cost time or memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import canopyq as cq
from canopyq.checkpoint.files import CONFIG, SINGLE
from canopyq.checkpoint.headers import DEEPEST, FEW, read_json
from canopyq.checkpoint.output import whole_or_absent
from canopyq.checkpoint.stream import quantize_checkpoint
from canopyq.errors import CanopyError

RECIPE = "w4a16-g32"
ESCAPES = "\x1b[2J\r\n\u202e"


@pytest.fixture
def quantized(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A quantized checkpoint, to damage."""
    return Path(shutil.copytree(saved(RECIPE), tmp_path / "quantized"))


@pytest.fixture
def source(llama: Callable, tmp_path: Path) -> Path:
    """The same model before it was quantized."""
    llama().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def edit(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def set_value(folder: Path, name: str, value: float) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def refused(action: Callable[[], object], *words: str) -> str:
    """The message of the `CanopyError` that ``action`` ends in, soon."""
    begin = time.process_time()
    with pytest.raises(CanopyError) as error:
        action()
    assert time.process_time() - begin < 5
    message = str(error.value)
    assert message.isprintable() and all(word in message for word in words), message
    return message


def both(quantized: Path, source: Path, *words: str) -> None:
    """Neither is loaded, and the source is not quantized."""
    refused(lambda: cq.load(quantized), *words)
    refused(lambda: quantize_checkpoint(source, RECIPE, source.with_name("out")), *words)
    assert not source.with_name("out").exists()


@pytest.mark.parametrize("value", [10**5, 10**8, 10**12, 10**400, 1e300, math.inf, [10**8], [1, [10**9]]], ids=str)
@pytest.mark.parametrize("key", ["num_hidden_layers", "num_labels", "num_attention_heads", "num_local_experts"])
@pytest.mark.parametrize("nested", [False, True], ids=["", "text_config"])
def test_counts(key: str, value: object, nested: bool, quantized: Path, source: Path) -> None:
    for folder in (quantized, source):
        if nested:
            edit(folder, text_config={"model_type": "llama", "deeper": [{key: value}]})
        else:
            edit(folder, **{key: value})
    both(quantized, source, key)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
@pytest.mark.parametrize("value", [10**6, 10**9, 2**62])
def test_sizes(key: str, value: int, quantized: Path, source: Path) -> None:
    for folder in (quantized, source):
        edit(folder, **{key: value})
    both(quantized, source)


def test_layers_that_the_count_allows_and_the_tensors_do_not(source: Path, quantized: Path) -> None:
    """So many that building them takes minutes: it ends at the first parameter too many."""
    sizes = {"num_hidden_layers": 9_000, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 96}
    for folder in (source, quantized):
        edit(folder, model_type="gemma3", architectures=[], text_config=sizes | {"model_type": "gemma3_text"})
    both(quantized, source, "more parameters")


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", -1), ("rms_norm_eps", math.nan), ("rope_theta", 0), ("rope_theta", -1e4),
     ("attention_dropout", math.nan), ("rope_scaling", {"rope_type": "linear", "factor": 0.0})],
)  # fmt: skip
def test_numbers_with_which_no_model_answers(key: str, value: object, quantized: Path, source: Path) -> None:
    for folder in (quantized, source):
        edit(folder, **{key: value})
        if key.startswith("rope"):
            edit(folder, rope_parameters=value if isinstance(value, dict) else {"rope_type": "default", key: value})
    both(quantized, source)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_code_on_the_hub(key: str, quantized: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers fetches and runs a kernel of this name, if the package for it is there."""
    for folder in (quantized, source):
        edit(folder, **{key: "somebody/kernel"})
    both(quantized, source, "somebody/kernel")
    monkeypatch.setenv("CANOPYQ_MODEL", str(source))
    refused(cq.tutor.load, "somebody/kernel")


@pytest.mark.parametrize("architectures", [1, {}, [None], "LlamaForCausalLM", [["a"]]], ids=str)
def test_architectures_that_are_none(architectures: object, source: Path) -> None:
    edit(source, architectures=architectures)
    with suppress(CanopyError):
        quantize_checkpoint(source, RECIPE, source.with_name("out"))


def test_codes_of_float8_are_no_infinity(saved: Callable) -> None:
    """The largest is all that infinity can be cast to."""
    assert torch.isfinite(cq.load(saved("fp8"))(torch.arange(3, 9)[None]).logits).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_values_that_are_no_numbers(name: str, bad: float, quantized: Path, source: Path) -> None:
    for folder in (quantized, source):
        set_value(folder, name, bad)
    both(quantized, source, name)


def test_values_that_the_dtype_does_not_hold(quantized: Path) -> None:
    set_value(quantized, "model.norm.weight", 1e6)
    assert cq.load(quantized).model.norm.weight[-1] > 9e5
    refused(lambda: cq.load(quantized, dtype="float16"), "model.norm.weight", "float16")


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0, 0.0, 1e38])
def test_scales(scale: float, quantized: Path) -> None:
    set_value(quantized, "model.layers.0.mlp.up_proj.weight_scale", scale)
    refused(lambda: cq.load(quantized), "model.layers.0.mlp.up_proj", "weight_scale")


@pytest.mark.parametrize("size", [10**6, 10**9 - 1, 10**30])
def test_groups_longer_than_the_rows(size: int, saved: Callable, tmp_path: Path) -> None:
    """One scale a row fits them, and to cut rows into them would fill the memory with zeros."""
    folder = Path(shutil.copytree(saved("w4a16-channel"), tmp_path / "copy"))
    config = json.loads((folder / CONFIG).read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": size}
    edit(folder, quantization_config=config)
    refused(lambda: cq.load(folder), str(size))


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize("patterns", [["re:([a-z0-9_.]+)+!"], ["re:(.*)*!"] * 900, [f"re:{i}" for i in range(10_000)]])
def test_patterns(field: str, patterns: list[str], quantized: Path) -> None:
    config = json.loads((quantized / CONFIG).read_text())["quantization_config"]
    (config if field == "ignore" else config["config_groups"]["group_0"])[field] = patterns
    edit(quantized, quantization_config=config)
    begin = time.process_time()
    for action in (cq.load, cq.inspect):
        with suppress(CanopyError):
            action(quantized)
    assert time.process_time() - begin < 10


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device", "loop"])
@pytest.mark.parametrize("name", [CONFIG, SINGLE, "generation_config.json", "canopyq.json"])
def test_what_is_no_file(name: str, kind: str, quantized: Path) -> None:
    file = quantized / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        try:
            os.mknod(file, 0o20666, os.makedev(1, 5))  # a second /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    else:
        file.symlink_to("/dev/zero" if kind == "link to a device" else file)
    action = cq.inspect if name == "canopyq.json" else cq.load
    if kind == "loop" and name.endswith(("generation_config.json", "canopyq.json")):
        action(quantized)  # as if it were not there
    else:
        refused(lambda: action(quantized))


JSON_BOMBS = {
    "many values": '{"a": [' + "{}," * 300_000 + "{}]}",
    "many numbers": '{"a": [' + "0," * 400_000 + "0]}",
    "deep lists": '{"a": ' + "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1) + "}",
    "deep objects": '{"a":' * 900 + "1" + "}" * 900,
    "endless lists": "[" * (FEW - 1),
    "long text": '{"a": "' + "x" * 2_000_000 + '"}',
    "digits": '{"a": ' + "9" * 5000 + "}",
    "a key twice": '{"a": 1, "a": 2}',
    "half a text": '{"a": "\ud800',
    "nothing": "",
}


@pytest.mark.parametrize("bomb", JSON_BOMBS)
@pytest.mark.parametrize("name", [CONFIG, "generation_config.json", "canopyq.json"])
def test_json_that_is_a_bomb(name: str, bomb: str, quantized: Path) -> None:
    (quantized / name).write_text(JSON_BOMBS[bomb], errors="surrogatepass")
    refused(lambda: (cq.inspect if name == "canopyq.json" else cq.load)(quantized), name)


def test_nan_is_no_json_and_some_models_have_it_all_the_same(quantized: Path, tmp_path: Path) -> None:
    edit(quantized, time_step_limit=[0.0, math.inf])  # Mamba's has it
    assert read_json(quantized / CONFIG)["time_step_limit"][1] == math.inf
    assert cq.load(quantized) is not None
    (quantized / "canopyq.json").write_text('{"check": NaN}')
    refused(lambda: cq.inspect(quantized), "canopyq.json", "NaN")


@pytest.mark.parametrize("name", ["x" * 300, f"a{ESCAPES}", "", "\ud800", "a\u200b"], ids=ascii)
def test_names_of_tensors(name: str, quantized: Path) -> None:
    raw = (quantized / SINGLE).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header[name] = header.pop("lm_head.weight")
    text = json.dumps(header).encode()
    (quantized / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    for action in (cq.load, cq.inspect):
        assert len(refused(lambda action=action: action(quantized))) < 400 + len(str(quantized))


def test_a_report_shows_what_a_config_says_and_does_not_obey_it(quantized: Path) -> None:
    config = json.loads((quantized / CONFIG).read_text())["quantization_config"]
    config["config_groups"] = {f"g{ESCAPES}{'x' * 300}": config["config_groups"]["group_0"]}
    edit(quantized, model_type=f"m{ESCAPES}{'y' * 300}", quantization_config=config)
    lines = str(cq.inspect(quantized)).split("\n")
    assert all(line.isprintable() and "x" * 80 not in line and "y" * 80 not in line for line in lines)
    assert len(lines) == len(str(cq.inspect(quantized)).splitlines()) and "\\x1b[2J" in lines[0]


def test_a_model_beside_the_tutor_is_looked_at_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from canopyq.tutor import loading

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(loading.path() / name, source)
    set_value(source, "model.norm.weight", math.nan)
    monkeypatch.setenv(loading.VARIABLE, str(source))
    refused(cq.tutor.load, "model.norm.weight", "NaN")


def test_advice_on_a_config_alone(tmp_path: Path) -> None:
    from canopyq import advisor

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 100}
    for changes in ({"num_hidden_layers": 10**8}, {"num_labels": 10**9}, {"num_hidden_layers": 2, "head_dim": -1},
                    {"num_hidden_layers": 2, "vocab_size": 10**30}, {"num_hidden_layers": 0}):  # fmt: skip
        (tmp_path / CONFIG).write_text(json.dumps({"model_type": "llama"} | sizes | changes))
        refused(lambda: advisor.advise(str(tmp_path)))


def test_a_whole_checkpoint_takes_no_more_than_before(quantized: Path) -> None:
    """The bounds are far from what models have."""
    assert torch.isfinite(cq.load(quantized)(torch.arange(3, 9)[None]).logits).all()


# Links, and what a killed process leaves ------------------------------------------------------------------------------


def test_links_that_lead_out_of_the_folder_are_not_copied(source: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for target in (secret, Path("../secret"), Path("/etc/passwd"), Path("../../../../../../../../../etc/passwd")):
        (source / "tokenizer.json").unlink(missing_ok=True)
        (source / "tokenizer.json").symlink_to(target)
        refused(lambda: quantize_checkpoint(source, RECIPE, tmp_path / "out"), "tokenizer.json")
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_links_within_the_folder_and_to_the_hubs_blobs_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    shutil.copytree(source, snapshot)
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    (blobs / "t").write_text('{"a": 1}')
    (snapshot / "tokenizer.json").symlink_to("../../blobs/t")
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    quantize_checkpoint(snapshot, RECIPE, tmp_path / "out")
    for name in ("tokenizer.json", "vocab.json"):
        assert (tmp_path / "out" / name).read_text() == '{"a": 1}' and not (tmp_path / "out" / name).is_symlink()
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../other")  # beside the blobs
    (blobs.parent / "other").write_text("{}")
    refused(lambda: quantize_checkpoint(snapshot, RECIPE, tmp_path / "second"), "tokenizer.json")


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    writing = (
        "import sys\nfrom canopyq.checkpoint.output import whole_or_absent\n"
        "with whole_or_absent(sys.argv[1]) as work:\n"
    )
    writing += "    (work / 'half').write_bytes(bytes(1000)); print(work, flush=True); sys.stdin.read()\n"

    def writer(name: str) -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", writing, str(tmp_path / name)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return process, Path(process.stdout.readline().strip())

    killed, living, other = writer("out"), writer("out"), writer("outer")
    (tmp_path / ".out.0123abcd.part").symlink_to(source := tmp_path / "elsewhere")
    source.mkdir()
    (source / "file").write_text("x")
    for process, _ in (killed, other):
        process.kill()
        process.wait()
    assert killed[1].exists() and living[1].exists()
    with whole_or_absent(tmp_path / "out") as work:
        (work / "file").write_text("x")
        assert not killed[1].exists() and (living[1] / "half").exists() and other[1].exists()
    assert (source / "file").exists() and (tmp_path / "out" / "file").exists()
    living[0].communicate()
    assert living[0].returncode != 0 and not living[1].exists(), "the name was taken meanwhile"
