"""Post-training compression of diffusion models: quantize, run in integers, validate.

Importing this package loads neither torch nor diffusers. It registers the checkpoint format with diffusers as soon as
diffusers is imported, in either order, so that `DiffusionPipeline.from_pretrained` opens a compressed folder.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from types import ModuleType

try:
    __version__ = version("dcomp")
except PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"


class DcompError(Exception):
    """A problem that a person can solve.

    Args:
        problem: what is wrong, one sentence.
        where: the file, layer, key or option that it is about.
        remedy: what to do next, one sentence.
    """

    exit_code = 1

    def __init__(self, problem: str, *, where: str | None = None, remedy: str) -> None:
        super().__init__(problem, where, remedy)
        self.problem = problem
        self.where = where
        self.remedy = remedy if remedy.endswith((".", "?")) else f"{remedy}."

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        return f"{self.problem}{place}. {self.remedy}"


class UsageError(DcompError):
    """A command, option, recipe or input file that cannot be used as given."""

    exit_code = 2


_LAZY = {
    "fit_lora": "dcomp.compress.pruning.adapter",
    "follow_plan": "dcomp.recipes.follow",
    "load": "dcomp.compress.loader",
    "quantize": "dcomp.recipes.run",
    "search_schedule": "dcomp.recipes.schedule",
    "validate": "dcomp.recipes.validate",
}
__all__ = ["DcompError", "UsageError", "__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dcomp' has no attribute {name!r}")


@wrapt.when_imported("diffusers.quantizers.auto")
def _register_with_diffusers(_: "ModuleType") -> None:
    import_module("dcomp.compress.loader")  # registers itself, also when it is what imported diffusers
