"""The doctor: every known-bad installation is named, with its remedy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from compress import doctor, foreign_kernels
from compress.doctor import Finding

GOOD = {
    **dict.fromkeys(doctor.BASE, "1.0"),
    **dict.fromkeys(doctor.TRAIN, "1.0"),
    **dict.fromkeys(doctor.SERVE, "1.0"),
    "torch": "2.11.0+cu130",
    "onnxruntime-gpu": "1.26.0",
    "tensorrt": "10.3.0.post1",
}


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in GOOD.items() if name not in names}


def test_the_lists_are_those_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.match(r"[A-Za-z0-9_-]+", text)[0] for text in requirements}  # type: ignore[index]

    onnxruntime = {"onnxruntime", "onnxruntime-gpu"}  # one of the two, which check_onnxruntime looks at
    assert sorted(doctor.BASE) == sorted(names(project["dependencies"]) - onnxruntime)
    assert sorted(doctor.TRAIN) == sorted(names(project["optional-dependencies"]["train"]))
    for name, extra in doctor.OTHER_RUNTIMES.items():
        assert name in {found.lower() for found in names(project["optional-dependencies"][extra])}
    assert sorted(doctor.SERVE) == sorted(names(project["optional-dependencies"]["serve"]))


@pytest.mark.parametrize(
    ("finding", "state", "says", "remedy"),
    [
        (doctor.check_python((3, 11)), "ok", "3.11", ""),
        (doctor.check_python((3, 13)), "ok", "3.13", ""),
        (doctor.check_python((3, 10)), "broken", "3.10", "use Python 3.11"),
        (doctor.check_python((3, 14)), "broken", "3.14", "use Python 3.11"),
        (doctor.check_disk(50_000_000_000), "ok", "50 GB", ""),
        (doctor.check_disk(1_000_000_000), "broken", "1.0 GB", "free 5 GB"),
        (doctor.check_kernels(None, GOOD), "ok", "ours", ""),
        (doctor.check_kernels(None, {**GOOD, "kernels": "0.9"}), "broken", "0.9", "pip uninstall -y kernels"),
        (doctor.check_kernels("not ours: do this", GOOD), "broken", "hidden", "do this"),
        (doctor.check_base(GOOD), "ok", "numpy 1.0", ""),
        (doctor.check_base(without("rich")), "broken", "missing rich", "pip install"),
        (doctor.check_serve(GOOD), "ok", "fastapi 1.0", ""),
        (doctor.check_serve(without(*doctor.SERVE)), "absent", "not installed", "compress-detectors[serve]"),
        (doctor.check_serve(without("uvicorn")), "broken", "missing uvicorn", "compress-detectors[serve]"),
        (doctor.check_train(GOOD)[0], "ok", "torch 2.11.0", ""),
        (
            doctor.check_train(without(*doctor.TRAIN))[0],
            "absent",
            "not installed",
            "compress-detectors[train]",
        ),
        (doctor.check_train(without("onnxscript"))[0], "broken", "missing onnxscript", "[train]"),
        (doctor.check_train({**GOOD, "torch": "2.9.1"})[0], "broken", "older than 2.11", "--upgrade torch"),
        (doctor.check_driver(None, False), "absent", "no NVIDIA", "CPU"),
        (doctor.check_driver("NVIDIA L4, driver 570.86", True), "ok", "L4", ""),
        (doctor.check_driver("NVIDIA L4, driver 570.86", None), "ok", "L4", ""),
        (doctor.check_driver("NVIDIA L4, driver 470.1", False), "broken", "does not see", "driver"),
        (doctor.check_onnxruntime(GOOD, None), "ok", "onnxruntime-gpu 1.26.0", ""),
        (
            doctor.check_onnxruntime(without("onnxruntime-gpu"), None),
            "broken",
            "not installed",
            "pip install",
        ),
        (
            doctor.check_onnxruntime({**GOOD, "onnxruntime": "1.20"}, None),
            "broken",
            "both onnxruntime 1.20 and onnxruntime-gpu 1.26.0",
            "pip uninstall -y onnxruntime onnxruntime-gpu",
        ),
        (
            doctor.check_onnxruntime({**GOOD, "onnxruntime-openvino": "1.24.1"}, None),
            "broken",
            "both onnxruntime-gpu 1.26.0 and onnxruntime-openvino 1.24.1",
            "pip uninstall -y onnxruntime-gpu onnxruntime-openvino",
        ),
        (
            doctor.check_onnxruntime({**GOOD, "onnxruntime-gpu": "1.27.0"}, "L4, driver 570.86"),
            "broken",
            "too old",
            "onnxruntime-gpu<1.27",
        ),
        (
            doctor.check_onnxruntime({**GOOD, "onnxruntime-gpu": "1.27.0"}, "L4, driver 580.1"),
            "ok",
            "1.27.0",
            "",
        ),
        (doctor.check_tensorrt(GOOD), "ok", "10.3.0.post1; int8 engines", ""),
        (doctor.check_tensorrt({"tensorrt": "11.4.0.106"}), "ok", "11.4.0.106", ""),
        (doctor.check_tensorrt({"tensorrt": "11.2.0"}), "ok", "11.2.0; 11.2 was seen to fuse", ""),
        (doctor.check_tensorrt({"tensorrt": "10.2.0"}), "broken", "10.2.0", "known bad"),
        (doctor.check_tensorrt({"tensorrt": "8.6.1"}), "broken", "8.6.1", "tensorrt>=10.3"),
        (doctor.check_tensorrt({}), "absent", "not installed", "compress-detectors[trt]"),
        (doctor.check_openvino({"openvino": "2026.4.1"}, ["CPU", "GPU"]), "ok", "2026.4.1; finds CPU, GPU", ""),
        (doctor.check_openvino({"openvino": "2025.3.0"}, ["CPU"]), "broken", "older than 2026.4", "[openvino]"),
        (doctor.check_openvino({"openvino": "2026.4.1"}, "no library"), "broken", "does not start: no library", "pip"),
        (doctor.check_openvino({"openvino": "2026.4.1"}, ["CPU"], bf16=True), "ok", "computes in bfloat16 where", ""),
        (doctor.check_openvino({}, []), "absent", "not installed", "compress-detectors[openvino]"),
        (doctor.check_other_runtimes({}, None), "absent", "none", "compress-detectors[litert,mnn,ncnn,tract,tvm]"),
        (doctor.check_other_runtimes({"mnn": "3.6.1", "apache-tvm": "0.27"}, None), "ok", "mnn 3.6.1, tvm 0.27", ""),
        (doctor.check_other_runtimes({"ai-edge-litert": "2.3"}, None), "absent", "no onnx2tf", "pipx install onnx2tf"),
        (doctor.check_other_runtimes({"ai-edge-litert": "2.3"}, "/bin/onnx2tf"), "ok", "litert 2.3", ""),
    ],
)
def test_states(finding: Finding, state: str, says: str, remedy: str) -> None:
    assert finding.state == state
    assert says in finding.text
    assert remedy in finding.remedy
    assert bool(finding.remedy) == (state != "ok")  # whatever is not well comes with what to do


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_one.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nx')")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = doctor.check_import("broken_one", {"broken_one": "1.0"})
    assert finding.state == "broken"
    assert finding.text == "does not import: operator torchvision::nms does not exist"
    assert doctor.check_import("broken_one", {}) == []


def test_the_processor_really_starts() -> None:
    """The embedded model is a valid one, and a provider that is made up does not start."""
    onnxruntime = pytest.importorskip("onnxruntime")
    assert doctor._provider_starts(onnxruntime.InferenceSession, "CPUExecutionProvider")
    assert not doctor._provider_starts(onnxruntime.InferenceSession, "MadeUpExecutionProvider")


def test_show_tells_whether_something_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    fine = [Finding("a", "1"), Finding("b", "none", "absent", "install b[x]")]
    assert doctor.show(fine)
    assert "install b[x]" in capsys.readouterr().out
    assert not doctor.show([*fine, Finding("c", "bad", "broken", "mend c")])
    assert "mend c" in capsys.readouterr().out


def test_installed_versions_are_by_normal_name() -> None:
    assert "pyyaml" in doctor.installed_versions() and "pycocotools" in doctor.installed_versions()


# ----------------------------------------------------------------------- another package called kernels


@pytest.fixture
def hugging_face(tmp_path: Path) -> dict[str, str]:
    """An environment in which another package `kernels` comes first on the path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(name): ...\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_ours_is_found() -> None:
    assert foreign_kernels() is None


def test_the_first_import_says_so_in_one_line(hugging_face: dict[str, str]) -> None:
    for module in ("compress.detectors", "compress.distill"):
        outcome = run(f"import {module}", hugging_face)
        assert outcome.returncode == 1
        last = outcome.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: the package 'kernels' at ") and "pip uninstall -y kernels" in last


def test_a_command_says_so_in_one_line(hugging_face: dict[str, str], tmp_path: Path) -> None:
    code = "from compress.cli import main; main(['quickstart'])"
    outcome = run(f"import os; os.chdir({str(tmp_path)!r}); {code}", hugging_face)
    assert outcome.returncode == 2
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: the package 'kernels' at ") and "Hugging Face" in line
    assert not (tmp_path / "runs").exists()
