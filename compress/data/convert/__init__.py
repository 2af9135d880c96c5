"""Other labels to COCO JSON: YOLO text files, Pascal VOC, and COCO files as tools lay them out. Images stay in place.

Each layout gives a `Source`: its sets of images (train, val, ...) with their boxes, and what should be said about them.
`coco_file.documents` says which files they become, `coco_file.write_documents` writes them.
"""
