"""How fast a training step is: forward, backward and optimizer, beside the plain computation and transformers.

Needs torch and timm alone, so that `python -m mae_core.bench` runs on a GPU host that has no Ray.
"""
