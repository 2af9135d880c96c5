"""What a Triton kernel compiles to, without a GPU: registers, local memory, and the widths of its global accesses.

    builds = [Build("kernels.triton.iou_loss", "_kernel", {"x": "*fp32", "n": "i32", "BLOCK": 128}, aligned=("x",))]
    for result in inspect(builds, targets):  # every build for every target
        assert result.local == 0 and set(result.loads) == {128}

The kernels are compiled in a process of its own, because the test process may run Triton's interpreter. ptxas and
the disassembler are those of the Triton wheel.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SHORT, LONG = (90,), (75, 80, 89, 100, 120)
"""Compute capabilities: that of `make test`, and the rest."""

by_targets = pytest.mark.parametrize(
    "targets", [SHORT, pytest.param(LONG, marks=pytest.mark.exhaustive)], ids=["one target", "the others"]
)
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Build:
    """A kernel and what it is specialised for.

    module, kernel: where the `@triton.jit` function is.
    arguments: by name and in any order; "*fp32", "*bf16", "*i64", "i32", "fp32", ... for what is passed at run time,
        anything else (numbers, booleans, None) for a constexpr. A string constexpr is written ("constexpr", "text").
    aligned: arguments divisible by 16, as the launcher finds pointers of fresh tensors and such sizes.
    """

    module: str
    kernel: str
    arguments: dict[str, Any]
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    only: tuple[int, ...] = ()
    """Compute capabilities that it is compiled for; empty: all that are asked for."""


@dataclasses.dataclass(frozen=True)
class Inspected:
    """registers a thread; bytes of stack and local memory a thread; `local_instructions`: loads and stores of
    local memory (spills are among them); loads and stores: {bits of one access of global memory: instructions}
    (asynchronous copies count as loads); atomics: instructions; shared: bytes."""

    build: Build
    target: int
    registers: int
    local: int
    local_instructions: int
    loads: dict[int, int]
    stores: dict[int, int]
    atomics: int
    shared: int

    def __str__(self) -> str:
        return (
            f"{self.build.kernel} {self.build.arguments} sm_{self.target}: {self.registers} registers, "
            f"{self.local} bytes and {self.local_instructions} instructions of local memory, "
            f"loads {self.loads}, stores {self.stores}, atomics {self.atomics}, shared {self.shared}"
        )


def inspect(builds: list[Build], targets: tuple[int, ...]) -> list[Inspected]:
    """Compile and disassemble every build for every target.

    Raises:
        RuntimeError: a kernel does not compile; the message is the compiler's.
    """
    work = json.dumps({"builds": [dataclasses.asdict(build) for build in builds], "targets": targets})
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kernel_sass"],
        input=work,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])},
        check=False,
    )
    if process.returncode:
        raise RuntimeError(process.stderr)
    rows = json.loads(process.stdout.splitlines()[-1])
    return [
        Inspected(
            build=builds[row.pop("index")],
            loads={int(bits): count for bits, count in row.pop("loads").items()},
            stores={int(bits): count for bits, count in row.pop("stores").items()},
            **row,
        )
        for row in rows
    ]


# --- the compiling process ------------------------------------------------------------------------------------------

_RUNTIME_TYPE = re.compile(r"\*?(i1|[iu](8|16|32|64)|fp16|bf16|fp32|fp64)$")
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


def main() -> None:
    work = json.load(sys.stdin)
    rows = []
    for index, build in enumerate(work["builds"]):
        for target in [target for target in work["targets"] if target in (build["only"] or work["targets"])]:
            rows.append({"index": index, "target": target, **_measure(_cubin(build, target))})
    print(json.dumps(rows))


def _cubin(build: dict[str, Any], target: int) -> bytes:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(build["module"]), build["kernel"])
    signature, constants = {}, {}
    for name in function.arg_names:
        value = build["arguments"][name]
        if isinstance(value, str) and _RUNTIME_TYPE.match(value):
            signature[name] = value
        else:
            signature[name] = "constexpr"
            constants[name] = value[1] if isinstance(value, list) else value
    unknown = set(build["arguments"]) - set(function.arg_names)
    if unknown:
        raise TypeError(f"{build['kernel']} has no arguments {sorted(unknown)}")
    attributes = {(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in build["aligned"]}
    compiled = triton.compile(
        ASTSource(function, signature, constants, attributes),
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": build["num_warps"], "num_stages": build["num_stages"]},
    )
    return compiled.asm["cubin"]


def _measure(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    used = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    opcodes = Counter(match.group(1) for match in _OPCODE.finditer(code))
    if not any(op.startswith("EXIT") for op in opcodes):
        raise RuntimeError("the disassembly has no instructions: its format is not the one read here")

    def widths(*kinds: str) -> Counter[int]:
        found: Counter[int] = Counter()
        for op, count in opcodes.items():
            if op.split(".")[0] in kinds:
                found[_bits(op)] += count
        return found

    def number(*kinds: str) -> int:
        return sum(count for op, count in opcodes.items() if op.split(".")[0] in kinds)

    return {
        "registers": int(used["REG"]),
        "local": int(used["STACK"]) + int(used["LOCAL"]),
        "local_instructions": number("LDL", "STL"),
        "loads": widths("LDG", "LDGSTS", "LD"),
        "stores": widths("STG", "ST"),
        "atomics": number("ATOM", "ATOMG", "RED", "REDG"),
        "shared": int(used["SHARED"]),
    }


def _bits(opcode: str) -> int:
    """Width of one access of a thread: `LDG.E.128.CONSTANT` → 128; without a width 32."""
    for modifier in opcode.split(".")[1:]:
        if modifier in ("64", "128", "256"):
            return int(modifier)
        if match := re.fullmatch(r"[USI](8|16)", modifier):
            return int(match.group(1))
    return 32


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
