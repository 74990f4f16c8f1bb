"""The C++ compiler of this machine: which it is, and running it."""

import os
import shlex
import shutil
import subprocess

from dcomp.kernels.build_cache import BuildError

_TIMEOUT = 300  # seconds


def compiler() -> list[str]:
    """Return the command: g++, or what `CXX` names.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX")
    try:
        words = shlex.split(named) if named else ["g++"]
    except ValueError as error:
        raise BuildError(f"CXX is no command ({error})") from error
    if not words or shutil.which(words[0]) is None:
        raise BuildError(f"there is no C++ compiler {words[0] if words else named!r}")
    return words


def run(command: list[str]) -> str:
    """Return what a command of the compiler prints.

    Raises:
        BuildError: it fails or takes minutes.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler did not run ({error})") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"the C++ compiler failed ({lines[0].strip()[:200]})")
    return done.stdout
