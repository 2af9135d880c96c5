"""Places of addresses, tar files, and what a server that answers badly costs."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.core import remote, shards, storage
from deploy.core.errors import UserError
from deploy.core.files import atomic_path, need_place
from deploy.core.image import image_size, load_image
from deploy.core.image_folder import image_files
from deploy.core.same_files import shared
from tests.helpers.storage_server import S3Server, s3_server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch, tmp_path_factory.mktemp("unused")) as server:
        server.make_bucket("photos")
        yield server


@pytest.fixture
def server(running: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server without faults, and an empty cache."""
    monkeypatch.setenv(storage.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(remote, "_asked", set())
    running.faults.share, running.faults.slow_s, running.faults.refused, running.faults.cut = 0.0, 0.0, (), set()
    return running


def picture(seed: int) -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    stream = BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue(), pixels


def asked_by(server: S3Server, work: object) -> list[str]:
    """What a callable asks of the server."""
    before = len(server.faults.requests)
    work()  # type: ignore[operator]
    return server.faults.requests[before:]


def fails(where: str) -> str:
    with pytest.raises(UserError) as caught:
        storage.fetch(storage.place(where))
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize(
    "where",
    ["s3://bucket/a/b.json", "gs://bucket/b", "https://host:8/a.json?x=1", "s3://bucket/a/t-{00..03}.tar/x/1.jpg"],
)
def test_an_address_and_its_place_lead_to_each_other(cache: Path, where: str) -> None:
    place = storage.place(where)
    assert place.is_relative_to(cache) and storage.url_of(place) == where
    assert storage.place(place) == place == storage.place(Path(where))  # of which Path makes one slash of two
    assert storage.shown(f"error: {place}: no") == f"error: {where}: no"
    assert storage.workplace(where) != place and storage.url_of(storage.workplace(where)) == where


def test_files_of_this_machine_are_what_they_are(cache: Path, tmp_path: Path) -> None:
    for where in ("data/val.json", "rtsp:x", "a:b/c"):
        assert storage.place(where) == Path(where) and storage.url_of(where) is None
    assert storage.place(f"file://{tmp_path}/x.json") == tmp_path / "x.json"
    missing = tmp_path / "missing"
    assert storage.fetch(missing) == missing and not cache.exists()


def test_two_servers_have_two_places(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = storage.place("s3://bucket/a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    second = storage.place("s3://bucket/a")
    assert first != second and storage.url_of(second) == storage.shown(second) == "s3://bucket/a"


@pytest.mark.parametrize("where", ["s3://", "s3:///a", "s3://bucket//a", "s3://bucket/../a"])
def test_no_address(cache: Path, where: str) -> None:
    with pytest.raises(UserError, match=r"names no bucket|has an empty part"):
        storage.place(where)


def test_an_address_needs_the_extra_and_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert fails("gs://bucket/a") == "gs://bucket/a: gs:// needs gcsfs, which is not installed: pip install gcsfs"
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert fails("s3://bucket/a.json") == (
        "s3://bucket/a.json: s3:// needs fsspec, which is not installed: pip install 'compress-detectors[storage]'"
    )


def test_without_an_address_nothing_of_the_extra_is_loaded(tmp_path: Path) -> None:
    data, _ = picture(0)
    (tmp_path / "a.png").write_bytes(data)
    program = (
        "import sys; from pathlib import Path; from deploy.core.image import load_image, image_size\n"
        "from deploy.core.image_folder import image_files; from deploy.core.files import sha256_of\n"
        f"for path in image_files(Path({str(tmp_path)!r})): load_image(path), image_size(path), sha256_of(path)\n"
        "print({'fsspec', 's3fs', 'deploy.core.remote', 'deploy.core.shards'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


# ------------------------------------------------------------------------------------------------ copies


def test_a_file_is_fetched_once_and_again_when_it_changed(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put("photos/once.json", b"[1]")
    place = storage.place("s3://photos/once.json")
    assert asked_by(server, lambda: storage.fetch(place)) == ["HEAD /photos/once.json", "GET /photos/once.json"]
    assert asked_by(server, lambda: storage.fetch(place)) == []
    monkeypatch.setattr(remote, "_asked", set())  # as in another process
    assert asked_by(server, lambda: storage.fetch(place)) == ["HEAD /photos/once.json"]
    server.put("photos/once.json", b"[2]")
    monkeypatch.setattr(remote, "_asked", set())
    assert storage.fetch(place).read_text() == "[2]"
    place.write_text("[9]")  # a copy that somebody changed is none
    monkeypatch.setattr(remote, "_asked", set())
    assert storage.fetch(place).read_text() == "[2]"


def test_a_process_that_was_forked_reads_too(server: S3Server) -> None:
    """As a loader's worker does: what fsspec has in its parent does not work there."""
    names = [f"s3://photos/forked/{number}.png" for number in range(2)]
    for number, name in enumerate(names):
        server.put(name.removeprefix("s3://"), picture(number)[0])
    first, second = map(storage.place, names)
    assert storage.read_bytes(first) == picture(0)[0]
    child = multiprocessing.get_context("fork").Process(target=storage.read_bytes, args=(second,))
    child.start()
    child.join()
    assert child.exitcode == 0 and second.read_bytes() == picture(1)[0]


def test_fsspecs_own_variables_hold(server: S3Server) -> None:
    server.put("photos/by_variable.json", b"[]")
    program = "from deploy.core.storage import *; print(fetch(place('s3://photos/by_variable.json')).read_text())"
    named = {"FSSPEC_S3_ENDPOINT_URL": server.address, "FSSPEC_S3_KEY": "test", "FSSPEC_S3_SECRET": "test"}
    others = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    done = subprocess.run([sys.executable, "-c", program], env=others | named, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_many_at_once_fetch_a_file_once(server: S3Server) -> None:
    server.put("photos/wanted.bin", bytes(range(256)) * 999)
    place = storage.place("s3://photos/wanted.bin")

    def all_at_once() -> None:
        with ThreadPoolExecutor(4) as pool:
            assert len({len(path.read_bytes()) for path in pool.map(storage.fetch, [place] * 4)}) == 1

    assert asked_by(server, all_at_once).count("GET /photos/wanted.bin") == 1


def test_what_is_wrong_is_one_line(server: S3Server) -> None:
    server.put("photos/folder/secret.json", b"{}")
    server.faults.refused = ("secret.json",)
    assert fails("s3://photos/no.json") == "s3://photos/no.json: there is no such key in bucket 'photos'"
    assert fails("s3://nobodys/no.json") == "s3://nobodys/no.json: there is no bucket 'nobodys'"
    assert fails("s3://photos/folder") == "s3://photos/folder: is a folder; name the file"
    assert "secret.json: no permission (Forbidden); credentials come from AWS_" in fails(
        "s3://photos/folder/secret.json"
    )
    assert fails("nosuch://a/b") == "nosuch://a/b: Protocol not known: nosuch"


def test_bad_answers_cost_time_and_nothing_else(server: S3Server) -> None:
    wanted = {f"photos/many/{number}.png": picture(number)[0] for number in range(12)}
    for name, data in wanted.items():
        server.put(name, data)
    server.faults.begin(share=0.1, seed=1)
    server.faults.slow_s, server.faults.cut = 0.005, {"many/7.png"}
    for name, data in wanted.items():
        assert storage.read_bytes(storage.place(f"s3://{name}")) == data
    assert server.faults.injected and server.faults.were_cut == ["/photos/many/7.png"]


def test_half_a_file_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem().pipe_file("/box/whole.bin", b"0123456789")
    get, halves = MemoryFileSystem.get_file, [2, 99]

    def half(self: MemoryFileSystem, name: str, target: str, **options: object) -> None:
        get(self, name, target, **options)
        halves[0] -= 1
        if halves[0] >= 0:
            Path(target).write_bytes(Path(target).read_bytes()[:5])

    monkeypatch.setattr(MemoryFileSystem, "get_file", half)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    place = storage.place("memory://box/whole.bin")
    assert storage.fetch(place).read_bytes() == b"0123456789" and halves[0] < 0
    halves[0] = 99
    MemoryFileSystem().pipe_file("/box/other.bin", b"0123456789")
    error = fails("memory://box/other.bin")
    assert error == "memory://box/other.bin: cannot be reached: 5 bytes came of 10 (tried 5 times)"
    assert not storage.place("memory://box/other.bin").exists()


def test_pictures_are_read_where_they_are_listed(server: S3Server) -> None:
    kept = {f"photos/set/{number:03}.png": picture(number) for number in range(remote.FEW + 2)}
    for name, (data, _) in kept.items():
        server.put(name, data)
    server.put("photos/set/notes.txt", b"-")
    files = image_files(storage.place("s3://photos/set"))
    assert [storage.url_of(file) for file in files] == [f"s3://{name}" for name in kept]
    assert not any(file.exists() for file in files)
    first = next(iter(kept.values()))[1]
    assert image_size(files[0]) == (6, 8) and np.array_equal(load_image(files[0]), first)
    assert asked_by(server, lambda: load_image(files[0])) == []
    versions: list[str | None] = []
    requests = asked_by(server, lambda: versions.extend(storage.refresh([*files, files[0].with_name("no.png")])))
    assert len(requests) == 1 and len(set(versions)) == len(files) + 1 and versions[-1] is None
    data, pixels = picture(99)
    server.put("photos/set/000.png", data)
    assert np.array_equal(load_image(files[0]), first)  # nobody asked
    assert storage.refresh(files)[0] != versions[0] and np.array_equal(load_image(files[0]), pixels)


def test_what_is_made_is_uploaded_once_and_the_manifest_last(server: S3Server, tmp_path: Path) -> None:
    work = storage.workplace("s3://photos/runs/one")
    (work / "a").mkdir(parents=True)
    for name in ("manifest.json", "student.bin", "a/last.ckpt", "a/best-3.ckpt", "run.lock", ".hidden"):
        (work / name).write_text(name)
    written = storage.push(work)
    assert [name.rpartition("/")[2] for name in written] == [
        "best-3.ckpt",
        "student.bin",
        "last.ckpt",
        "manifest.json",
    ]
    assert storage.push(work) == []
    (work / "a/best-3.ckpt").unlink()
    (work / "student.bin").write_text("more")
    assert storage.push(work) == ["s3://photos/runs/one/student.bin"]
    assert "photos/runs/one/a/best-3.ckpt" not in server.names("photos/runs")
    (work / "student.bin").write_text("not uploaded")
    storage.pull(work)
    assert (work / "student.bin").read_text() == "not uploaded"  # nobody else worked there
    server.put("photos/runs/one/student.bin", b"another machine's")
    storage.pull(work)
    assert (work / "student.bin").read_text() == "another machine's"


# ------------------------------------------------------------------------------------------------ tar files


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            row = tarfile.TarInfo(name)
            row.size = len(data)
            archive.addfile(row, BytesIO(data))
    return path


def two_tars(folder: Path) -> dict[str, np.ndarray]:
    kept = {f"day/{number}.png": picture(number) for number in range(5)}
    rows = [(f"./{name}" if name.endswith("0.png") else name, data) for name, (data, _) in kept.items()]
    write_tar(folder / "t-000.tar", dict(rows[:3]))
    write_tar(folder / "t-001.tar", {**dict(rows[3:]), "labels.json": b"{}"})
    return {name: pixels for name, (_, pixels) in kept.items()}


@pytest.mark.parametrize("pattern", ["t-{000..001}.tar", "*.tar", "t-00{0,1}.tar", "t-00?.tar"])
def test_members_of_tar_files_are_pictures(cache: Path, tmp_path: Path, pattern: str) -> None:
    kept = two_tars(tmp_path / "tars")
    folder = storage.place(tmp_path / "tars" / pattern)
    assert storage.is_folder(folder)
    assert [file.relative_to(folder).as_posix() for file in image_files(folder)] == list(kept)
    for name, pixels in kept.items():
        assert np.array_equal(load_image(folder / name), pixels) and image_size(folder / name) == (6, 8)
        assert not (folder / name).exists()
    extracted = storage.fetch(folder / "day/4.png")
    assert np.array_equal(np.array(Image.open(extracted)), kept["day/4.png"])
    with pytest.raises(UserError, match=r"none of its 2 tar files has a member day/9\.png"):
        load_image(folder / "day/9.png")


def test_tar_files_that_change_are_indexed_again(cache: Path, tmp_path: Path) -> None:
    kept = two_tars(tmp_path)
    folder = storage.place(tmp_path / "*.tar")
    before = storage.refresh([folder / name for name in kept])
    data, pixels = picture(77)
    write_tar(tmp_path / "t-001.tar", {"day/3.png": data, "day/4.png": data})
    shards._index.cache_clear()  # as in another process
    after = storage.refresh([folder / name for name in kept])
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False, False]
    assert np.array_equal(load_image(folder / "day/3.png"), pixels)


def test_tar_files_that_cannot_be_used(cache: Path, tmp_path: Path) -> None:
    data, _ = picture(0)
    write_tar(tmp_path / "a-0.tar", {"x.png": data})
    write_tar(tmp_path / "a-1.tar", {"x.png": data})
    with pytest.raises(UserError, match=r"a-0\.tar and .*a-1\.tar: both have a member x\.png; names must be unique"):
        load_image(storage.place(tmp_path / "a-{0..1}.tar") / "x.png")
    whole = write_tar(tmp_path / "b.tar", {"x.png": data, "y.png": data * 400}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"b\.tar: not a plain tar file, or truncated"):
        load_image(storage.place(tmp_path / "b.tar") / "x.png")
    assert not storage.is_folder(storage.place(tmp_path / "c-*.tar"))


@pytest.mark.parametrize("room", [True, False])
def test_tar_files_at_an_address(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool) -> None:
    """They are copied once; where there is no room, a member is a request for its bytes."""
    monkeypatch.setattr(remote, "LOCKS", 1)  # locks that two files share are no trap
    if not room:
        monkeypatch.setattr(shards, "ROOM", 1 << 60)
    kept = two_tars(tmp_path / "tars")
    server.put_folder(tmp_path / "tars", f"photos/tars-{room}")
    folder = storage.place(f"s3://photos/tars-{room}/t-{{000..001}}.tar")
    for name, pixels in kept.items():
        assert np.array_equal(load_image(folder / name), pixels)
    requests = asked_by(server, lambda: load_image(folder / "day/1.png"))
    assert bool(requests) != room
    index = json.loads(next((tmp_path / "cache" / "shards").glob("*/index.json")).read_text())
    assert len(index["files"]) == 2


def test_equal_pictures_are_found_without_fetching_the_others(server: S3Server) -> None:
    same, _ = picture(1)
    for name, data in {"a.png": same, "b.png": same + b"longer", "c.png": same}.items():
        server.put(f"photos/equal/{name}", data)
    a, b, c = (storage.place(f"s3://photos/equal/{name}.png") for name in "abc")
    assert shared([c], [a, b]) == [(c, a)]
    assert (a.exists(), b.exists(), c.exists()) == (True, False, True)


def test_a_name_in_a_file_does_not_lead_out_of_the_cache(cache: Path, tmp_path: Path) -> None:
    two_tars(tmp_path / "tars")
    for folder in ("s3://photos/set", str(tmp_path / "tars" / "*.tar")):
        path = storage.place(folder) / "../../../../out.png"
        for read in (storage.fetch, storage.read_bytes, load_image, image_size):
            with pytest.raises(UserError, match=r"cannot have \.\. in it"):
                read(path)


def test_nothing_is_written_over_a_copy(cache: Path) -> None:
    place = storage.place("s3://photos/val.json")
    with (
        pytest.raises(UserError, match=r"val\.json: is at an address, where --out and --json write"),
        atomic_path(place),
    ):
        pass
    with pytest.raises(UserError, match=r"val\.json: is at an address, where --out and --json write"):
        need_place(place)


def test_files_of_a_web_server(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lists nothing, and says of a file when it changed."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "val.json").write_text("[1]")
    handler = partial(Quiet, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        place = storage.place(f"http://127.0.0.1:{web.server_port}/val.json")
        assert storage.fetch(place).read_text() == "[1]"
        (tmp_path / "site" / "val.json").write_text("[2]")
        os.utime(tmp_path / "site" / "val.json", (1e9, 1e9))
        assert storage.fetch(place, anew=True).read_text() == "[2]"
        assert storage.is_folder(place.parent / "images")
        missing = place.with_name("no.json")
        assert not storage.is_file(missing)
        assert fails(f"{storage.url_of(missing)}") == f"{storage.url_of(missing)}: nothing is there"
        web.shutdown()
        thread.join()
