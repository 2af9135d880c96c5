"""Decoders in C++ and JavaScript: the detections of the one in NumPy, on the same outputs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from deploy.core.card import Form, Heads, ModelCard
from deploy.core.heads import decode
from deploy.targets.table import DECODERS

CARD = ModelCard(
    name="x", class_names=list("abc"), category_ids=[1, 2, 3], input_size=(64, 96), max_detections=40, candidates=150
)
CASES = {
    "gfl": Heads(strides=[8, 16, 32, 64, 128], bins=17),
    "offset": Heads(strides=[8, 16], bins=5, offset=0.5),
    "fcos": Heads(strides=[8, 16, 32, 64, 128], bins=1, fitted=True, centerness=True),
    "ties": Heads(strides=[8, 16], bins=1),
}
PROGRAM = """
#include "decode.hpp"
#include <cstdio>
#include <iostream>
int main() {
    heads::Model m;
    std::size_t levels;
    std::cin >> m.height >> m.width >> m.classes >> m.bins >> m.offset >> m.fitted >> m.centerness >> m.score_threshold
        >> m.nms_threshold >> m.max_detections >> m.candidates >> levels;
    m.strides.resize(levels);
    for (int& stride : m.strides) std::cin >> stride;
    std::vector<std::vector<float>> values(levels * (m.centerness ? 3 : 2));
    std::vector<const float*> outputs;
    for (auto& one : values) {
        std::size_t count;
        std::cin >> count;
        one.resize(count);
        for (float& value : one) std::cin >> value;
        outputs.push_back(one.data());
    }
    for (const heads::Detection& d : heads::decode(outputs, m))
        std::printf("%.9g %.9g %.9g %.9g %.9g %d\\n", d.box[0], d.box[1], d.box[2], d.box[3], d.score, d.label);
}
"""
SCRIPT = """
import { readFileSync } from "node:fs";
import { decode } from "./decode.mjs";
const { card, outputs } = JSON.parse(readFileSync(0, "utf8"));
for (const name of Object.keys(outputs)) outputs[name] = Float32Array.from(outputs[name]);
for (const { box, score, label } of decode(outputs, card)) console.log(...box, score, label);
"""


def case(name: str) -> tuple[list[np.ndarray], ModelCard]:
    """Random outputs with crowds. `ties` has many equal scores and boxes, boxes without an area, and scores and
    overlaps that are as large as the thresholds."""
    heads, rng = CASES[name], np.random.default_rng(0)
    channels = {"cls": 3, "box": 4 * heads.bins, "ctr": 1}
    outputs = []
    for output in heads.names:
        kind, _, stride = output.partition("_")
        values = rng.normal(size=(1, channels[kind], -(-64 // int(stride)), -(-96 // int(stride)))) * 2 - (
            kind == "cls"
        )
        if heads.bins == 1 and kind == "box":
            values = np.abs(values)
        outputs.append((np.round(values) if name == "ties" else values).astype(np.float32))
    thresholds = {"score_threshold": 0.5, "nms_threshold": 0.5, "max_detections": 100} if name == "ties" else {}
    form = Form(batch=1, images="float32", heads=heads)
    return outputs, CARD.model_copy(update={"form": form, **thresholds})


def check(lines: str, name: str) -> None:
    boxes, scores, labels, count = decode(*case(name))
    found = np.array([line.split() for line in lines.splitlines()], float)
    assert len(found) == count[0] >= 10
    np.testing.assert_array_equal(found[:, 5], labels[0, : count[0]])
    np.testing.assert_allclose(found[:, 4], scores[0, : count[0]], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[:, :4], boxes[0, : count[0]], rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "main.cpp").write_text(PROGRAM)
    words = [compiler, "-std=c++11", "-Wall", "-Wextra", "-Werror", "-O1", "-ffp-contract=off", f"-I{DECODERS}"]
    subprocess.run([*words, "main.cpp", "-o", "main"], cwd=folder, check=True)
    return folder / "main"


@pytest.mark.parametrize("name", CASES)
def test_cpp(name: str, program: Path) -> None:
    outputs, card = case(name)
    heads = CASES[name]
    words = [
        *card.input_size,
        len(card.class_names),
        heads.bins,
        heads.offset,
        int(heads.fitted),
        int(heads.centerness),
    ]
    words += [card.score_threshold, card.nms_threshold, card.max_detections, card.candidates]
    words += [len(heads.strides), *heads.strides]
    given = [f"{value.size} " + " ".join(f"{number:.9g}" for number in value.ravel()) for value in outputs]
    text = "\n".join([" ".join(map(str, words)), *given])
    check(subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout, name)


@pytest.mark.parametrize("name", CASES)
def test_javascript(name: str, tmp_path: Path) -> None:
    node = shutil.which("node") or pytest.skip("node is not installed")
    outputs, card = case(name)
    shutil.copy(DECODERS / "decode.mjs", tmp_path)
    (tmp_path / "main.mjs").write_text(SCRIPT)
    values = {key: value.ravel().tolist() for key, value in zip(CASES[name].names, outputs, strict=True)}
    text = json.dumps({"card": json.loads(card.model_dump_json()), "outputs": values})
    done = subprocess.run([node, tmp_path / "main.mjs"], input=text, capture_output=True, text=True, check=True)
    check(done.stdout, name)
