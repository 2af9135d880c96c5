"""A command of the project on a Ray cluster, as a process of its own.

    python -m tests.cluster.driver label WORLD OUT '{"actors": 2, ...}'     # pseudo labels; the rest is a Cluster
    python -m tests.cluster.driver cluster                                  # a head and a node of one CPU each
    python -m tests.cluster.driver compress SECONDS train RECIPE …          # a command that records every step; on host
                                                                            # b reading an image takes SECONDS longer

The cluster prints the address of its head, then its node goes without a word when a line comes in.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from compress import cli
from compress.data.coco import CocoDetection
from compress.pseudo.images import images_in
from compress.training import loop, pace
from deploy.core.on_ray import Cluster
from tests.helpers.random_teacher import make


def label(world: Path, out: Path, options: dict[str, Any]) -> None:
    images = images_in(world / options.pop("images_in", "images"))
    make(
        world,
        out,
        images=images,
        cluster=Cluster(**options),
        skip_unreadable=True,
        resume=True,
        device=None,
    )


def cluster() -> None:
    import ray.cluster_utils

    made = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = made.add_node(num_cpus=1)
    print(made.address, flush=True)
    sys.stdin.readline()
    made.remove_node(node, allow_graceful=False)
    print("gone", flush=True)
    sys.stdin.readline()
    made.shutdown()


def compress(slower: float, arguments: list[str]) -> None:
    def slowly(self: CocoDetection, index: int) -> Tensor:
        time.sleep(slower)
        return read(self, index)

    read = CocoDetection.image
    if socket.gethostname() == "host-b" and slower:
        CocoDetection.image = slowly  # type: ignore[method-assign]
    loop.LOG_EVERY, pace.WINDOW = 1, 10
    sys.argv = ["compress", *arguments]
    cli.main()


if __name__ == "__main__":
    if sys.argv[1] == "cluster":
        cluster()
    elif sys.argv[1] == "compress":
        compress(float(sys.argv[2]), sys.argv[3:])
    else:
        label(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
