#!/usr/bin/env bash
# Pillow 13.0.0: a TIFF is the only format whose pixels Pillow turns upright by itself. Before it is loaded, its size is
# already that of the upright image, and getexif() still has the orientation; after load() that is gone. A program that
# reads size and orientation from the header and turns the decoded pixels, which is right for JPEG, PNG, WebP and AVIF,
# turns every oriented TIFF twice. ImageOps.exif_transpose is right for all, since it loads first.
#
# Who meets it: whoever judges headers before decoding (sizes, bombs) and keeps the orientation for later.
# Seen: 2026-11-28, Linux x86-64, Python 3.11. Pixels of 50 x 40 with orientation 6 (turn by 90 degrees). Output:
#   JPEG: opened as 50 x 40 with orientation 6, loaded as 50 x 40 with orientation 6
#   PNG: opened as 50 x 40 with orientation 6, loaded as 50 x 40 with orientation 6
#   TIFF: opened as 40 x 50 with orientation 6, loaded as 40 x 50 with orientation None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pillow==13.0.0'
cd "$folder"
cat > check.py <<'PY'
import io

from PIL import ExifTags, Image

TURNED = ExifTags.Base.Orientation
for kind in ("JPEG", "PNG", "TIFF"):
    exif, file = Image.Exif(), io.BytesIO()
    exif[TURNED] = 6
    Image.new("RGB", (50, 40)).save(file, kind, exif=exif)
    image = Image.open(io.BytesIO(file.getvalue()))
    opened = f"{image.width} x {image.height} with orientation {image.getexif().get(TURNED)}"
    image.load()
    print(f"{kind}: opened as {opened}, loaded as {image.width} x {image.height} with orientation", end=" ")
    print(image.getexif().get(TURNED))
PY
"$folder/venv/bin/python" check.py | tee output
diff output - <<'EXPECTED'
JPEG: opened as 50 x 40 with orientation 6, loaded as 50 x 40 with orientation 6
PNG: opened as 50 x 40 with orientation 6, loaded as 50 x 40 with orientation 6
TIFF: opened as 40 x 50 with orientation 6, loaded as 40 x 50 with orientation None
EXPECTED
