#!/usr/bin/env bash
# transformers 5.24.0: the tensors of a ViTMAEForPreTraining have two sets of names. state_dict() calls the query of the
# first decoder block decoder.decoder_layers.0.attention.q_proj.weight; save_pretrained() writes the same tensor as
# decoder.decoder_encoder.layer.0.attention.attention.query.weight. Published ViTMAE files have neither: theirs is
# decoder.decoder_layers.0.attention.attention.query.weight, and from_pretrained() loads that too, without missing keys.
#
# Who meets it: whoever reads the safetensors file instead of loading the model, or writes one for transformers to load.
# Seen: 2026-11-28, Linux x86-64, Python 3.11, torch 2.14.1 on the CPU. Output:
#   state_dict:      decoder.decoder_layers.0.attention.q_proj.weight
#   save_pretrained: decoder.decoder_encoder.layer.0.attention.attention.query.weight
#   published names load: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.14.1' 'transformers==5.24.0'
cd "$folder"
cat > check.py <<'PY'
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

config = ViTMAEConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
    decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=64,
)
model = ViTMAEForPreTraining(config)
state = model.state_dict()


def name_in(tensors: dict[str, torch.Tensor]) -> str:
    wanted = state["decoder.decoder_layers.0.attention.q_proj.weight"]
    return next(name for name, tensor in tensors.items() if tensor.shape == wanted.shape and torch.equal(tensor, wanted))


print("state_dict:     ", name_in(state))
model.save_pretrained("saved")
saved = load_file("saved/model.safetensors")
print("save_pretrained:", name_in(saved))
published = {name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): saved[name] for name in saved}
save_file(published, "saved/model.safetensors", metadata={"format": "pt"})
again, found = ViTMAEForPreTraining.from_pretrained("saved", output_loading_info=True)
same = all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
print("published names load:", same and not found["missing_keys"] and not found["unexpected_keys"])
PY
"$folder/venv/bin/python" check.py 2>log | tee output || { cat log; exit 1; }
diff output - <<'EXPECTED'
state_dict:      decoder.decoder_layers.0.attention.q_proj.weight
save_pretrained: decoder.decoder_encoder.layer.0.attention.attention.query.weight
published names load: True
EXPECTED
