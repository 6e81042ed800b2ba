"""What `canopyq doctor` says of this machine, and of machines that lack something."""

from __future__ import annotations

import builtins
import importlib.util
import io
import json
import os
import platform
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from canopyq.evaluate import machine
from canopyq.evaluate.machine import Check, checks, describe, gpu, kernels
from canopyq.kernels import cpu_int8
from canopyq.tutor import loading


@pytest.fixture(autouse=True)
def _the_tutor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(loading.VARIABLE, raising=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is loaded."""
    model = torch.nn.Linear(3, 4, bias=False)
    monkeypatch.setattr("canopyq.tutor.load", lambda: (model, None))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)


def named(found: list[Check], name: str) -> Check:
    return next(check for check in found if check.name == name)


def test_describe_is_plain_text_about_this_machine() -> None:
    found = describe()
    assert json.loads(json.dumps(found)) == found and all(isinstance(value, str) and value for value in found.values())
    assert found["python"] == platform.python_version() and found["torch"] == torch.__version__
    assert f"{os.cpu_count()} cores" in found["processor"]


def test_describe_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.version

    def version(package: str) -> str:
        if package == "matplotlib":
            raise PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(machine, "version", version)
    assert describe()["matplotlib"] == "not installed" and describe()["numpy"] == real("numpy")


@pytest.mark.parametrize("content", [None, "processor : 0\nCPU part : 0xd0c\n", ""], ids=["no file", "arm", "empty"])
def test_a_processor_without_a_model_name(content: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str, *args: object) -> io.StringIO:
        if content is None:
            raise FileNotFoundError(path)
        return io.StringIO(content)

    monkeypatch.setattr(builtins, "open", read)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert describe()["processor"].startswith("unknown processor, ")


@pytest.mark.parametrize("error", [AttributeError, ValueError, OSError])
def test_memory_that_cannot_be_read(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def sysconf(name: str) -> int:
        raise error(name)

    monkeypatch.setattr(os, "sysconf", sysconf)
    assert describe()["memory"] == "unknown"


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Some Card", total_memory=24e9, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert gpu() == "Some Card, 24 GB, compute capability 8.9"
    assert any(check.ok and check.detail == gpu() for check in kernels())


@pytest.mark.parametrize(("build", "reason"), [(None, "CPU build"), ("12.8", "none that CUDA can see")])
def test_without_a_gpu_it_says_why(build: str | None, reason: str, no_gpu: None, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    assert gpu().startswith("none") and reason in gpu()


def test_kernels_say_why_they_do_not_run(no_gpu: None) -> None:
    found = kernels()
    assert any(check.ok and "reference" in check.name for check in found)
    assert not any(check.needed for check in found), "the reference always runs, so that no kernel is a must"
    *kernels_, plain = [check for check in found if "CUDA" in check.name]
    assert not plain.ok and "CPU build" in plain.detail
    assert kernels_ and all(not check.ok and "without CUDA" in check.detail for check in kernels_)


def test_a_processor_without_integer_products_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_int8, "products_are_exact", lambda: True)  # also where ONEDNN_MAX_CPU_ISA hides VNNI
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert any("VNNI" in check.detail for check in kernels() if not check.ok)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert not any("VNNI" in check.detail for check in kernels())


def test_checks_pass_here_without_a_gpu(no_gpu: None) -> None:
    found = checks()
    assert all(check.ok for check in found if check.needed)
    assert len({check.name for check in found}) == len(found)
    assert named(found, "tutor").detail == "8,196,352 parameters loaded"


def test_a_missing_package_comes_with_its_cure(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ipywidgets" else real(name))
    check = named(checks(), "ipywidgets")
    assert (check.ok, check.needed) == (False, True) and "pip install 'canopyq[course]'" in check.detail


def test_a_folder_that_only_has_a_package_s_name(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder `plots/` is importable as a namespace, but nothing is installed under that name."""
    (tmp_path / "canopyq_plots").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    check = machine._importable("canopyq_plots")
    assert not check.ok and "not installed" in check.detail


def test_a_tutor_that_does_not_load_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "path", lambda: tmp_path)
    check = named(checks(), "tutor")
    assert (check.ok, check.needed) == (False, True) and "the tutor model is missing" in check.detail


def test_another_model_is_not_called_the_tutor(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loading.VARIABLE, "some/model")
    assert named(checks(), "tutor").detail == "12 parameters loaded from CANOPYQ_MODEL='some/model'"
