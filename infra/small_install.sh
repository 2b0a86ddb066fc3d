#!/usr/bin/env bash
# Prove that `pip install .` without extras gives a working mae_core and none of the pipeline's dependencies.
#
#     infra/small_install.sh
#
# Installs a copy of the packages into a new virtual environment in a temporary folder, with links to what pip would
# install beside them, runs examples/quickstart.py there, and removes the folder. VENV is where the links lead.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d "${TMPDIR:-/tmp}/mae-small-install-XXXXXX")
trap 'rm -rf "$folder"' EXIT

# Building in the clone would leave build/ behind, and a stale build/ would be packaged.
mkdir "$folder/source" "$folder/empty"
cp -R pyproject.toml README.md LICENSE mae_core pipelines tune "$folder/source"
cp examples/quickstart.py "$folder"

venv=$(realpath "${VENV:-.venv}")
"$venv/bin/python" -m venv --without-pip "$folder/venv"
site=$("$folder/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$venv/bin/python" infra/link_dependencies.py "$site"
"$venv/bin/pip" --python "$folder/venv/bin/python" install --quiet --no-deps --no-build-isolation "$folder/source"

cd "$folder/empty"
unset PYTHONPATH
"$folder/venv/bin/python" -W error - <<'CHECKS'
import sys
from importlib import metadata, resources
from importlib.util import find_spec

import mae_core

assert "torch" not in sys.modules, "import mae_core loads torch"
assert mae_core.__version__ == metadata.version("mae-ray")
assert resources.files("mae_core").joinpath("py.typed").is_file(), "py.typed is not in the wheel"
installed = [name for name in ("ray", "mlflow", "boto3", "pyarrow", "numba", "tyro") if find_spec(name)]
assert not installed, f"installed without an extra: {installed}"

config = mae_core.ModelConfig()
mae = mae_core.build_mae(config, seed=0)
import torch

with torch.inference_mode():
    loss = mae(torch.zeros(2, 3, 224, 224), mae_core.random_masks(config.grid, 2))
assert loss.shape == (2,) and loss.isfinite().all(), loss
print(f"mae_core {mae_core.__version__}: ViT-B/16 computed the loss of one batch")
CHECKS

"$folder/venv/bin/python" "$folder/quickstart.py"

status=0
message=$("$folder/venv/bin/mae" --help 2>&1) || status=$?
if [ "$status" -ne 2 ] || [[ "$message" != *"pip install '.[pipeline]'"* ]]; then
    echo "mae without its extra: status $status, not 2 with the pip command: $message" >&2
    exit 1
fi
echo "$message"
