"""Labelling with tiny random teachers: the file, sharding, interruption, thresholds, mistakes, memory."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from compress import cli
from compress.data.batch import ImageSize
from compress.data.check import check
from compress.data.coco import CocoDetection
from compress.data.transforms import eval_transform
from compress.detectors.checkpoints import load_detector
from compress.pseudo import find, parts
from compress.pseudo.images import images_in, read_chunks
from compress.pseudo.label import Labelled
from compress.pseudo.parts import Shard, part_file, parts_folder
from compress.pseudo.settings import Settings
from deploy.core.errors import LocalUserError, UserError
from deploy.core.files import sha256_of
from tests.helpers.random_teacher import interrupt_after, make, teacher

SIZES = [(64, 48), (40, 60), (90, 50), (64, 48), (64, 64), (70, 41), (48, 64), (64, 48), (64, 48), (40, 60), (64, 64)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images (some in a folder below), two teachers, and the file that one process makes in one go."""
    folder = tmp_path_factory.mktemp("pseudo")
    rng = np.random.default_rng(0)
    (folder / "images" / "more").mkdir(parents=True)
    for index, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
        picture.save(folder / "images" / ("more" if index % 3 == 0 else "") / f"{index:02}.png")
    teacher(folder / "a.safetensors", ("cat", "dog"), 1)
    teacher(folder / "b.safetensors", ("person", "kitten"), 2)
    make(folder, folder / "whole.json")
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_file(world: Path) -> None:
    document = read(world / "whole.json")
    assert [row["name"] for row in document["categories"]] == ["cat", "dog", "person"]
    assert [row["file_name"] for row in document["images"]] == images_in(world / "images").names
    assert sorted((row["width"], row["height"]) for row in document["images"]) == sorted(SIZES)
    info = document["info"]
    assert info["coverage"] == [1, 2, 3]
    provenance = info["pseudo_labels"]
    assert [row["sha256"] for row in provenance["teachers"]] == [sha256_of(world / f"{x}.safetensors") for x in "ab"]
    assert provenance["tau"] == {"cat": 0.6, "dog": 0.6, "person": 0.6}
    labels = [row for row in document["annotations"] if not row["iscrowd"]]
    regions = [row for row in document["annotations"] if row["iscrowd"]]
    assert len(labels) > 20 and len(regions) > 20
    assert {row["category_id"] for row in labels} == {1, 2, 3}
    assert min(row["score"] for row in labels) >= 0.6 and not any(row["ignore"] for row in labels)
    assert all(0.5 <= row["score"] <= 0.6 and row["ignore"] for row in regions)
    assert [row["id"] for row in document["annotations"]] == list(range(1, len(labels) + len(regions) + 1))


def test_others_can_read_it(world: Path) -> None:
    coco = COCO(str(world / "whole.json"))
    dataset = CocoDetection(world / "whole.json", world / "images", eval_transform(64, 96))
    document = read(world / "whole.json")
    assert len(coco.getAnnIds(iscrowd=True)) == sum(row["iscrowd"] for row in document["annotations"])
    assert sum(int((~target.ignore).sum()) for _, target in (dataset[i] for i in range(len(dataset)))) > 20
    assert not check(world / "whole.json", world / "images").errors


def test_labels_are_what_the_teacher_finds(world: Path, tmp_path: Path) -> None:
    """One teacher, one image at a time and through the detector alone, against batches."""
    make(world, tmp_path / "a.json", teachers=[str(world / "a.safetensors")], table={})
    document = read(tmp_path / "a.json")
    detector, _ = load_detector(world / "a.safetensors")
    transform = eval_transform(64, 96)
    for row in document["images"]:
        pixels = torch.from_numpy(np.array(Image.open(world / "images" / row["file_name"]))).permute(2, 0, 1)
        image, *_ = transform(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.bool))
        size = (int(image.shape[1]), int(image.shape[2]))
        canvas = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
        canvas = canvas.repeat(1, 1, -(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
        canvas[0, :, : size[0], : size[1]] = image
        (found,) = detector.decode(detector(canvas), [ImageSize(size, (row["height"], row["width"]))])
        wanted = found.scores >= 0.6
        mine = [a for a in document["annotations"] if a["image_id"] == row["id"] and not a["iscrowd"]]
        boxes = torch.cat((found.boxes[:, :2], found.boxes[:, 2:] - found.boxes[:, :2]), 1)[wanted]
        assert [a["category_id"] - 1 for a in mine] == found.labels[wanted].tolist()
        np.testing.assert_allclose([a["score"] for a in mine], found.scores[wanted].detach(), atol=1e-4)
        np.testing.assert_allclose(np.array([a["bbox"] for a in mine]).reshape(-1, 4), boxes.detach(), atol=0.03)


@pytest.mark.parametrize("count", [2, 7])  # 7 shards of 6 chunks: one has nothing to do
def test_any_number_of_shards_makes_the_same_file(world: Path, tmp_path: Path, count: int) -> None:
    out = tmp_path / "sharded.json"
    order = list(reversed(range(count)))
    for index in order[:-1]:
        assert make(world, out, shard=Shard(index, count)) is None and not out.exists()
    assert make(world, out, shard=Shard(order[-1], count)) is not None
    assert out.read_bytes() == (world / "whole.json").read_bytes()
    assert not parts_folder(out).exists()


def test_a_killed_run_goes_on_to_the_same_bytes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves a beginning of the part: here one ends after the header, one within a line, one after a line."""
    out = tmp_path / "killed.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        make(world, out)
    assert not out.exists()
    part = part_file(out, Shard(0, 1))
    left = part.read_bytes()
    ends = [index + 1 for index, byte in enumerate(left) if byte == ord("\n")]
    assert len(ends) == 5
    with pytest.raises(UserError, match="unfinished run; --resume continues"):
        make(world, out)
    for size in (ends[0], ends[2] - 1, len(left)):
        parts_folder(out).mkdir(exist_ok=True)
        part.write_bytes(left[:size])
        seen: list[int] = []

        def counting(images: Any, numbers: Any, seen: list[int] = seen, **options: Any) -> Any:
            seen.extend(numbers)
            return read_chunks(images, numbers, **options)

        with monkeypatch.context() as patch:
            patch.setattr(find, "read_chunks", counting)
            make(world, out, resume=True)
        assert seen == list(range(sum(end <= size for end in ends) - 1, 6))  # nothing is done twice
        assert out.read_bytes() == (world / "whole.json").read_bytes()
        out.unlink()


def test_a_part_without_a_chunk_holds_nobody_up(world: Path, tmp_path: Path) -> None:
    """A wrong folder is noticed at the first image; the right one needs no --resume, and may have other shards."""
    out, right = tmp_path / "out.json", images_in(world / "images")
    wrong = replace(right, folder=tmp_path)
    for index in range(2):
        with pytest.raises(
            UserError, match=r"png: the file is missing; --skip-unreadable, or pseudo_labels\.skip_unreadable in"
        ):
            make(world, out, images=wrong, shard=Shard(index, 2), table={"kitten": "dog"})
    assert len(list(parts_folder(out).iterdir())) == 2
    make(world, out)
    assert out.read_bytes() == (world / "whole.json").read_bytes() and not parts_folder(out).exists()


def test_worker_processes_change_nothing(world: Path, tmp_path: Path) -> None:
    make(world, tmp_path / "workers.json", workers=2)
    assert (tmp_path / "workers.json").read_bytes() == (world / "whole.json").read_bytes()


def test_a_run_is_continued_with_the_same_settings_only(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        make(world, out)
    with pytest.raises(UserError, match="begun with other images, teachers"):
        make(world, out, resume=True, table={"kitten": "dog"})
    with pytest.raises(UserError, match="from another number of shards than 2"):
        make(world, out, resume=True, shard=Shard(0, 2))
    make(world, out, resume=True)
    finished = out.read_bytes()
    assert make(world, out, resume=True) is None and out.read_bytes() == finished
    with pytest.raises(UserError, match="already exists; delete it"):
        make(world, out)
    with pytest.raises(UserError, match="made with other settings"):
        make(world, out, resume=True, table={"kitten": "dog"})


def test_a_damaged_part_is_told(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    make(world, out, shard=Shard(0, 2))
    part = part_file(out, Shard(0, 2))
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    with pytest.raises(LocalUserError, match=r"1-of-2\.jsonl: is damaged at chunk 0"):
        make(world, out, shard=Shard(1, 2))
    assert not out.exists()


def test_thresholds_are_those_that_separate_the_labels(world: Path, tmp_path: Path) -> None:
    """Objects are what teacher a scores at 0.7 and above (cat) or 0.55 (dog): those thresholds have F1 1."""
    only = [str(world / "a.safetensors")]
    everything = Settings(tau=0.05, tau_ignore=0.05, short=64, long=96, batch_size=2)
    make(world, tmp_path / "all.json", teachers=only, table={}, settings=everything)
    document = read(tmp_path / "all.json")
    least = {1: 0.7, 2: 0.55}
    document["annotations"] = [row for row in document["annotations"] if row["score"] >= least[row["category_id"]]]
    document["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "bird"}]
    (tmp_path / "val.json").write_text(json.dumps(document))
    expected = {
        name: min(row["score"] for row in document["annotations"] if row["category_id"] == number)
        for number, name in ((1, "cat"), (2, "dog"))
    }
    make(
        world,
        tmp_path / "out.json",
        teachers=only,
        table={},
        categories=tmp_path / "val.json",
        thresholds_from=Labelled(tmp_path / "val.json", world / "images"),
    )
    written = read(tmp_path / "out.json")
    provenance = written["info"]["pseudo_labels"]
    assert provenance["tau"] == pytest.approx(expected | {"bird": 0.6}, abs=1e-4)
    assert provenance["tau_ignore"]["cat"] == pytest.approx(provenance["tau"]["cat"] * 5 / 6)
    assert provenance["thresholds_from"] == sha256_of(tmp_path / "val.json")
    assert written["info"]["coverage"] == [1, 2]  # no teacher looked for birds
    labels = [row for row in written["annotations"] if not row["iscrowd"]]
    assert len(labels) == len(document["annotations"])


def test_images_of_a_coco_file_keep_their_ids_and_lend_no_labels(world: Path, tmp_path: Path) -> None:
    document = {
        "images": [
            {"id": 70, "file_name": "more/03.png", "width": 64, "height": 48},
            {"id": 5, "file_name": "01.png"},
        ],
        "annotations": "not read",
    }
    (tmp_path / "list.json").write_text(json.dumps(document))
    make(world, tmp_path / "out.json", images=images_in(tmp_path / "list.json", world / "images"))
    whole, written = read(world / "whole.json"), read(tmp_path / "out.json")
    assert [row["id"] for row in written["images"]] == [70, 5]

    def rows(content: dict[str, Any], name: str) -> list[Any]:
        number = next(row["id"] for row in content["images"] if row["file_name"] == name)
        return [(row["category_id"], row["bbox"]) for row in content["annotations"] if row["image_id"] == number]

    for name in ("more/03.png", "01.png"):
        found, before = rows(written, name), rows(whole, name)
        assert [category for category, _ in found] == [category for category, _ in before] and found
        np.testing.assert_allclose([box for _, box in found], [box for _, box in before], atol=0.03)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON in UTF-8"),
        ('{"images": []}', "at least one image"),
        ('{"images": [{"id": "1", "file_name": "a.png"}]}', r"images\[0\]: needs id"),
        ('{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}]}', "two images have the same id"),
    ],
)
def test_a_wrong_list_is_told(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(UserError, match=says):
        images_in(tmp_path / "list.json")


def test_a_broken_image_stops_or_is_left_out(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "images", tmp_path / "images")
    (tmp_path / "images" / "05.png").write_bytes(b"no picture")
    images, out = images_in(tmp_path / "images"), tmp_path / "out.json"
    with pytest.raises(UserError, match=r"05\.png: cannot be read as an image.*--skip-unreadable"):
        make(world, out, images=images)
    summary = make(world, out, images=images, resume=True, skip_unreadable=True)
    document = read(out)
    assert summary is not None and (summary.images, summary.skipped) == (10, 1) and document["skipped"] == ["05.png"]
    assert "05.png" not in [row["file_name"] for row in document["images"]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"table": {"kiten": "cat"}}, "no teacher has a class 'kiten'"),
        ({"table": {"*": "cat"}}, "the key '\\*' stands for all other classes and can only be dropped, with null"),
        ({"table": {name: None for name in ("cat", "dog", "person", "kitten")}}, "drops every class"),
        ({"categories": "whole.json", "table": {}}, r"b\.safetensors: its class 'kitten' is not among"),
    ],
)
def test_classes_that_do_not_fit_are_told(world: Path, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    if "categories" in options:
        options = options | {"categories": world / options["categories"]}
    with pytest.raises(UserError, match=says):
        make(world, tmp_path / "out.json", **options)


def test_only_the_categories_of_a_file_are_needed(world: Path, tmp_path: Path) -> None:
    rows = [{"id": 9, "name": "person"}, {"id": 4, "name": "dog"}, {"id": 2, "name": "cat"}]
    file = tmp_path / "classes.json"

    def only(categories: list[dict[str, Any]]) -> None:
        file.write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
        make(world, tmp_path / "out.json", categories=file)

    with pytest.raises(UserError, match="categories: the list is empty"):
        only([])
    with pytest.raises(UserError, match="categories: two have the same name"):
        only([*rows, {"id": 5, "name": "cat"}])
    with pytest.raises(UserError, match="categories: two have the same id"):
        only([*rows, {"id": 9, "name": "bird"}])
    only(rows)
    assert read(tmp_path / "out.json")["categories"] == rows[::-1]


def test_fusion_needs_agreement(world: Path, tmp_path: Path) -> None:
    """Cats are looked for by both teachers, and as random networks they hardly agree: fused scores are about halved."""
    settings = Settings(tau=0.6, tau_ignore=0.5, how="wbf", short=64, long=96, batch_size=2)
    make(world, tmp_path / "wbf.json", settings=settings)

    def cats(path: Path) -> int:
        return sum(row["category_id"] == 1 and not row["iscrowd"] for row in read(path)["annotations"])

    assert cats(tmp_path / "wbf.json") < cats(world / "whole.json") / 2


def test_joining_holds_no_more_for_more_images(tmp_path: Path) -> None:
    def peak(chunks: int) -> int:
        out, shard = tmp_path / f"{chunks}.json", Shard(0, 1)
        header = {"document": {"info": {}, "categories": []}}
        parts.begin(out, shard, header)
        row = {"category_id": 1, "bbox": [1.0, 2.0, 3.0, 4.0], "area": 12.0, "iscrowd": 0, "ignore": 0, "score": 0.5}
        with open(part_file(out, shard), "a") as file:
            for number in range(chunks):
                ids = range(number * 8, number * 8 + 8)
                rows = [{"image_id": i} | row for i in ids for _ in range(3)]
                images = [{"id": i, "file_name": f"{i}.png", "width": 9, "height": 9} for i in ids]
                parts.append(file, {"number": number, "images": images, "annotations": rows, "skipped": []})
        tracemalloc.start()
        summary = parts.join(out, 1, chunks)
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert summary is not None and summary.images == chunks * 8
        return top

    assert peak(400) < peak(50) * 1.5 + 50_000


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`compress pseudo-label A B --images … --out OUT` with more options."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.json").write_text('{"kitten": "cat"}')
    small = "--tau 0.6 --tau-ignore 0.5 --short 64 --long 96 --batch 2 --workers 0 --class-map map.json --out out.json"

    def call(*options: str) -> tuple[int, str, str]:
        teachers = [str(world / "a.safetensors"), str(world / "b.safetensors")]
        line = ["pseudo-label", *teachers, "--images", str(world / "images"), *small.split(), *options]
        with pytest.raises(SystemExit) as stop:
            cli.main(line)
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


def test_command(run: Run, world: Path, tmp_path: Path) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    assert "labels and" in out and "in 11 images" in out and "next: compress data check out.json" in out
    assert out.splitlines()[:3] == [
        "teacher a.safetensors: 2 classes matched by name: cat, dog",
        "teacher a.safetensors: it does not look for: person",
        "teacher a.safetensors sees images: short side 64, long side 96; --short and --long should be those of its "
        "training",
    ]
    assert "teacher b.safetensors: classes by the class map: kitten → cat" in out
    assert (tmp_path / "out.json").read_bytes() == (world / "whole.json").read_bytes()
    assert "\nout.json: complete\n" in run("--resume")[1]


def test_sizes_that_no_machine_holds_are_refused(run: Run) -> None:
    said = "error: image size: 1 <= short <= long <= 8192 is needed, got 100000 and 100000\n"
    assert run("--short", "100000", "--long", "100000") == (2, "", said)


def test_command_under_torchrun(run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, out, _ = run()
    assert code == 0 and "out.json: this shard is done" in out and not (tmp_path / "out.json").exists()
    monkeypatch.setenv("RANK", "1")
    assert run()[0] == 0
    assert (tmp_path / "out.json").read_bytes() == (world / "whole.json").read_bytes()
    code, _, err = run("--shard", "1/2")
    assert code == 2 and err == ""  # told by the first process

    monkeypatch.setenv("RANK", "0")
    assert "torchrun divides the work among its 2 processes" in run("--shard", "1/2")[2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--shard", "0/2"), "--shard: '0/2' is not a share"),
        (("--tau", "0.1", "--tau-ignore", "0.5"), "tau_ignore 0.5 is above 0.1, from where boxes are labels"),
        (("--iou", "1.5"), "at least 0 and below 1"),
        (("--short", "97"), "1 <= short <= long"),
        (("--thresholds-root", "."), "belongs to --thresholds-from"),
        (("--class-map", "none.json"), "none.json: No such file"),
        (("--out", "out.txt"), "out.txt: pseudo labels are COCO JSON"),
        (("--root", "."), "is a folder of images"),
    ],
)
def test_a_mistake_is_one_line(run: Run, options: tuple[str, ...], says: str) -> None:
    code, _, err = run(*options)
    assert code == 2 and err.startswith("error: ") and says in err and err.count("\n") == 1


def test_two_shards_by_hand(run: Run, world: Path, tmp_path: Path) -> None:
    assert "this shard is done" in run("--shard", "2/2")[1]
    assert "labels and" in run("--shard", "1/2")[1]
    assert (tmp_path / "out.json").read_bytes() == (world / "whole.json").read_bytes()


def test_each_process_tells_what_it_has_met_alone(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun the first process speaks for all, but not of mistakes in another one's share."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run()[0] == 0
    part = part_file(tmp_path / "out.json", Shard(1, 2))
    said = f"error: {part.relative_to(tmp_path)}: an unfinished run; --resume continues it"
    assert run()[2].startswith(said)
    code, _, err = run("--resume", "--tau", "0.7")
    assert code == 2 and "2-of-2.jsonl: was begun with other images, teachers" in err
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]))
    (tmp_path / "map.json").write_text('{"kiten": "cat"}')
    assert run("--resume") == (2, "", "")  # the first process has this one too
    (tmp_path / "map.json").write_text('{"kitten": "cat"}')

    def detect(*_: object, **__: object) -> None:
        raise UserError("image 7 is of another size")

    monkeypatch.setattr("compress.teachers.base.DetectorTeacher.detect", detect)
    assert run("--resume") == (2, "", "error: image 7 is of another size\n")
