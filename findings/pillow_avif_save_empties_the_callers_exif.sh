#!/usr/bin/env bash
# Pillow 13.0.0: saving as AVIF with exif= an Image.Exif object removes the orientation from that object, because AVIF keeps
# it elsewhere. The AVIF is right; whatever is saved with the same object afterwards is not turned. JPEG, PNG, WebP and
# TIFF leave the object as it is.
#
# Who meets it: whoever writes thumbnails of one photograph in several formats, with its exif in a variable.
# Seen: 2026-11-28, Linux x86-64, Python 3.11. Orientation 6, and the object used for one format after another. Output:
#   WEBP: shown as 40 x 50, the object has orientation 6
#   AVIF: shown as 40 x 50, the object has orientation None
#   JPEG: shown as 50 x 40, the object has orientation None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pillow==13.0.0'
cd "$folder"
cat > check.py <<'PY'
import io

from PIL import ExifTags, Image, ImageOps

exif = Image.Exif()
exif[ExifTags.Base.Orientation] = 6
for kind in ("WEBP", "AVIF", "JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (50, 40)).save(file, kind, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
    print(f"{kind}: shown as {shown.width} x {shown.height}, the object has orientation", end=" ")
    print(exif.get(ExifTags.Base.Orientation))
PY
"$folder/venv/bin/python" check.py | tee output
diff output - <<'EXPECTED'
WEBP: shown as 40 x 50, the object has orientation 6
AVIF: shown as 40 x 50, the object has orientation None
JPEG: shown as 50 x 40, the object has orientation None
EXPECTED
