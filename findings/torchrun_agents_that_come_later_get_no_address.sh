#!/usr/bin/env bash
# torch 2.14.1, torchrun (torch.distributed.run) with --rdzv-backend=c10d, two agents and --max-restarts=3.
# Expected: of two hosts one dies, with its agent, and comes back; its new agent joins the next round of the rendezvous,
# and the training goes on on both. That is what restarts are for.
# Happens: the agent that stayed has kept what it said about the store of the first round, and says it to nobody again;
# the new one waits for MASTER_ADDR until its reads run out of time, and both end with a DistStoreError. That is the
# default since the store of the rendezvous is shared with the training; TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 mends it.
# Seen:
#   store shared (default): goes on: False, the late agent waited for MASTER_ADDR
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: goes on: True, exit codes [0, 0]
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q torch==2.14.1 numpy
cd "$venv"
"$venv/bin/python" - <<'PYTHON'
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRAINER = """
import os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
dist.init_process_group("gloo")
print("round", file=open(Path(sys.argv[1]) / f"of-{os.environ['GROUP_RANK']}", "a"))
end = Path(sys.argv[1]) / "end"
while True:
    stop = torch.tensor([float(end.exists())])
    dist.all_reduce(stop)
    if stop:
        break
    time.sleep(0.2)
dist.destroy_process_group()
"""


def agent(folder: Path, port: int, name: str, share: bool) -> subprocess.Popen:
    conf = "join_timeout=60,read_timeout=15,keep_alive_interval=1,keep_alive_max_attempt=2"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3",
        "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=run", "--local-addr=localhost",
        f"--rdzv-conf={conf},is_host={int(name == 'first')}", "--monitor-interval=5", str(folder / "trainer.py"), str(folder),
    ]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=open(folder / f"{name}.log", "a"), start_new_session=True,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0" if share else "1", "OMP_NUM_THREADS": "1"},
    )


def rounds(folder: Path) -> int:
    """Rounds that both have begun."""
    files = [folder / "of-0", folder / "of-1"]
    return min(len(file.read_text().splitlines()) if file.exists() else 0 for file in files)


def trial(port: int, share: bool) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "trainer.py").write_text(TRAINER)
        first, second = (agent(folder, port, name, share) for name in ("first", "second"))
        while rounds(folder) < 1:
            time.sleep(0.2)
        mine = subprocess.run(["pgrep", "-P", str(second.pid)], capture_output=True, text=True).stdout.split()
        for pid in (second.pid, *map(int, mine)):
            os.kill(pid, signal.SIGKILL)
        second.wait()
        second = agent(folder, port, "second", share)
        deadline = time.time() + 90
        while rounds(folder) < 2 and first.poll() is None and time.time() < deadline:
            time.sleep(0.2)
        goes_on = rounds(folder) >= 2
        (folder / "end").touch()
        if not goes_on:
            second.wait()
        codes = [process.wait() for process in (first, second)]
        words = [line for line in (folder / "second.log").read_text().splitlines() if "DistStoreError" in line]
        keys = words[-1].rsplit("/", 1)[-1] if words and not goes_on else ""
        return f"goes on: {goes_on}, the late agent waited for {keys}" if keys else f"goes on: {goes_on}, exit codes {codes}"


found = [trial(29511, True), trial(29512, False)]
print("store shared (default):", found[0])
print("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1:", found[1])
sys.exit(found != ["goes on: False, the late agent waited for MASTER_ADDR", "goes on: True, exit codes [0, 0]"])
PYTHON
