#!/usr/bin/env bash
# tfrecord 1.14.6: a bytes feature of several values loses the zero bytes at the end of each: the loader puts them into a
# NumPy array of type S, which pads with zeros and strips them. A feature of one value comes back whole. So masks, raw
# arrays and encoded images that end in zeros are cut as soon as a record holds two of them, and nothing is said.
#
# Who meets it: whoever stores several images, masks or arrays in one feature of a record.
# Seen: 2026-11-28, Linux x86-64, Python 3.11. Output:
#   one value: [b'\x01\x00\x00']
#   two values: [b'\x01', b'\x02\x03']
#   in the file: [b'\x01\x00\x00', b'\x02\x03\x00']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'tfrecord==1.14.6' 'protobuf<8'
cd "$folder"
cat > check.py <<'PY'
import numpy as np
from tfrecord import TFRecordWriter, example_pb2
from tfrecord.reader import tfrecord_iterator, tfrecord_loader

writer = TFRecordWriter("a.tfrecord")
writer.write({"one": (b"\1\0\0", "byte"), "two": ([b"\1\0\0", b"\2\3\0"], "byte")})
writer.close()
(record,) = tfrecord_loader("a.tfrecord", None, {"one": "byte", "two": "byte"})
print("one value:", [record["one"]])
print("two values:", np.asarray(record["two"]).tolist())
example = example_pb2.Example.FromString(bytes(next(iter(tfrecord_iterator("a.tfrecord")))))
print("in the file:", list(example.features.feature["two"].bytes_list.value))
PY
"$folder/venv/bin/python" check.py | tee output
diff output - <<'EXPECTED'
one value: [b'\x01\x00\x00']
two values: [b'\x01', b'\x02\x03']
in the file: [b'\x01\x00\x00', b'\x02\x03\x00']
EXPECTED
