"""Tensors that have a shape, a dtype and a device but no values: a model runs on them and computes nothing.

Whatever depends on such a tensor has no values either; whatever does not is computed as ever. So a call of a denoiser
with latents of this kind costs no more than the few of its layers that read no latents.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree


class FormTensor(Tensor):
    """A tensor without values and memory.

    Operations give tensors of the form that the same operation gives on values, on the same device, which torch's meta
    tensors do not. To ask for a value raises an error.

    Args:
        form: a tensor on the meta device.
        device: that the tensor pretends to be on.
    """

    _form: Tensor

    @staticmethod
    def __new__(cls, form: Tensor, device: torch.device) -> "FormTensor":  # noqa: D102 - see the class
        made: FormTensor = Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=form.dtype, device=device
        )
        made._form = form
        return made

    @classmethod
    def of(cls, tensor: Tensor, rows: int | None = None) -> "FormTensor":
        """Return the form of a tensor, with another length of its first axis if `rows` is given."""
        shape = tensor.shape if rows is None else (rows, *tensor.shape[1:])
        return cls(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor.device)

    # Operations are met below their Python functions.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on forms; a tensor that is changed in place stays the tensor that it was."""
        kwargs = kwargs or {}
        given = {}

        def form(tensor: Tensor) -> Tensor:
            made = tensor._form if isinstance(tensor, FormTensor) else tensor.to("meta")
            given[id(made)] = tensor
            return made

        formed_args, formed_kwargs = _pytree.tree_map_only(Tensor, form, (args, kwargs))
        device = next(leaf.device for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, FormTensor))
        if formed_kwargs.get("device") is not None:  # a move, or a new tensor like another one
            device, formed_kwargs = torch.device(formed_kwargs["device"]), {**formed_kwargs, "device": "meta"}
        result = func(*formed_args, **formed_kwargs)
        return _pytree.tree_map_only(
            Tensor, lambda made: given[id(made)] if id(made) in given else cls(made, device), result
        )


class FormMemory:
    """Remembers the forms of what modules return, so that each has to be run only once for inputs of a form."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Any] = {}

    def answer(self, module: nn.Module) -> Callable[..., Any]:
        """Return what to run in the place of a module; without a `FormTensor` in its inputs the module itself runs."""
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, tree = _pytree.tree_flatten((args, kwargs))
            if not any(isinstance(leaf, FormTensor) for leaf in leaves):
                return forward(*args, **kwargs)
            key = (module, str(tree), *(_form_of(leaf) for leaf in leaves))
            if key not in self._known:
                output = forward(*args, **kwargs)
                if not all(isinstance(leaf, FormTensor) for leaf in _pytree.tree_leaves(output)):
                    return output
                self._known[key] = output
            return self._known[key]

        return run


def _form_of(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (type(leaf), leaf.shape, leaf.dtype, leaf.device)
    plain: Hashable = leaf if isinstance(leaf, Hashable) else type(leaf).__name__
    return plain
