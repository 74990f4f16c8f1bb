"""A C++ compiler that makes of code for AVX-512 and AMX what runs on AVX2: see `avx512.h`. To be named by `CXX`."""

import hashlib
import os
import sys
from pathlib import Path

_HEADER = Path(__file__).with_name("avx512.h")
_EMULATED = {"-mavx512f": "AVX512F", "-mavx512bf16": "AVX512BF16", "-mamx-int8": "AMX"}


def main(words: list[str]) -> None:
    """Run g++ with these words, emulating what they ask for."""
    if "--version" in words:  # by which libraries are told apart
        print(hashlib.sha256(_HEADER.read_bytes()).hexdigest(), flush=True)
    names = [f"-DDCOMP_EMULATE_{_EMULATED[word]}" for word in words if word in _EMULATED]
    others = [word for word in words if not word.startswith(("-mavx512", "-mamx"))]
    if "-c" in words:
        others += ["-include", str(_HEADER), *names, *(["-mavx2", "-mfma"] if names else [])]
    os.execvp("g++", ["g++", *others])


if __name__ == "__main__":
    main(sys.argv[1:])
