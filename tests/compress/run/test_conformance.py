"""The conformance kit finds planted faults, each in the check that is about it, and lets sound detectors pass."""

from __future__ import annotations

import pytest

from compress import cli
from compress.run.conformance import CHECKS, check_model
from deploy.core.errors import UserError
from tests.helpers.broken_centers import FAULTS

pytestmark = pytest.mark.usefixtures("few_rounds")

EXAMPLE = "examples.own_detector.centers:Centers"


def test_the_example_passes() -> None:
    found = list(check_model(EXAMPLE, options={"width": 16}))
    assert [check.name for check in found] == list(CHECKS)
    assert [(check.name, check.problem, check.skipped) for check in found if check.problem or check.skipped] == []


@pytest.mark.parametrize(("fault", "name"), [(f"{kind.__name__}", name) for kind, name in FAULTS.items()])
def test_planted_faults_are_found(fault: str, name: str) -> None:
    for check in check_model(f"tests.helpers.broken_centers:{fault}"):
        if check.problem is not None:
            assert check.name == name, check.problem
            assert "\n" not in check.problem and len(check.problem) > 20
            return
    pytest.fail(f"{fault} passes")


def test_what_builds_on_a_failed_check_is_skipped() -> None:
    found = {check.name: check for check in check_model("tests.helpers.broken_centers:BackgroundClass")}
    assert found["boxes"].skipped == "needs prediction" and found["export"].skipped == "needs boxes"
    assert found["independence"].problem is None and found["independence"].skipped is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("examples.own_detector.centers:Nothing", "examples.own_detector.centers has no Nothing"),
        ("compress.detectors.base:ImageSize", "is not a subclass of compress.detectors.base.Detector"),
        ("no_module_of_this_name:Model", "no such module"),
        ("mymodels", "'mymodels' is no import path; write package.module:Name"),
        ("gfl", "'gfl' is no import path"),
    ],
)
def test_what_is_no_detector_is_one_line(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(check_model(path))


def test_a_wrong_backbone_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^backbone: 'nnano' is not one of .*; did you mean nano\?$"):
        list(check_model(EXAMPLE, backbone="nnano"))


def test_the_command_prints_a_line_a_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["check-model", "tests.helpers.broken_centers:BackgroundClass"])
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert stop.value.code == 1 and len(lines) == len(CHECKS)
    assert "ok   shapes" in lines and any(line.startswith("fail prediction: logits are [2, 4, ") for line in lines)
    assert err == "failed: tests.helpers.broken_centers:BackgroundClass: prediction\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["check-model", EXAMPLE, "--options", "[1]"])
    line = "error: --options: needs a mapping, for example '{width: 32}', got '[1]'\n"
    assert stop.value.code == 2 and capsys.readouterr().err == line
