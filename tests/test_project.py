"""What the project promises outside its code: the same requirements everywhere, and commands that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import canopyq
from canopyq import cli

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCUMENTED = ["help", "lab", "test", "test-fast", "notebooks", "train-tutor", "lint", "clean"]


def requirements(*extras: str) -> dict[str, Requirement]:
    """The core requirements of pyproject.toml and those of ``extras``, by normalized name."""
    lines = [*PROJECT["dependencies"], *(line for name in extras for line in PROJECT["optional-dependencies"][name])]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins(file: str = "constraints.txt") -> dict[str, Requirement]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(r.name): r for r in (Requirement(x) for x in lines if x and not x.startswith("#"))}


def targets() -> dict[str, str]:
    """Every target of the Makefile that says what it does, and what it says."""
    return dict(re.findall(r"^([a-z-]+):.*## (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "CI")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=60)


# --- requirements ----------------------------------------------------------------------------------------------------


def test_environment_names_the_same_requirements() -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["name"] == "canopyq"
    assert "python=3.11" in conda["dependencies"] and "pip" in conda["dependencies"]
    lines = next(part["pip"] for part in conda["dependencies"] if isinstance(part, dict))
    assert [line for line in lines if line.startswith("-")] == ["-c constraints.txt", "-e ."]
    named = [Requirement(line) for line in lines if not line.startswith("-")]
    assert {canonicalize_name(r.name): r.specifier for r in named} == {
        name: r.specifier for name, r in requirements("course", "test").items()
    }


def test_every_requirement_is_pinned_inside_its_range() -> None:
    pinned = pins()
    for name, requirement in requirements("course", "test").items():
        (pin,) = pinned[name].specifier
        assert pin.operator == "==", name
        assert requirement.specifier.contains(pin.version), f"constraints.txt has {pinned[name]}, wanted {requirement}"


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """But for torch, of which the tests of the oldest versions take the pinned one."""
    oldest = pins("constraints-oldest.txt")
    bounds = {name: Version(next(iter(r.specifier)).version)
              for name, r in requirements("course", "test").items() if name != "torch"}  # fmt: skip
    assert {name: Version(next(iter(r.specifier)).version) for name, r in oldest.items() if name != "torch"} == bounds


def test_pins_are_exact_and_fit_every_build() -> None:
    for name, requirement in pins().items():
        assert [pin.operator for pin in requirement.specifier] == ["=="], name
        assert "+" not in str(requirement.specifier), f"{name}: a build tag such as +cpu fits one kind of machine only"


def test_ranges_stay_wide() -> None:
    for name, requirement in requirements("course", "test", "gpu").items():
        assert {pin.operator for pin in requirement.specifier} == {">="}, f"{name}: a library may not set upper limits"


@pytest.mark.parametrize("release", ["5.15.0", "5.17.0", "5.23.0", "5.24.0"])
def test_transformers_versions_that_must_be_fine(release: str) -> None:
    assert requirements()["transformers"].specifier.contains(release)


def test_gpu_requirements_are_for_linux() -> None:
    for line in PROJECT["optional-dependencies"]["gpu"]:
        marker = Requirement(line).marker
        assert marker is not None
        assert marker.evaluate({"platform_system": "Linux"}) and not marker.evaluate({"platform_system": "Darwin"})


def test_versions_agree() -> None:
    assert canopyq.__version__ == PROJECT["version"]


# --- make ------------------------------------------------------------------------------------------------------------


def test_help_is_first_and_names_every_target() -> None:
    assert set(DOCUMENTED) <= set(targets())
    done = make()
    assert done.returncode == 0, done.stderr
    assert done.stdout == make("help").stdout
    listed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])
    assert listed == targets()


@pytest.mark.parametrize("target", DOCUMENTED)
def test_targets_exist(target: str) -> None:
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr


def test_an_old_python_is_refused_in_words(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text(
        '#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.18; exit 0; fi\nexit 1\n', encoding="utf-8"
    )
    old.chmod(0o755)
    done = make("lint", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert "needs Python 3.10 or newer" in done.stdout and "is Python 3.9.18" in done.stdout


def test_a_missing_python_is_named(tmp_path: Path) -> None:
    done = make("lint", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2
    assert "no-such-python was not found" in done.stdout


# --- documents and workflows -----------------------------------------------------------------------------------------


def commands(document: str) -> list[tuple[str, str]]:
    """``("make", "lab")`` for every ``make lab`` and ``canopyq size`` in a fenced shell block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [found for block in blocks for found in re.findall(r"(?:^|[\s;&/])(make|canopyq) +([a-z][\w-]*)", block)]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documented_commands_exist(document: str) -> None:
    app = next(value for value in vars(cli).values() if isinstance(value, typer.Typer))
    known = {"make": set(targets()), "canopyq": set(typer.main.get_command(app).commands)}
    found = commands(document)
    assert ("make", "lab") in found and ("make", "test") in found
    assert not [f"{tool} {name}" for tool, name in found if name not in known[tool]]


@pytest.mark.parametrize(
    ("name", "triggers", "runs"),
    [("test", {"push", "pull_request", "schedule"}, "bash .ci/run"), ("book", {"push"}, "make book")],
)
def test_workflows_parse(name: str, triggers: set[str], runs: str) -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text(encoding="utf-8"))
    assert triggers <= set(workflow[True])  # YAML 1.1 reads the key `on` as true
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all("uses" in step or "run" in step for step in steps)
    assert runs in {step.get("run") for step in steps}


def test_shell_scripts() -> None:
    for script in (".ci/run", "tools/install_browser.sh"):
        path = ROOT / script
        assert os.access(path, os.X_OK), f"{script} is not executable"
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")
        subprocess.run(["bash", "-n", str(path)], check=True)


def test_hooks_parse() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = {hook["id"]: hook["entry"] for repository in config["repos"] for hook in repository["hooks"]}
    assert set(hooks) == {"ruff-check", "ruff-format", "notebooks"}


def test_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text and "Copyright 2026 Canopy Quantization contributors" in text


def test_the_package_is_typed_and_runs_as_a_module() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    package_data = tools["setuptools"]["package-data"]["canopyq"]
    typed = ROOT / "canopyq" / "py.typed"
    assert typed.is_file() and typed.name in package_data
    done = subprocess.run([sys.executable, "-m", "canopyq", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"canopyq {canopyq.__version__}")
