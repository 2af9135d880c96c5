#!/usr/bin/env bash
# Pillow 13.0.0, a BigTIFF in big-endian byte order (MM, version 43), as tifffile 2026.3.3 writes it and reads it back.
# Expected: the pixels, as from the same file in little-endian order, which Pillow reads.
# Happens: "cannot identify image file": the version is looked for in the third byte of the header, which is its first
# byte in this order, so the directory is read with 32-bit offsets.
# Exits with 1 when that changes.
set -euo pipefail
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install -q pillow==13.0.0 tifffile==2026.3.3 numpy
"$venv/bin/python" -W ignore - <<'PYTHON'
import io
import sys

import numpy as np
import PIL
import tifffile
from PIL import Image, UnidentifiedImageError

pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
read = {}
for order in "<>":
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, bigtiff=True, byteorder=order, photometric="rgb")
    print(f"{order} header {out.getvalue()[:16].hex(' ')}, tifffile {tifffile.__version__}:", end=" ")
    print(np.array_equal(tifffile.imread(io.BytesIO(out.getvalue())), pixels), end=", ")
    try:
        read[order] = np.array_equal(np.asarray(Image.open(io.BytesIO(out.getvalue()))), pixels)
    except UnidentifiedImageError as error:
        read[order] = str(error).split("<")[0]
    print(f"Pillow {PIL.__version__}: {read[order]}")
sys.exit(0 if read["<"] is True and read[">"] is not True else 1)
PYTHON
