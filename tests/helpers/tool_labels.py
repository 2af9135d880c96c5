"""What labelling tools and libraries write for one small data set, in their own form.

The set: a.jpg of 64x48 pixels with a cat over all of it and a dog at x 8, y 6, 16.5 wide and 24 high; b.jpg of 40x60
pixels with nothing. Every entry was compared with what the named version wrote for it; the call that made it stands
above it. FOLDER in a text is the folder that the
files are put into.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.helpers.label_files import picture, text


@dataclass(frozen=True)
class Export:
    """Files of a tool by name. layout: the first argument of `data convert`. a, b: where the images are.
    source: what is converted. whole: the dog's box came out in whole pixels."""

    layout: str
    files: dict[str, str]
    a: str
    b: str
    source: str = "."
    whole: bool = False

    def write(self, folder: Path) -> Path:
        """Write the files and the images; return what to convert."""
        for name, content in self.files.items():
            text(folder / name, content.replace("FOLDER", str(folder)))
        for name, size in ((self.a, (64, 48)), (self.b, (40, 60))):
            if name:
                picture(folder / name, size)
        return folder / self.source


def _voc(head: str, cat: str, dog: str, tail: str = "") -> str:
    def box(name: str, corners: str) -> str:
        tags = zip(("xmin", "ymin", "xmax", "ymax"), corners.split(), strict=True)
        return (
            f"<object><name>{name}</name>{tail}<bndbox>{''.join(f'<{t}>{v}</{t}>' for t, v in tags)}</bndbox></object>"
        )

    size = "<size><width>64</width><height>48</height><depth>3</depth></size><segmented>0</segmented>"
    return f"<annotation>{head}{size}{box('cat', cat)}{box('dog', dog)}</annotation>"


_EMPTY_VOC = (
    "<annotation><folder>VOC</folder><filename>b.jpg</filename><size><width>40</width><height>60</height>"
    "<depth>3</depth></size><segmented>0</segmented></annotation>"
)
_SHARES = "0 0.500000 0.500000 1.000000 1.000000\n1 0.253906 0.375000 0.257812 0.500000\n"

_SUPERVISION = '{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0.0, 0.0, 64.0, 48.0], "area": 3072.0, ' + (
    '"segmentation": [], "iscrowd": 0}, {"id": 2, "image_id": 1, "category_id": 2, "bbox": [8.0, 6.0, 16.5, 24.0], '
    '"area": 396.0, "segmentation": [], "iscrowd": 0}'
)
_FROM_ZERO = (
    '{"id": 0, "image_id": 0, "category_id": 0, "segmentation": [], "bbox": [0.0, 0.0, 64.0, 48.0], "ignore": 0, '
    '"iscrowd": 0, "area": 3072.0}, {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [], '
    '"bbox": [8.0, 6.0, 16.5, 24.0], "ignore": 0, "iscrowd": 0, "area": 396.0}'
)


def _coco(images: str, annotations: str, first_category: int) -> str:
    names = ", ".join(f'{{"id": {first_category + i}, "name": "{name}"}}' for i, name in enumerate(("cat", "dog")))
    return f'{{"info": {{}}, "images": [{images}], "categories": [{names}], "annotations": [{annotations}]}}'


EXPORTS: dict[str, Export] = {
    # supervision 0.31.2: ds.as_pascal_voc(images_directory_path="images", annotations_directory_path="annotations")
    "supervision voc": Export(
        "voc",
        {
            "annotations/a.xml": _voc("<folder>VOC</folder><filename>a.jpg</filename>", "1 1 64 48", "9 7 24 30"),
            "annotations/b.xml": _EMPTY_VOC,
        },
        "images/a.jpg",
        "images/b.jpg",
        whole=True,
    ),
    # supervision 0.31.2: ds.as_yolo("images", "labels", "data.yaml")
    "supervision yolo": Export(
        "yolo",
        {
            "labels/a.txt": "0 0.50000 0.50000 1.00000 1.00000\n1 0.25391 0.37500 0.25781 0.50000",
            "labels/b.txt": "",
            "data.yaml": "nc: 2\nnames: [cat, dog]\n",
        },
        "images/a.jpg",
        "images/b.jpg",
    ),
    # supervision 0.31.2: ds.as_coco(images_directory_path="images", annotations_path="a.json")
    "supervision coco": Export(
        "coco",
        {
            "a.json": _coco(
                '{"id": 1, "license": 1, "file_name": "a.jpg", "height": 48, "width": 64, "date_captured": ""}, '
                '{"id": 2, "license": 1, "file_name": "b.jpg", "height": 60, "width": 40, "date_captured": ""}',
                _SUPERVISION,
                1,
            )
        },
        "images/a.jpg",
        "images/b.jpg",
    ),
    # datumaro 1.13.12 (CVAT's library): dataset.export(folder, "voc", save_media=True)
    "datumaro voc": Export(
        "voc",
        {
            "Annotations/a.xml": _voc(
                "<folder></folder><filename>a.jpg</filename>",
                "0.0 0.0 64.0 48.0",
                "8.0 6.0 24.5 30.0",
                "<truncated>0</truncated><occluded>0</occluded><difficult>0</difficult>",
            ),
            "ImageSets/Main/train.txt": "a\n",
            "ImageSets/Main/val.txt": "b\n",
            "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\ndog:0,128,0::\n",
        },
        "JPEGImages/a.jpg",
        "JPEGImages/b.jpg",
    ),
    # datumaro 1.13.12: dataset.export(folder, "yolo", save_media=True); what CVAT calls "YOLO 1.1"
    "datumaro yolo": Export(
        "yolo",
        {
            "obj.data": "classes = 2\nval = data/val.txt\ntrain = data/train.txt\nnames = data/obj.names\n",
            "obj.names": "cat\ndog\n",
            "train.txt": "data/obj_train_data/a.jpg\n",
            "val.txt": "data/obj_val_data/b.jpg\n",
            "obj_train_data/a.txt": _SHARES,
            "obj_val_data/b.txt": "",
        },
        "obj_train_data/a.jpg",
        "obj_val_data/b.jpg",
    ),
    # datumaro 1.13.12: dataset.export(folder, "yolo_ultralytics", save_media=True)
    "datumaro yolo_ultralytics": Export(
        "yolo",
        {
            "data.yaml": "val: val.txt\ntrain: train.txt\nnames:\n  0: cat\n  1: dog\n",
            "train.txt": "./images/train/a.jpg\n",
            "val.txt": "./images/val/b.jpg\n",
            "labels/train/a.txt": _SHARES,
            "labels/val/b.txt": "",
        },
        "images/train/a.jpg",
        "images/val/b.jpg",
    ),
    # datumaro 1.13.12: dataset.export(folder, "coco_instances", save_media=True)
    "datumaro coco": Export(
        "coco",
        {
            "annotations/instances_train.json": _coco(
                '{"id": 1, "width": 64, "height": 48, "file_name": "a.jpg", "license": 0}', _SUPERVISION, 1
            ),
            "annotations/instances_val.json": _coco(
                '{"id": 2, "width": 40, "height": 60, "file_name": "b.jpg", "license": 0}', "", 1
            ),
            "annotations/image_info_train.json": _coco('{"id": 1, "file_name": "a.jpg"}', "", 1),
        },
        "images/train/a.jpg",
        "images/val/b.jpg",
    ),
    # fiftyone 1.22.1: VOCDetectionDatasetExporter(export_dir=folder, include_paths=True)
    "fiftyone voc": Export(
        "voc",
        {
            "labels/a.xml": _voc(
                "<folder></folder><filename>a.jpg</filename><path>FOLDER/data/a.jpg</path>", "0 0 64 48", "8 6 24 30"
            ),
            "labels/b.xml": _EMPTY_VOC.replace("<folder>VOC</folder>", "<folder></folder>"),
        },
        "data/a.jpg",
        "data/b.jpg",
        whole=True,
    ),
    # fiftyone 1.22.1: YOLOv5DatasetExporter(export_dir=folder, split=..., classes=["cat", "dog"]) for train and val
    "fiftyone yolo5": Export(
        "yolo",
        {
            "dataset.yaml": "names:\n  0: cat\n  1: dog\npath: FOLDER\ntrain: ./images/train/\nval: ./images/val/\n",
            "labels/train/a.txt": _SHARES,
            "labels/val/b.txt": "",
        },
        "images/train/a.jpg",
        "images/val/b.jpg",
    ),
    # fiftyone 1.22.1: YOLOv4DatasetExporter(export_dir=folder, classes=["cat", "dog"])
    "fiftyone yolo4": Export(
        "yolo",
        {
            "obj.names": "cat\ndog",
            "images.txt": "data/a.jpg\ndata/b.jpg",
            "data/a.txt": _SHARES,
            "data/b.txt": "",
        },
        "data/a.jpg",
        "data/b.jpg",
    ),
    # label-studio-sdk 2.1.2: Converter(config, upload_dir=...).convert(tasks, folder, "COCO", is_dir=False)
    "label studio coco": Export(
        "coco",
        {
            "result.json": _coco(
                '{"width": 64, "height": 48, "id": 0, "file_name": "../upload/1/a.jpg"}, '
                '{"width": null, "height": null, "id": 1, "file_name": "/data/upload/1/b.jpg"}',
                _FROM_ZERO,
                0,
            )
        },
        "images/a.jpg",
        "images/b.jpg",
    ),
    # label-studio-sdk 2.1.2: Converter(..., download_resources=True).convert(tasks, folder, "VOC", is_dir=False)
    "label studio voc": Export(
        "voc",
        {
            "Annotations/a.xml": _voc(
                "<folder>images</folder><filename>a.jpg</filename><owner><name>Label Studio</name></owner>",
                "0 0 64 48",
                "8 6 24 30",
                "<pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>",
            )
        },
        "images/a.jpg",
        "",  # no XML for an image without objects
        whole=True,
    ),
    # label-studio-sdk 2.1.2: Converter(...).convert(tasks, folder, "YOLO", is_dir=False)
    "label studio yolo": Export(
        "yolo",
        {
            "classes.txt": "cat\ndog\n",
            "notes.json": '{"categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}], "info": {}}',
            "labels/a.txt": "0 0.5 0.5 1.0 1.0\n1 0.25390625 0.375 0.2578125 0.5\n",
            "labels/b.txt": "",
        },
        "images/a.jpg",
        "images/b.jpg",
    ),
    # globox 2.9.0: AnnotationSet.from_coco(...).save_coco(folder / "globox.json", auto_ids=True)
    "globox coco": Export(
        "coco",
        {
            "globox.json": _coco(
                '{"id": 0, "file_name": "a.jpg", "width": 64, "height": 48}, '
                '{"id": 1, "file_name": "b.jpg", "width": 40, "height": 60}',
                _FROM_ZERO,
                0,
            )
        },
        "a.jpg",
        "b.jpg",
    ),
    # pylabel 0.1.55 with pandas 2.3.3: importer.ImportYoloV5(...).export.ExportToCoco(...); the last box stands in it
    # once more for the image without objects
    "pylabel coco": Export(
        "coco",
        {
            "pylabel.json": _coco(
                '{"id": 0, "folder": "../images", "file_name": "a.jpg", "path": null, "width": 64, "height": 48}, '
                '{"id": 1, "folder": "../images", "file_name": "b.jpg", "path": null, "width": 40, "height": 60}',
                f"{_FROM_ZERO}, {_FROM_ZERO[_FROM_ZERO.index(', {') + 2 :]}",
                0,
            )
        },
        "images/a.jpg",
        "images/b.jpg",
    ),
    # sahi 0.12.8: Coco(), add_image(CocoImage(...)), json.dump(coco.json, ...)
    "sahi coco": Export(
        "coco",
        {
            "sahi.json": _coco(
                '{"height": 48, "width": 64, "id": 1, "file_name": "a.jpg"}, '
                '{"height": 60, "width": 40, "id": 2, "file_name": "b.jpg"}',
                '{"iscrowd": 0, "image_id": 1, "bbox": [0.0, 0.0, 64.0, 48.0], "segmentation": [], "category_id": 0, '
                '"id": 1, "area": 3072}, {"iscrowd": 0, "image_id": 1, "bbox": [8.0, 6.0, 16.5, 24.0], '
                '"segmentation": [], "category_id": 1, "id": 2, "area": 396}',
                0,
            )
        },
        "a.jpg",
        "b.jpg",
    ),
    # labelme2coco 0.2.6: labelme2coco.convert("lm", "out"), run beside the folder lm; images without JSON are not in it
    "labelme2coco": Export(
        "coco",
        {
            "out/dataset.json": _coco(
                '{"height": 48, "width": 64, "id": 1, "file_name": "lm/a.jpg"}',
                _SUPERVISION.replace("3072.0", "3072"),
                1,
            )
        },
        "lm/a.jpg",
        "",
    ),
    # Roboflow, a service: the layout of its COCO exports, with the root category that no box has
    "roboflow coco": Export(
        "coco",
        {
            "train/_annotations.coco.json": _coco(
                '{"id": 0, "license": 1, "file_name": "a.jpg", "height": 48, "width": 64, "date_captured": ""}',
                _SUPERVISION.replace('"image_id": 1', '"image_id": 0'),
                1,
            ),
            "valid/_annotations.coco.json": _coco(
                '{"id": 0, "license": 1, "file_name": "b.jpg", "height": 60, "width": 40, "date_captured": ""}', "", 1
            ),
            "README.dataset.txt": "# objects",
        },
        "train/a.jpg",
        "valid/b.jpg",
    ),
    # Roboflow: the layout of its YOLO exports
    "roboflow yolo": Export(
        "yolo",
        {
            "data.yaml": "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\n"
            "nc: 2\nnames: [cat, dog]\n",
            "train/labels/a.txt": "0 0.5 0.5 1 1\n1 0.25390625 0.375 0.2578125 0.5",
            "valid/labels/b.txt": "",
            "README.roboflow.txt": "objects",
        },
        "train/images/a.jpg",
        "valid/images/b.jpg",
    ),
    # Roboflow: the layout of its VOC exports
    "roboflow voc": Export(
        "voc",
        {
            "train/a.xml": _voc(
                "<folder></folder><filename>a.jpg</filename><path>a.jpg</path>", "1 1 64 48", "9 7 24 30"
            ),
            "valid/b.xml": _EMPTY_VOC,
        },
        "train/a.jpg",
        "valid/b.jpg",
        whole=True,
    ),
}
