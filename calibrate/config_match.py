"""Whether a diffusers config describes the weights beside it, found on the meta device.

The config is untrusted: its class must be a model that diffusers exports, its numbers are bounded, and the build stops
as soon as it registers far more parameters or modules than there are tensors, so a config with a million layers costs
neither memory nor time. No weight is read.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dcomp.calibrate.safetensors_file import FLOAT_DTYPES, ModelError, TensorInfo

if TYPE_CHECKING:
    from torch import nn

MAX_CONFIG_INT = 1 << 24
# Tables that are not in the file (positions, for one) may be this much larger than the file before we refuse.
MAX_TABLE_BYTES = 1 << 30
_SHOWN = 3
_REMEDY = "Use the config.json that belongs to these weights, or download the model again"


class _TooLargeError(Exception):
    """Raised inside a constructor to stop a build that outgrew its weights."""


def check_buildable(class_name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str) -> None:
    """Build a model from an untrusted config, no larger than the tensors on disk allow, and forget it.

    Raises:
        ModelError: unknown class, a value out of bounds, or a config that the class refuses.
    """
    build_on_meta(class_name, config, len(tensors), where)


def check_config_matches(
    class_name: str, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], where: str
) -> None:
    """Compare names, shapes and kinds of dtype of a model's parameters with the tensors on disk.

    Raises:
        ModelError: as `check_buildable`; or the first missing, unexpected, mismatched and non-float tensors, with
            their counts.
    """
    import torch

    model = build_on_meta(class_name, config, len(tensors), where)
    found: dict[str, TensorInfo] = dict(tensors)
    # Old attention blocks are stored under other names; diffusers renames them while loading, so we ask it to.
    rename = getattr(model, "_fix_state_dict_keys_on_load", None)
    if rename is not None:
        rename(found)
    expected: dict[str, torch.Tensor] = model.state_dict()
    faults = [
        _listing("missing", [name for name in expected if name not in found]),
        _listing("not in the model", [name for name in found if name not in expected]),
        _listing(
            "of another shape than the config says",
            [
                f"{name} {list(found[name].shape)} instead of {list(value.shape)}"
                for name, value in expected.items()
                if name in found and tuple(value.shape) != found[name].shape
            ],
        ),
        _listing(
            "of a dtype that is no float",
            [
                f"{name} {found[name].dtype}"
                for name, value in expected.items()
                if name in found and value.is_floating_point() and found[name].dtype not in FLOAT_DTYPES
            ],
        ),
    ]
    if any(faults):
        problem = "Config and weights disagree: " + "; ".join(fault for fault in faults if fault)
        raise ModelError(problem, where=where, remedy=_REMEDY)


def model_class(class_name: str, where: str) -> Any:
    """Return the model class of diffusers that a config names.

    Raises:
        ModelError: diffusers has no such class, or cannot provide it here.
    """
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    try:
        found = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    except Exception as error:  # the lazy module imports the class's file, which may lack an optional package
        raise ModelError(
            f"diffusers cannot provide {class_name}: {str(error)[:200]}",
            where=where,
            remedy="Install what this class needs",
        ) from error
    if not isinstance(found, type) or not issubclass(found, ModelMixin):
        raise ModelError(f"{class_name!r} is no model class of diffusers", where=where, remedy=_REMEDY)
    return found


def build_on_meta(class_name: str, config: Mapping[str, Any], tensors: int, where: str) -> "nn.Module":
    """Build a diffusers model from an untrusted config without memory for its weights.

    Args:
        class_name: of diffusers.
        config: of the component; what it says of quantization is left out.
        tensors: number of them on disk, which bounds the model.
        where: for errors.

    Raises:
        ModelError: unknown class, a value out of bounds, or a config that the class refuses.
    """
    import torch
    from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
    from diffusers.models.modeling_utils import LegacyModelMixin

    kind = model_class(class_name, where)
    _check_values(config, where)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        if issubclass(kind, LegacyModelMixin):
            kind = _fetch_remapped_cls_from_config(plain, kind)
        with _bounded_build(2 * tensors + 256), torch.device("meta"):
            model: nn.Module = kind.from_config(plain)
    except _TooLargeError as error:
        problem = f"The config describes a model far larger than its weights ({tensors} tensors)"
        raise ModelError(problem, where=where, remedy=_REMEDY) from error
    except Exception as error:  # constructors meet values of any type here and raise anything
        problem = f"{class_name} cannot be built from this config: {type(error).__name__}: {str(error)[:200]}"
        raise ModelError(problem, where=where, remedy=_REMEDY) from error
    table_bytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if table_bytes > MAX_TABLE_BYTES:
        problem = f"The config asks for {table_bytes} bytes of tables beside the weights"
        raise ModelError(problem, where=where, remedy=_REMEDY)
    return model


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor(s) {what}: {', '.join(names[:_SHOWN])}{more}"


def _check_values(value: Any, where: str, key: str = "") -> None:
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and not -MAX_CONFIG_INT <= value <= MAX_CONFIG_INT
    ):
        raise ModelError(f"The value of {key!r} is out of bounds", where=where, remedy=_REMEDY)
    if isinstance(value, Mapping):
        for name, part in value.items():
            if name != "quantization_config":
                _check_values(part, where, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for part in value:
            _check_values(part, where, key)


@contextmanager
def _bounded_build(limit: int) -> Iterator[None]:
    """Stop this thread's module constructors once they registered `limit` parameters or ten times as many modules."""
    from torch.nn.modules import module as registry

    thread = threading.get_ident()
    counts = {"parameters": 0, "modules": 0}

    def count(kind: str, allowed: int) -> None:
        if threading.get_ident() == thread:
            counts[kind] += 1
            if counts[kind] > allowed:
                raise _TooLargeError(f"more than {allowed} {kind}")

    def on_parameter(*_: Any) -> None:
        count("parameters", limit)

    def on_module(*_: Any) -> None:
        count("modules", 10 * limit)

    handles = [
        registry.register_module_parameter_registration_hook(on_parameter),
        registry.register_module_module_registration_hook(on_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
