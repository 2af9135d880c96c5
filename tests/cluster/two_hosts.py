"""Two hosts on this machine: network namespaces with a cable between them, and a name each.

with TwoHosts() as hosts:
    process = hosts.start("a", ["python", "-m", ...])
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache

ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
_MAKE = """
set -e
ip link set lo up
mount -t tmpfs none /run
for host in a b; do ip netns add $host; ip -n $host link set lo up; done
ip link add wire-a netns a type veth peer name wire-b netns b
ip -n a address add 10.77.0.1/24 dev wire-a
ip -n b address add 10.77.0.2/24 dev wire-b
ip -n a link set wire-a up
ip -n b link set wire-b up
echo ready
exec cat
"""


class TwoHosts:
    """The namespaces live as long as the shell that has made them."""

    def __enter__(self) -> TwoHosts:
        self._shell = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", _MAKE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._shell.stdout is not None and self._shell.stderr is not None
        if self._shell.stdout.readline().strip() != "ready":
            raise OSError(self._shell.stderr.read())
        return self

    def __exit__(self, *error: object) -> None:
        self._shell.communicate()

    def start(
        self, host: str, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """A command on a host."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"host-{host}"]
        return subprocess.Popen(
            [*self._inside(), "--wd=" + os.getcwd(), "ip", "netns", "exec", host, *named, *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": f"wire-{host}",
                 "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # sharing it, an agent that comes later gets no address
                 **(environment or {})},
        )  # fmt: skip

    def kill(self, host: str) -> None:
        """All processes of a host at once, as when it loses its power."""
        command = [*self._inside(), "ip", "netns", "pids", host]
        for pid in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self._shell.pid), "--user", "--net", "--mount", "--preserve-credentials"]


@cache
def missing() -> str | None:
    """Why there cannot be two hosts here; None: there can."""
    listen = (
        "import socket; s = socket.create_server(('', 7)); print('up', flush=True); s.accept()[0].sendall(b'hello')"
    )
    a = ADDRESSES["a"], 7
    ask = f"import socket; print(socket.create_connection({a}).recv(5).decode(), socket.gethostname())"
    try:
        with TwoHosts() as hosts:
            first = hosts.start("a", [sys.executable, "-c", listen])
            assert first.stdout is not None
            up = first.stdout.readline()
            said = hosts.start("b", [sys.executable, "-c", ask]).communicate()[0] if up == "up\n" else up
            first.kill()
    except OSError as error:
        return str(error).strip() or "no namespaces"
    return None if said == "hello host-b\n" else said


def torchrun(host: str, *arguments: str, restarts: int = 0) -> list[str]:
    """The command of a host: one process of two; they meet at the first host."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint={ADDRESSES['a']}:29400", f"--local-addr={ADDRESSES[host]}", "--rdzv-id=run",
        f"--rdzv-conf=is_host={int(host == 'a')},join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=2",
        "--monitor-interval=5", f"--max-restarts={restarts}", "-m", *arguments,
    ]  # fmt: skip
