"""Work on a Ray cluster: the items of a list go to actors by Ray Data, and their results come back in the list's order.

    for result in map_in_order(Cluster(actors=4), make_worker, items):
        ...

Ray starts, restarts and feeds the actors. What comes back does not depend on how many there are, nor on which of them
died on the way: an item whose actor or node is killed goes to another one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import pickle
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from deploy.core import storage
from deploy.core.errors import UserError, first_line
from deploy.core.import_path import import_extra

Item = TypeVar("Item")
Result = TypeVar("Result")

TRIES = 5
"""So often may the process die that works on an item, before the item is what is wrong."""


@dataclass(frozen=True)
class Cluster:
    """Which cluster, and how much of it."""

    address: str | None = None
    """`auto`, the cluster of this machine, or host:port of a head; None: that of RAY_ADDRESS, or else Ray is started
    here."""
    actors: int | None = None
    """Most workers at once; None: as many as the cluster has room for when the work begins."""
    num_cpus: float = 1.0
    """Processors for each."""
    num_gpus: float | None = None
    """GPUs for each, which may be a part of one; None: one where the cluster has GPUs, else none."""
    images: int = 64
    """Images in a piece of work, about; what a worker that dies takes with it, to be done again."""


def need_ray(cluster: Cluster) -> None:
    """Raise UserError unless Ray is installed, and something listens at the cluster's address, for which Ray itself
    would wait a quarter of an hour; before other work."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("ray is not installed: pip install 'compress-detectors[ray]'")
    address = _address(cluster)
    if address is None or address == "auto":
        return
    if "://" in address:
        raise UserError(
            f"ray: {address}: give auto, or host:port of the cluster's head; Ray Client is not supported: start the "
            "command on a machine of the cluster, for example by ray job submit"
        )
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()):
        raise UserError(f"ray: '{address[:60]}' is not the address of a cluster; give auto, or host:port of its head")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray: {address}: nothing answers there ({first_line(error)}); give host:port of the cluster's head, whose "
            "port is 6379 unless it was started with another"
        ) from error


def map_in_order(
    cluster: Cluster, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]
) -> Iterator[Result]:
    """The results of `make()(item)` for every item, in their order, while later ones are worked on.

    Args:
        make: builds the worker, once in each actor; with what it holds it must be picklable, as items and results.
        items: pieces of some seconds of work each; they lie in Ray's object store until they are done.

    Raises:
        UserError: what a worker raised, the first in the order of the items; Ray is not installed or not reached; no
            place for an actor; an item whose workers died `TRIES` times; a node has another version of this project.
    """
    import_extra("ray.data", "ray", "ray[data]")
    with connected(cluster) as ray, _quiet(ray):
        yield from _results(ray, cluster, make, items)


@contextmanager
def connected(cluster: Cluster, *, show: bool = False) -> Iterator[Any]:
    """Ray, connected; a connection, or a Ray, that was made here is ended.

    show: what the processes on the cluster print. Raises UserError: Ray is not installed or not reached."""
    ray = import_extra("ray", "ray")
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it calls every restart of a worker an error
    address = _address(cluster)
    here = {} if address else {"include_dashboard": False}
    try:
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            logging_config=ray.LoggingConfig(log_level="ERROR"),
            log_to_driver=show,
            **here,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        hint = "" if address in (None, "auto") else "; a cluster with a token needs RAY_AUTH_MODE=token here as well"
        raise UserError(f"ray: {address or 'Ray cannot be started here'}: {first_line(error)}{hint}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def room(ray: Any, cluster: Cluster, wanted: int | None, *, all_at_once: bool = False) -> tuple[float, int]:
    """GPUs for each process, and how many processes the connected cluster has room for; a note is printed where more
    are wanted of one that was given by its address, which may grow, and shows only what it has.

    wanted: None: as many as there is room for. all_at_once: fewer will not do.

    Raises UserError where there will never be room.
    """
    have = ray.cluster_resources()
    gpus = cluster.num_gpus if cluster.num_gpus is not None else float(have.get("GPU", 0) > 0)
    shares = {"CPU": cluster.num_cpus, "GPU": gpus}
    fit = min(int(have.get(kind, 0) / share + 1e-6) for kind, share in shares.items() if share > 0)
    needed = wanted if wanted is not None and (all_at_once or _address(cluster) is not None) else 1
    if fit >= needed:
        return gpus, fit
    found = ", ".join(f"{have.get(kind, 0):g} {kind}" for kind in shares)
    line = (
        f"ray: room for {fit} of {needed} processes: each is to have {cluster.num_cpus:g} CPU and {gpus:g} GPU, the "
        f"cluster has {found}"
    )
    if wanted is None or _address(cluster) is None:
        raise UserError(f"{line}; change --num-cpus or --num-gpus, or ask for as many of a cluster that will grow")
    print(f"{line}; {'all wait' if all_at_once or not fit else 'the others wait'} until it grows", flush=True)
    return gpus, fit


def place() -> dict[str, str]:
    """What `take_place` needs to know of this process."""
    return {"folder": os.getcwd(), "cache": str(storage.cache_folder())}


def take_place(folder: str, cache: str) -> None:
    """Let relative paths, modules of the working directory and the places of addresses mean in this process what they
    mean in the one that `place` describes. Raises OSError where its working directory is not there."""
    os.environ[storage.CACHE] = cache
    os.chdir(folder)


# --- details --------------------------------------------------------------------------------------------


def _address(cluster: Cluster) -> str | None:
    """Of a cluster that runs already."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


class _Tries:
    """How often each piece was begun: Ray itself begins again for ever."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self._begun[number] += 1
        return self._begun[number]


class _Actor:
    """What runs in an actor. A UserError, of the worker's making too, is a result like others: it stops the work where
    it stands in the order, and Ray does not try it again."""

    def __init__(self, pickled: bytes, version: str, tries: Any, there: dict[str, str]) -> None:
        with suppress(OSError):  # without it, absolute paths and addresses still do
            take_place(**there)
        self._work: Callable[[Any], Any] | None = None
        self._tries = tries
        try:
            if _version() != version:
                raise UserError(
                    f"ray: node {os.uname().nodename} has version {_version()} of compress-detectors, "
                    f"this command {version}; install one version on all"
                )
            self._work = pickle.loads(pickled)()
        except UserError as error:
            self._broken = str(error)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[bytes]]:
        results = map(self._one, batch["number"], batch["item"])
        return {"result": [pickle.dumps(result, pickle.HIGHEST_PROTOCOL) for result in results]}

    def _one(self, number: int, pickled: bytes) -> Any:
        if self._work is None:
            return _Broken(self._broken)
        if self._begin(int(number)) > TRIES:
            return _Broken(
                f"ray: {TRIES} workers died at piece {number + 1} of the work; memory is the usual reason: give fewer "
                "--actors or a smaller --batch"
            )
        try:
            return self._work(pickle.loads(pickled))
        except UserError as error:
            return _Broken(str(error))

    def _begin(self, number: int) -> int:
        ray = import_extra("ray", "ray")
        try:
            return int(ray.get(self._tries.begin.remote(number)))
        except ray.exceptions.RayError:  # the counter was on a node that went: it is a first try
            return 1


@dataclass(frozen=True)
class _Broken:
    """The message of a UserError that a worker raised."""

    message: str


def _version() -> str:
    return importlib.metadata.version("compress-detectors")


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray Data in the order of the items, without its own progress display and notes."""
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_options.preserve_order
    log = logging.getLogger("ray.data")
    level = log.level
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_options.preserve_order = before
        log.setLevel(level)


def _results(ray: Any, cluster: Cluster, make: Callable[[], Any], items: Sequence[Any]) -> Iterator[Any]:
    if not items:
        return
    num_gpus, fit = room(ray, cluster, cluster.actors)
    grows = _address(cluster) is not None
    wanted = fit if cluster.actors is None else cluster.actors if grows else min(cluster.actors, fit)
    actors = min(wanted, len(items))
    rows = [{"number": n, "item": pickle.dumps(item, pickle.HIGHEST_PROTOCOL)} for n, item in enumerate(items)]
    tries = ray.remote(num_cpus=0, max_restarts=-1)(_Tries).remote()
    # A block holds one item: blocks are what Ray retries, and items are large enough.
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        fn_constructor_args=(ray.cloudpickle.dumps(make), _version(), tries, place()),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
        num_cpus=cluster.num_cpus,
        num_gpus=num_gpus,
    )
    for batch in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch["result"].to_pylist():
            result = pickle.loads(row)
            if isinstance(result, _Broken):
                raise UserError(result.message)
            yield result
