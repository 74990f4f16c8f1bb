"""One untrusted file at a time: bounded JSON, and the header of a safetensors file.

Nothing read here is believed before it is checked: sizes are compared with the file on disk before memory is taken,
and every refusal names the file, the tensor and a remedy. Tensor data is never interpreted, except by
`find_nonfinite`, which streams it. Pickled files are not opened at all. Imports neither torch nor diffusers.

Source: the format description of safetensors (header of 8 + N bytes, offsets without holes), with a lower limit on N.
"""

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dcomp import UsageError

# The format itself allows 100 MB. JSON text of that size can unfold to gigabytes of Python objects; the largest
# published models need less than 2 MB.
MAX_HEADER_BYTES = 16 << 20
MAX_JSON_BYTES = 16 << 20
MAX_DIMENSIONS = 16
MAX_NAME_CHARS = 1024
_CHUNK_BYTES = 4 << 20

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
_DOWNLOAD = "Download or copy the model again"


class ModelError(UsageError):
    """A model folder or file that cannot be opened as it is."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file; offsets count from the start of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return self.end - self.begin

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked header of one safetensors file, tensors in the order of their offsets."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


@dataclass(frozen=True)
class NonFinite:
    """A tensor that holds NaN or infinite values."""

    file: Path
    tensor: str
    count: int
    numel: int


def regular_file_size(path: Path) -> int:
    """Return the size of a regular file, following links; refuse folders, pipes and devices without opening them."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise ModelError("The file is missing or cannot be read", where=str(path), remedy=_DOWNLOAD) from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError("This is not a regular file", where=str(path), remedy=_DOWNLOAD)
    return status.st_size


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file no larger than `max_bytes`.

    Raises:
        ModelError: too large, not UTF-8, not JSON, nested too deep, a key given twice, or not an object.
    """
    size = regular_file_size(path)
    if size > max_bytes:
        raise ModelError(
            f"The file has {size} bytes, more than the limit of {max_bytes}",
            where=str(path),
            remedy="Check that this is the right file: such files are small",
        )
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ModelError("The file cannot be read", where=str(path), remedy="Check its permissions") from error
    return _parse_object(content, str(path))


def read_safetensors_header(path: Path) -> Header:
    """Parse and check the whole header of a safetensors file; the data is not read.

    Returns:
        The header: known dtypes, sizes that agree with shapes, offsets in range that leave neither hole nor overlap
        and end exactly at the end of the file.

    Raises:
        ModelError: any of this does not hold.
    """
    size = regular_file_size(path)
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length < 2:
                raise _broken(path, f"The file is cut off or no safetensors file: it has {size} bytes")
            if length > size - 8:
                raise _broken(path, f"The header claims {length} bytes in a file of {size}")
            if length > MAX_HEADER_BYTES:
                raise _broken(path, f"The header claims {length} bytes, more than the limit of {MAX_HEADER_BYTES}")
            content = file.read(length)
    except OSError as error:
        raise ModelError("The file cannot be read", where=str(path), remedy="Check its permissions") from error
    if len(content) < length or not content.startswith(b"{"):
        raise _broken(path, "The header is cut off or is no JSON object")
    entries = _parse_object(content, str(path))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "'__metadata__' must map text to text")
    tensors = sorted((_tensor_info(path, name, entry) for name, entry in entries.items()), key=_by_offset)
    _check_offsets(path, tensors, size - 8 - length)
    return Header(path, {tensor.name: tensor for tensor in tensors}, metadata, 8 + length, size)


def find_nonfinite(header: Header) -> Iterator[NonFinite]:
    """Name the float tensors of a file that hold NaN or infinity, reading a few megabytes at a time."""
    import torch  # here because reading headers alone must stay light

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    with header.path.open("rb") as file:
        for tensor in header.tensors.values():
            if tensor.dtype not in dtypes:
                continue
            file.seek(header.data_start + tensor.begin)
            left, count = tensor.nbytes, 0
            while left:
                wanted = min(left, _CHUNK_BYTES)
                content = bytearray(file.read(wanted))
                if len(content) < wanted:
                    raise _broken(header.path, f"The file ended inside tensor {tensor.name!r}")
                values = torch.frombuffer(content, dtype=dtypes[tensor.dtype])
                count += int(torch.isfinite(values).logical_not().sum())
                left -= wanted
            if count:
                yield NonFinite(header.path, tensor.name, count, tensor.numel)


def _broken(path: Path, problem: str) -> ModelError:
    return ModelError(problem, where=str(path), remedy=f"{_DOWNLOAD}; the file is damaged or was changed")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _parse_object(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ModelError("The JSON is nested too deep", where=where, remedy=_DOWNLOAD) from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ModelError(f"This is not valid JSON: {str(error)[:200]}", where=where, remedy=_DOWNLOAD) from error
    if not isinstance(value, dict):
        raise ModelError(f"A JSON object is expected, not a {type(value).__name__}", where=where, remedy=_DOWNLOAD)
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor_info(path: Path, name: str, entry: Any) -> TensorInfo:
    label = repr(name[:80])
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise _broken(path, f"Tensor name {label} is empty, too long or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"Tensor {label} needs exactly 'dtype', 'shape' and 'data_offsets'")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _broken(path, f"Tensor {label} has the unknown dtype {str(dtype)[:20]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise _broken(path, f"Tensor {label} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _broken(path, f"Tensor {label} has impossible offsets")
    begin, end = offsets
    if end < begin or end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise _broken(path, f"Tensor {label} of shape {shape} and dtype {dtype} does not fill {end - begin} bytes")
    return TensorInfo(name, dtype, tuple(shape), begin, end)


def _by_offset(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _check_offsets(path: Path, tensors: list[TensorInfo], data_bytes: int) -> None:
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps the one before it" if tensor.begin < position else "leaves a hole before it"
            raise _broken(path, f"Tensor {tensor.name[:80]!r} {fault}")
        position = tensor.end
    if position > data_bytes:
        raise _broken(path, f"The file is cut off: tensors need {position} bytes of data and {data_bytes} are there")
    if position < data_bytes:
        raise _broken(path, f"The file holds {data_bytes - position} bytes after its last tensor")
