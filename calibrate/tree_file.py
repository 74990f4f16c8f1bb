"""Nested arguments on disk: tensors in a safetensors file, their arrangement as JSON in its metadata.

A tree is made of tensors, numbers, strings, booleans, None, tuples, lists and dicts with string keys; everything else
is refused by name. Equal tensors of one file are stored once. Dtypes, values and channels-last layout come back bit
for bit. A file appears whole or not at all.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dcomp import DcompError
from dcomp.calibrate.safetensors_file import read_safetensors_header

_META = "dcomp"
_CHANNELS_LAST = "channels_last"


class TreeError(DcompError):
    """An argument that cannot be stored, or a stored file that cannot be used."""


def encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """Turn a tree into JSON, adding copies of its tensors to `tensors` under names made from their contents.

    Args:
        value: the tree.
        tensors: CPU copies by name; grows only by tensors that it does not hold yet.
        where: what the tree is called in an error.

    Raises:
        TreeError: part of the tree is none of the allowed types.
    """
    if isinstance(value, Tensor):
        layout = {"layout": _CHANNELS_LAST} if _is_channels_last(value) else {}
        return {"tensor": _store(value, tensors), **layout}
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) in (tuple, list):
        items = [encode(item, tensors, f"{where}[{position}]") for position, item in enumerate(value)]
        return {type(value).__name__: items}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: encode(item, tensors, f"{where}[{key!r}]") for key, item in value.items()}}
    raise TreeError(
        f"The denoiser's argument holds a {type(value).__module__}.{type(value).__qualname__}, which is not recorded",
        where=where,
        remedy="Only tensors, numbers, strings, None, tuples, lists and dicts with string keys can be; run the "
        "pipeline without the option that passes this.",
    )


def decode(node: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Rebuild the tree that `encode` described; `tensor` gives a tensor by its name.

    Raises:
        TreeError: the JSON is not a description of a tree.
    """
    if node is None or type(node) in (bool, int, str, float):
        return node
    match node:
        case {"tensor": str(name), "layout": "channels_last"}:
            return tensor(name).permute(0, 3, 1, 2)
        case {"tensor": str(name), **rest} if not rest:
            return tensor(name)
        case {"float": "nan" | "inf" | "-inf" as text, **rest} if not rest:
            return float(text)
        case {"tuple": list(items), **rest} if not rest:
            return tuple(decode(item, tensor) for item in items)
        case {"list": list(items), **rest} if not rest:
            return [decode(item, tensor) for item in items]
        case {"dict": dict(items), **rest} if not rest:
            return {key: decode(item, tensor) for key, item in items.items()}
    raise TreeError("The stored arguments are not understood", where=str(node)[:80], remedy=_AGAIN)


def tensor_names(node: Any) -> set[str]:
    """Return the names of all tensors in a tree's JSON."""
    names: set[str] = set()
    decode(node, lambda name: names.add(name) or torch.empty(0, 0, 0, 0))  # type: ignore[func-returns-value]
    return names


def write_tree_file(path: Path, description: Mapping[str, Any], tensors: dict[str, Tensor]) -> str:
    """Write a file atomically and return its sha256; equal contents give equal bytes.

    Raises:
        TreeError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    text = json.dumps(description, allow_nan=False)
    with replacing(path) as unfinished:
        save_file(dict(sorted(tensors.items())), unfinished, metadata={_META: text})
        return file_sha256(unfinished)


def read_description(path: Path) -> dict[str, Any]:
    """Check a file's header and return the JSON it was written with; the tensors are not read.

    Raises:
        ModelError: the file is damaged.
        TreeError: it is whole, but not one of ours.
    """
    try:
        description = json.loads(read_safetensors_header(path).metadata[_META])
    except (KeyError, ValueError, RecursionError) as error:
        raise TreeError("The file holds no recorded calls", where=str(path), remedy=_AGAIN) from error
    if not isinstance(description, dict):
        raise TreeError("The file holds no recorded calls", where=str(path), remedy=_AGAIN)
    return description


def open_tensors(path: Path, device: str | torch.device = "cpu") -> Callable[[str], Tensor]:
    """Return a function from a tensor's name to the tensor; each is read once, into memory of its own.

    Call `read_description` first: it checks the header.
    """
    from safetensors import safe_open

    file: Any = safe_open(path, framework="pt")
    read: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        if name not in read:
            try:
                # A mapped tensor begins anywhere in memory; kernels choose their path by alignment.
                read[name] = file.get_tensor(name).clone().to(device)
            except Exception as error:
                raise TreeError(f"The tensor {name!r} is missing", where=str(path), remedy=_AGAIN) from error
        return read[name]

    return tensor


def tensor_sha256(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(content)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read a piece at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Any:
    """Yield a temporary path beside `path`, which takes its place when the block ends well.

    Raises:
        TreeError: writing failed; `path` is as it was.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise TreeError(
            f"The file cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            remedy="Make room or choose another folder, and run the command again: it goes on where it stopped.",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


_AGAIN = "Delete the calibration set and record it again."


def _is_channels_last(tensor: Tensor) -> bool:
    plain = tensor.is_contiguous() or tensor.ndim != 4
    return not plain and tensor.is_contiguous(memory_format=torch.channels_last)


def _store(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    copy = tensor.detach().permute(0, 2, 3, 1) if _is_channels_last(tensor) else tensor.detach()
    copy = copy.cpu().contiguous()
    name = tensor_sha256(copy)[:32]
    if name not in tensors:
        shares_memory = copy.data_ptr() == tensor.data_ptr()
        tensors[name] = copy.clone() if shares_memory else copy
    return name
