import os
import sys
from pathlib import Path

# In the checkout's root, Hugging Face libraries would mistake our `kernels` folder for their package of that name.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
os.fsync = lambda _: None  # 120 times in the smallest run, and no test cuts the power
settings.register_profile("untimed", deadline=None)  # no test is about time, and first calls load libraries
settings.load_profile("untimed")
