"""The manifests for Kubernetes, against the schemas of the resources that they ask for.

`golden/manifests.json` holds, of the published schemas, the part that the manifests use, with where it comes from; what
is not in it is an unknown field. With CRDS=<folder of rayjobs.yaml and inferenceservices.yaml> the whole ones are used.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from typer.main import get_command

from compress.cli.app import app

ROOT = Path(__file__).parents[1]
USED = json.loads((ROOT / "tests" / "golden" / "manifests.json").read_text(encoding="utf-8"))
NAMES = sorted(USED)


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker" / f"{name}.yaml").read_text(encoding="utf-8"))


def schema(name: str) -> dict[str, Any]:
    if "CRDS" not in os.environ:
        return USED[name]["schema"]
    definition = yaml.safe_load((Path(os.environ["CRDS"]) / f"{USED[name]['kind'].lower()}s.yaml").read_text())
    version = next(row for row in definition["spec"]["versions"] if row["name"] == USED[name]["version"])
    return version["schema"]["openAPIV3Schema"]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_resource_takes(name: str) -> None:
    content = manifest(name)
    assert content["apiVersion"] == f"{USED[name]['group']}/{USED[name]['version']}"
    assert content["kind"] == USED[name]["kind"]
    assert [error.message for error in Draft7Validator(schema(name)).iter_errors(content)] == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_field_is_seen(name: str) -> None:
    part = copy.deepcopy(manifest(name))
    spec = part["spec"]["rayClusterSpec"]["headGroupSpec"] if name == "kuberay" else part["spec"]["predictor"]
    spec["maxReplicas"] = "many"
    assert [error.message for error in Draft7Validator(schema(name)).iter_errors(part)] or "CRDS" in os.environ


def test_the_commands_have_these_options() -> None:
    job = shlex.split(manifest("kuberay")["spec"]["entrypoint"])
    (container,) = manifest("kserve")["spec"]["predictor"]["containers"]
    for words in (job[1:], container["args"]):
        command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


def test_both_run_in_the_images_that_are_built_here() -> None:
    images = {path.stem for path in (ROOT / "docker").glob("*.Dockerfile")}
    containers = manifest("kserve")["spec"]["predictor"]["containers"]
    cluster = manifest("kuberay")["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        containers += group["template"]["spec"]["containers"]
    assert {row["image"] for row in containers} == {f"compress-{name}" for name in images}
