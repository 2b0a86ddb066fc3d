#!/usr/bin/env bash
# pillow-heif 1.8.1 with Pillow 13.0.0: saving an image as HEIC with exif= an Image.Exif object, as image.getexif() returns
# it, loses the orientation: the file is neither turned nor says that it should be, and nothing is said. The same object
# as bytes (exif.tobytes()) is written as HEIF's own rotation. The other formats of Pillow take both alike.
#
# Who meets it: whoever converts photographs of phones to HEIC with save("x.heic", exif=image.getexif()).
# Seen: 2026-11-28, Linux x86-64, Python 3.11. An image of 50 x 40 whose EXIF says "turn by 90 degrees". Output:
#   JPEG with an Exif object: shown as 40 x 50
#   JPEG with bytes: shown as 40 x 50
#   HEIF with an Exif object: shown as 50 x 40
#   HEIF with bytes: shown as 40 x 50
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pillow==13.0.0' 'pillow-heif==1.8.1'
cd "$folder"
cat > check.py <<'PY'
import io

import pillow_heif
from PIL import ExifTags, Image, ImageOps

pillow_heif.register_heif_opener()
image = Image.new("RGB", (50, 40))
for kind in ("JPEG", "HEIF"):
    for name in ("an Exif object", "bytes"):
        exif, file = Image.Exif(), io.BytesIO()
        exif[ExifTags.Base.Orientation] = 6
        image.save(file, kind, exif=exif if name != "bytes" else exif.tobytes())
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
        print(f"{kind} with {name}: shown as {shown.width} x {shown.height}")
PY
"$folder/venv/bin/python" check.py | tee output
diff output - <<'EXPECTED'
JPEG with an Exif object: shown as 40 x 50
JPEG with bytes: shown as 40 x 50
HEIF with an Exif object: shown as 50 x 40
HEIF with bytes: shown as 40 x 50
EXPECTED
