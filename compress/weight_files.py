"""Write the weight files of a denoiser: safetensors shards in a fixed order, aligned, hashed on the way.

Order inside a file: tensors whose size is a multiple of 64 bytes first, then multiples of 16, then the rest; among
equals larger elements first, then by name. The data section starts on a 64-byte boundary, so tensors of the first kind
lie on one too, those of the second on 16 bytes, and all others at least on a multiple of their element size. The format
allows no holes, so nothing stronger can be promised for odd sizes; the loader copies what is not aligned.

Equal tensors give equal bytes. One tensor is in memory at a time beside the model itself.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 64
MAX_SHARD_BYTES = 5 << 30
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32",
    torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
}  # fmt: skip


class HashingFile:
    """A new file that is hashed while it is written, and on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self.nbytes = 0

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes."""
        self._file.write(content)
        self._digest.update(content)
        self.nbytes += len(content)

    def close(self) -> str:
        """Flush to the disk and return the SHA-256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_text(path: Path, text: str) -> str:
    """Write a new small file and return its SHA-256."""
    with HashingFile(path) as file:
        file.write(text.encode())
        return file.close()


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int, metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write tensors as one safetensors file, or as shards with an index, under the names that diffusers looks for.

    Args:
        folder: an existing folder without weight files.
        tensors: name -> tensor on any device; tensors that share memory are written once each.
        max_shard_bytes: a shard is closed before it would grow beyond this, unless one tensor alone is larger.
        metadata: goes into the header of every file.

    Returns:
        File name -> SHA-256.
    """
    shards = _plan_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        name = "diffusion_pytorch_model.safetensors"
        return {name: _write_file(folder / name, {key: tensors[key] for key in shards[0]}, metadata)}
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, keys in enumerate(shards, 1):
        name = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        hashes[name] = _write_file(folder / name, {key: tensors[key] for key in keys}, metadata)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(map(_nbytes, tensors.values()))}, "weight_map": weight_map}
    name = "diffusion_pytorch_model.safetensors.index.json"
    hashes[name] = write_text(folder / name, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes


def narrowed(tensor: Tensor, stored: str | None) -> Tensor:
    """Return a float tensor in the 16-bit dtype that its source file had, if that loses nothing.

    Args:
        tensor: as it is in memory.
        stored: dtype in the source's safetensors header, such as "F16"; None for a tensor that was not there.
    """
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(stored or "")
    if dtype is None or tensor.dtype != torch.float32:
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.float(), tensor) else tensor


def weights_nbytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that `write_weights` needs on the disk, headers and index estimated from above."""
    return sum(_nbytes(tensor) + 2 * len(name) + 256 for name, tensor in tensors.items()) + 4096


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _plan_shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        if shards[-1] and size + _nbytes(tensors[name]) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(tensors[name])
    return shards


def _file_order(item: tuple[str, Tensor]) -> tuple[bool, bool, int, str]:
    name, tensor = item
    return _nbytes(tensor) % ALIGNMENT != 0, _nbytes(tensor) % 16 != 0, -tensor.element_size(), name


def _write_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    ordered = dict(sorted(tensors.items(), key=_file_order))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for name, tensor in ordered.items():
        end = position + _nbytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Trailing spaces are the format's own way to pad a header.
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with HashingFile(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered.values():
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(flat.numpy().data)
        return file.close()
