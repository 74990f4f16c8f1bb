"""Weights that stay in their files: a denoiser whose matrices are read, as float32, each time they are used.

diffusers maps float32 files into memory, where the system can drop and read them again. Files of 16-bit floats it turns
into float32 tensors that stay. Here every parameter with two or more axes is a `StoredWeight` instead, a tensor without
memory: an operation on it reads the file and forgets what it read. Values are the same bits, since each 16-bit float is
a float32 value too.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dcomp.calibrate.config_match import model_class
from dcomp.calibrate.model_files import Component, Header, ModelError, TensorInfo, read_safetensors_header

__all__ = ["StoredWeight", "is_large", "move_to_files", "open_stored"]

LARGE = 0.5  # of the memory that is free: weights beyond this leave too little for activations and results
MATRIX_AXES = 2  # biases and norms are small, and read by operations that are many


class StoredWeight(Tensor):
    """A float32 tensor that lies in a safetensors file, in whatever float dtype, and is read by each operation on it.

    The result of an operation is an ordinary tensor, except that of `detach`. Nothing can be written to it.

    Args:
        file: a safetensors file that must stay as it is.
        name: of the tensor in the file.
        shape: of the tensor.
    """

    _file: Path
    _name: str

    @staticmethod
    def __new__(cls, file: Path, name: str, shape: Sequence[int]) -> "StoredWeight":  # noqa: D102 - see the class
        made: StoredWeight = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=torch.float32)
        made._file, made._name = file, name
        return made

    def float(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the values in memory, once for any number of operations; torch would return this very tensor."""
        return _read(self._file, self._name).float(*args, **kwargs)

    # Operations are met below their Python functions.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the values.

        Raises:
            RuntimeError: the operation would write to a stored weight.
        """
        if func is torch.ops.aten.detach.default:
            (weight,) = args
            return cls(weight._file, weight._name, weight.shape)
        if func._schema.is_mutable and isinstance(args[0], cls):
            raise RuntimeError(f"{func} would change {args[0]._name}, which stays in {args[0]._file}")
        args, kwargs = tree_map_only(cls, cls.float, (args, kwargs or {}))
        return func(*args, **kwargs)


def is_large(nbytes: int) -> bool:
    """Whether weights would fill much of the memory that is free now."""
    return nbytes > LARGE * psutil.virtual_memory().available


def open_stored(component: Component) -> nn.Module:
    """Open a diffusers model, in float32 and eval mode, whose matrices stay in their files.

    Args:
        component: checked with its weights, and not quantized.
    """
    import accelerate
    from diffusers.models.modeling_utils import no_init_weights

    kind = model_class(component.class_name, str(component.path))
    with no_init_weights(), accelerate.init_empty_weights():  # as diffusers does: tables that are in no file are made
        model = kind.from_config(dict(component.config))
    places = _places(component.weights.values())
    model._fix_state_dict_keys_on_load(places)  # names of old attention blocks
    model.load_state_dict(_weights(model, places), assign=True)
    model.register_to_config(_name_or_path=str(component.path))
    opened: nn.Module = model.eval()
    return opened


def move_to_files(model: Any, folder: Path) -> None:
    """Write the weights of an open model, which no file holds, and leave its matrices in the new files.

    Args:
        model: a float32 model of diffusers, changed in place.
        folder: for the files, which must stay as long as the model is used.
    """
    model.save_pretrained(folder)
    headers = [read_safetensors_header(file) for file in sorted(folder.glob("*.safetensors"))]
    model.load_state_dict(_weights(model, _places(headers)), assign=True)


def _places(headers: Iterable[Header]) -> dict[str, tuple[Path, TensorInfo]]:
    return {name: (header.path, info) for header in headers for name, info in header.tensors.items()}


def _weights(model: nn.Module, places: Mapping[str, tuple[Path, TensorInfo]]) -> dict[str, Tensor]:
    """Return a state dict: matrices as `StoredWeight`, all else read now."""
    parameters, weights = dict(model.named_parameters()), dict[str, Tensor]()
    for name, (file, info) in places.items():
        if name in parameters and len(info.shape) >= MATRIX_AXES:
            weights[name] = StoredWeight(file, info.name, info.shape)
        else:
            value = _read(file, info.name)
            weights[name] = value.float() if value.is_floating_point() else value
    return weights


def _read(file: Path, name: str) -> Tensor:
    # Opened anew for each tensor: what was read through a mapping counts as this process's memory until it is closed.
    try:
        with safe_open(file, "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"The weight {name} can be read no longer: {str(error)[:200]}",
            where=str(file),
            remedy="Leave the model's files as they are while it is used, and start again",
        ) from error
    return tensor
