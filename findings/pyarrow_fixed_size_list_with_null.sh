#!/usr/bin/env bash
# pyarrow 25.0.1: a column of type fixed_size_list that holds one null is written to Parquet without complaint, and
# read_table of that file raises "ArrowInvalid: Expected all lists to be of size=2 but index 2 had size=0". The same
# values as a list of variable length come back. The Parquet schema is the same for both; the fixed size is only in
# the Arrow schema that the file embeds, so reading with that schema ignored (store_schema=False when writing) works too.
#
# Who meets it: whoever stores embeddings as fixed-size lists and marks missing ones with null.
# Seen: 2026-11-28, Linux x86-64, Python 3.11. Output:
#   fixed size: ArrowInvalid Expected all lists to be of size=2 but index 2 had size=0
#   variable size: [[1.0, 2.0], None, [3.0, 4.0]]
#   fixed size, Arrow schema not stored: [[1.0, 2.0], None, [3.0, 4.0]]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'pyarrow==25.0.1'
cd "$folder"
cat > check.py <<'PY'
import pyarrow as pa
import pyarrow.parquet as pq

VALUES = [[1.0, 2.0], None, [3.0, 4.0]]


def read_back(kind: pa.DataType, **options: object) -> str:
    pq.write_table(pa.table({"v": pa.array(VALUES, kind)}), "values.parquet", **options)
    try:
        return str(pq.read_table("values.parquet")["v"].to_pylist())
    except pa.ArrowInvalid as error:
        return f"ArrowInvalid {error}"


fixed = pa.list_(pa.float32(), 2)
print("fixed size:", read_back(fixed))
print("variable size:", read_back(pa.list_(pa.float32())))
print("fixed size, Arrow schema not stored:", read_back(fixed, store_schema=False))
PY
"$folder/venv/bin/python" check.py | tee output
diff output - <<'EXPECTED'
fixed size: ArrowInvalid Expected all lists to be of size=2 but index 2 had size=0
variable size: [[1.0, 2.0], None, [3.0, 4.0]]
fixed size, Arrow schema not stored: [[1.0, 2.0], None, [3.0, 4.0]]
EXPECTED
