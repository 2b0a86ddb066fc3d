import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("mae_core", deadline=None)  # No test asserts a time.
settings.load_profile("mae_core")
