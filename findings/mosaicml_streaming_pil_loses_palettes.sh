#!/usr/bin/env bash
# mosaicml-streaming 0.13.0 (MDS): a column of encoding "pil" stores mode, size and pixels of an image, and no palette. An
# image of mode P, as Image.open returns it for most GIFs and many PNGs, comes back with Pillow's default palette, gray
# levels of 0 to 255: its colours are gone, and nothing is said. Encoding "png" keeps them.
#
# Who meets it: whoever writes PNGs or GIFs as they were opened, and "pil" as the encoding that needs no codec.
# Seen: 2026-11-28, Linux x86-64, Python 3.11, NumPy 2.1.3, Pillow 13.0.0. A red image of mode P. Output:
#   pil: mode P, first pixel as RGB (0, 0, 0)
#   png: mode P, first pixel as RGB (255, 0, 0)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# The encodings need nothing else of the package, whose dependencies are gigabytes.
"$folder/venv/bin/pip" install --quiet 'numpy==2.1.3' 'pillow==13.0.0' typing_extensions
"$folder/venv/bin/pip" install --quiet --no-deps 'mosaicml-streaming==0.13.0'
cd "$folder"
cat > check.py <<'PY'
import importlib.util
from importlib.metadata import distribution

from PIL import Image

path = distribution("mosaicml-streaming").locate_file("streaming/base/format/mds/encodings.py")
spec = importlib.util.spec_from_file_location("encodings_of_mds", path)
encodings = importlib.util.module_from_spec(spec)
spec.loader.exec_module(encodings)

image = Image.new("P", (4, 4), 0)
image.putpalette([255, 0, 0])
for kind in ("pil", "png"):
    found = encodings.mds_decode(kind, encodings.mds_encode(kind, image))
    print(f"{kind}: mode {found.mode}, first pixel as RGB {found.convert('RGB').getpixel((0, 0))}")
PY
"$folder/venv/bin/python" check.py | tee output
diff output - <<'EXPECTED'
pil: mode P, first pixel as RGB (0, 0, 0)
png: mode P, first pixel as RGB (255, 0, 0)
EXPECTED
