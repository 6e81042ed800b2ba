"""What `inspect` says of servers, held to the servers' own classes: those of vLLM and SGLang where `make serving` has
fetched their sources."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

import canopyq as cq
from canopyq.cli import app
from canopyq.errors import CanopyError

TOOLS = Path(__file__).parents[1] / "tools"
RECIPES = ("w8a16", "w4a16-g128", "w4a16-g32-asym", "w3a16-g128", "w4a16-g16", "w4a16-g16-asym", "w4a16-tensor", "w8a8",
           "w8a8-asym", "fp8", "w4a8-g128", "w2a4-g32", "w4a6-g128", "w4a8-g128-asym", "mxfp4", "nvfp4")  # fmt: skip


@pytest.fixture(scope="module")
def serving():
    spec = importlib.util.spec_from_file_location("serving", TOOLS / "serving.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    original, place = cq.tutor.load()[0], tmp_path_factory.mktemp("serving")

    def get(recipe: str) -> Path:
        if not (folder := place / recipe).is_dir():
            model = copy.deepcopy(original)
            cq.quantize_(model, recipe)
            cq.save(model, folder, check=False)
        return folder

    return get


@pytest.mark.slow
@pytest.mark.parametrize(("package", "name"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_inspect_says_what_the_servers_classes_do(serving, saved, package: str, name: str) -> None:
    if serving.source(package) is None:
        pytest.skip(f"the source of {name} is not here: make serving")
    folders = {recipe: saved(recipe) for recipe in RECIPES}
    said = serving.asked(package, list(folders.values()))
    wrong = {}
    for recipe, folder in folders.items():
        for ranks in (1, 2, 4):
            layers = said[str(folder)][str(ranks)]
            assert len(layers) == 32 or "" in layers  # of eight blocks: qkv, o, gate and up, down
            tools = cq.inspect(folder, ranks).tools
            taken = all("error" not in found for found in layers.values())
            promised = tools["vLLM"].startswith("yes") and tools.get(f"over {ranks} ranks", "yes") == "yes"
            # SGLang has fewer kernels, and inspect says nothing of it: what it takes has to be what vLLM takes
            if taken != promised and not (package == "sglang" and promised):
                wrong[recipe, ranks] = layers, tools
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("recipe", "ranks", "refused"),
    [
        ("w4a16-g128", 2, None),  # o_proj has 256 inputs
        ("w4a16-g128", 4, "o_proj"),
        ("w8a16", 4, None),
        ("mxfp4", 4, None),
        ("w4a16-g32-asym", 8, None),
        ("w4a16-g32-asym", 32, "k_proj"),  # zero points of 128 outputs: 4 a rank, in words of 8
        ("w8a8", 3, "o_proj"),
    ],
)
def test_inspect_flags_what_ranks_cannot_share(saved, recipe: str, ranks: int, refused: str | None) -> None:
    said = cq.inspect(saved(recipe), ranks).tools[f"over {ranks} ranks"]
    assert said == "yes" if refused is None else said.startswith("no: ") and refused in said


def test_the_command_says_it_too(saved) -> None:
    done = CliRunner().invoke(app, ["inspect", str(saved("w4a16-g128")), "--tp", "4"])
    assert done.exit_code == 0 and "over 4 ranks no: model.layers.0.self_attn.o_proj: groups of 128" in done.output
    with pytest.raises(CanopyError, match="ranks"):
        cq.inspect(saved("w4a16-g128"), 0)


def test_the_page_has_every_recipe() -> None:
    from canopyq.tensor.scheme import RECIPES

    page = (TOOLS.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    assert {row[1].strip(" `") for row in rows} >= set(RECIPES)
    assert all(cell.strip() for row in rows for cell in row[1:-1])
