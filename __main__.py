"""`python -m dcomp`."""

import sys
from pathlib import Path

# From a checkout the first entry is the checkout itself, where Hugging Face libraries would mistake our
# `kernels` folder for their package of that name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from dcomp.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
