"""Hostile files: safetensors headers that lie, model folders that were tampered with, random damage.

`HEADERS` and `FOLDERS` are catalogues of name -> case, each with a word that the error must contain, so that a test can
run all of them; `damaged` is a hypothesis strategy that changes valid bytes anywhere.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

Entry = dict[str, Any]


def file_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, which may be bytes to be used as they are, and this length prefix."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> Entry:
    """One tensor of a header; valid for 16 bytes of data as it stands."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


_PAIR = b'"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}'
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut off"),
    "seven bytes": (b"\x01" * 7, "cut off"),
    "length zero": (struct.pack("<Q", 0), "cut off"),
    "length beyond the file": (file_bytes({"a": entry()}, bytes(16), length=10_000), "claims"),
    "length of 2**64 - 1": (file_bytes({"a": entry()}, bytes(16), length=2**64 - 1), "claims"),
    "no JSON": (file_bytes(b"{nothing"), "JSON"),
    "no object": (file_bytes(b"[1,2]"), "object"),
    "no UTF-8": (file_bytes(b'{"\xff\xfe":1}'), "JSON"),
    "leading space": (file_bytes(b" {" + _PAIR + b"}", bytes(16)), "object"),
    "nested 100000 deep": (file_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "deep"),
    "number with a million digits": (file_bytes(b'{"a":' + b"9" * 1_000_000 + b"}"), "JSON"),
    "name given twice": (file_bytes(b"{" + _PAIR + b"," + _PAIR + b"}", bytes(16)), "twice"),
    "entry is no object": (file_bytes({"a": 5}), "needs exactly"),
    "entry without offsets": (file_bytes({"a": {"dtype": "F32", "shape": [1]}}), "needs exactly"),
    "entry with an extra key": (file_bytes({"a": entry() | {"x": 1}}, bytes(16)), "needs exactly"),
    "unknown dtype": (file_bytes({"a": entry(dtype="Q4")}, bytes(16)), "dtype"),
    "dtype is a list": (file_bytes({"a": entry(dtype=["F32"])}, bytes(16)), "dtype"),
    "negative size": (file_bytes({"a": entry(shape=[-2, -2])}, bytes(16)), "shape"),
    "size is a bool": (file_bytes({"a": entry(shape=[True, 4])}, bytes(16)), "shape"),
    "size is a fraction": (file_bytes({"a": entry(shape=[2.0, 2])}, bytes(16)), "shape"),
    "shape that overflows": (file_bytes({"a": entry(shape=[2**40, 2**40])}, bytes(16)), "fill"),
    "shape with 1000 axes": (file_bytes({"a": entry(shape=[1] * 1000)}, bytes(16)), "shape"),
    "shape larger than the data": (file_bytes({"a": entry(shape=[2, 3])}, bytes(16)), "fill"),
    "offsets backwards": (file_bytes({"a": entry(offsets=[16, 0])}, bytes(16)), "fill"),
    "offset below zero": (file_bytes({"a": entry(offsets=[-16, 0])}, bytes(16)), "offsets"),
    "three offsets": (file_bytes({"a": entry(offsets=[0, 16, 16])}, bytes(16)), "offsets"),
    "offsets beyond the end": (file_bytes({"a": entry()}, bytes(15)), "cut off"),
    "bytes after the end": (file_bytes({"a": entry()}, bytes(17)), "after its last"),
    "hole at the start": (file_bytes({"a": entry(offsets=[4, 20])}, bytes(20)), "hole"),
    "hole between tensors": (file_bytes({"a": entry(), "b": entry(offsets=[20, 36])}, bytes(36)), "hole"),
    "overlap": (file_bytes({"a": entry(), "b": entry(offsets=[8, 24])}, bytes(24)), "overlaps"),
    "same place twice": (file_bytes({"a": entry(), "b": entry()}, bytes(16)), "overlaps"),
    "metadata is no object": (file_bytes({"__metadata__": [1], "a": entry()}, bytes(16)), "__metadata__"),
    "metadata holds numbers": (file_bytes({"__metadata__": {"x": 1}, "a": entry()}, bytes(16)), "__metadata__"),
    "empty name": (file_bytes({"": entry()}, bytes(16)), "name"),
    "name with a newline": (file_bytes({"a\nb": entry()}, bytes(16)), "name"),
    "name of 10000 characters": (file_bytes({"a" * 10_000: entry()}, bytes(16)), "name"),
}

INDEX = "diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text())
    content |= {key: value for key, value in changes.items() if value is not None}
    for key in [key for key, value in changes.items() if value is None]:
        content.pop(key, None)
    path.write_text(json.dumps(content))


def edit_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a safetensors file and keep its data."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    path.write_bytes(file_bytes(header, content[8 + length :]))


def _rename_first(header: dict[str, Any]) -> None:
    name = next(name for name in header if name != "__metadata__")
    header["not_of_this_model"] = header.pop(name)


def _reshape_first(header: dict[str, Any]) -> None:
    first = next(value for name, value in header.items() if name != "__metadata__" and len(value["shape"]) > 1)
    first["shape"] = [*first["shape"][1:], first["shape"][0]]
    if first["shape"] == first["shape"][::-1]:
        first["shape"] = [first["shape"][0] * first["shape"][1], *first["shape"][2:]]


def _integers(header: dict[str, Any]) -> None:
    for name, value in header.items():
        if name != "__metadata__" and value["dtype"] == "F32":
            value["dtype"] = "I32"


def _link_outside(folder: Path) -> None:
    target = folder.parent / "outside.safetensors"
    shutil.move(folder / "unet" / WEIGHTS, target)
    (folder / "unet" / WEIGHTS).symlink_to(target)


def _pickle_instead(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _index_that_names(shard: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = {"metadata": {"total_size": 1}, "weight_map": {"conv_in.weight": shard}}
        (folder / "unet" / INDEX).write_text(json.dumps(content))

    return damage


def _index_with(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / "unet" / WEIGHTS).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        names = [name for name in header if name != "__metadata__"]
        index = {"metadata": {"total_size": 1 << 50}, "weight_map": dict.fromkeys(names, WEIGHTS)}
        (folder / "unet" / INDEX).write_text(json.dumps(index | changes))

    return damage


def _set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "unet" / "config.json", **changes)


def _set_index(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model_index.json", **changes)


def _set_text(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def _replace_by_pipe(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()
    os.mkfifo(folder / "unet" / "config.json")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _cut(folder: Path) -> None:
    path = folder / "unet" / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing folder": (shutil.rmtree, "does not exist"),
    "empty folder": (_empty, "empty"),
    "no model_index.json": (lambda folder: (folder / "model_index.json").unlink(), "no model_index.json"),
    "index of 2 MB": (_set_text("model_index.json", "{" + " " * (2 << 20) + "}"), "limit"),
    "index is a list": (_set_text("model_index.json", "[]"), "object"),
    "index nested deep": (_set_text("model_index.json", '{"a":' * 50_000 + "1" + "}" * 50_000), "deep"),
    "index is binary": (lambda folder: (folder / "model_index.json").write_bytes(bytes(range(256))), "JSON"),
    "no pipeline class": (_set_index(_class_name=None), "_class_name"),
    "class from a module": (_set_index(_class_name=["mine", "Pipeline"]), "_class_name"),
    "class that is no pipeline": (_set_index(_class_name="UNet2DModel"), "no pipeline class"),
    "unknown class": (_set_index(_class_name="EvilPipeline"), "no pipeline class"),
    "no denoiser": (_set_index(unet=[None, None]), "no denoiser"),
    "component above the folder": (_set_index(**{"../unet": ["diffusers", "UNet2DModel"]}), "plain folder name"),
    "component with a slash": (_set_index(**{"a/b": ["diffusers", "UNet2DModel"]}), "plain folder name"),
    "absolute component": (_set_index(**{"/etc": ["diffusers", "UNet2DModel"]}), "plain folder name"),
    "component without a folder": (_set_index(vae=["diffusers", "AutoencoderKL"]), "no folder"),
    "component from own code": (_set_index(unet=["my_code", "UNet"]), "code"),
    "component of three": (_set_index(unet=["diffusers", "UNet2DModel", "x"]), "library and a class"),
    "denoiser from transformers": (_set_index(unet=["transformers", "CLIPTextModel"]), "weights"),
    "denoiser class unknown": (_set_index(unet=["diffusers", "NoSuchModel"]), "no model class"),
    "denoiser class is a scheduler": (_set_index(unet=["diffusers", "DDPMScheduler"]), "no model class"),
    "pickled weights": (_pickle_instead, "pickled"),
    "weights missing": (lambda folder: (folder / "unet" / WEIGHTS).unlink(), "no safetensors"),
    "weights cut off": (_cut, "cut off"),
    "weights linked from outside": (_link_outside, "outside"),
    "component linked from outside": (lambda f: _link_folder(f), "outside"),
    "config is a pipe": (_replace_by_pipe, "regular"),
    "config is a list": (_set_text("unet/config.json", "[1]"), "object"),
    "config with a billion layers": (_set_config(layers_per_block=1 << 23), "far larger"),
    "config with huge numbers": (_set_config(block_out_channels=[1 << 40, 1 << 40]), "bounds"),
    "config with other widths": (_set_config(block_out_channels=[64, 64]), "another shape"),
    "config with one more layer": (_set_config(layers_per_block=2), "missing"),
    "config with nonsense": (_set_config(block_out_channels="many"), "cannot be built"),
    "config with unknown blocks": (_set_config(down_block_types=["NoBlock", "NoBlock"]), "cannot be built"),
    "tensor renamed": (lambda f: edit_header(f / "unet" / WEIGHTS, _rename_first), "missing"),
    "tensor reshaped": (lambda f: edit_header(f / "unet" / WEIGHTS, _reshape_first), "another shape"),
    "integers for floats": (lambda f: edit_header(f / "unet" / WEIGHTS, _integers), "no float"),
    "shard above the folder": (_index_that_names("../outside.safetensors"), "plain safetensors"),
    "shard with an absolute path": (_index_that_names("/etc/passwd"), "plain safetensors"),
    "shard that is pickled": (_index_that_names("shard.bin"), "plain safetensors"),
    "shard is a number": (_index_that_names(7), "plain safetensors"),
    "shard missing": (_index_that_names("shard-1.safetensors"), "missing"),
    "index and shards disagree": (_index_that_names(WEIGHTS), "disagrees"),
    "index lies about the size": (_index_with(), "claims"),
    "index without metadata": (_index_with(metadata=None), "metadata"),
    "adapter inside": (_set_text("unet/adapter_config.json", "{}"), "adapter"),
}
"""Damages to a saved tiny `UNet2DModel` pipeline: name -> (function of its folder, a word of the error)."""


def _link_folder(folder: Path) -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / "unet", outside)
    (folder / "unet").symlink_to(outside)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Valid bytes after one to three random damages, most of them near the start, where headers are."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        limit = draw(st.sampled_from([16, 512, len(result)]))
        position = draw(st.integers(0, max(0, min(limit, len(result)) - 1)))
        kind = draw(st.sampled_from(["flip", "byte", "cut", "grow", "drop", "repeat", "length", "digit"]))
        if kind == "flip" and result:
            result[position] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and result:
            result[position] = draw(st.integers(0, 255))
        elif kind == "cut":
            del result[position:]
        elif kind == "grow":
            result += draw(st.binary(min_size=1, max_size=64))
        elif kind == "drop":
            del result[position : position + draw(st.integers(1, 32))]
        elif kind == "repeat":
            result[position:position] = result[position : position + draw(st.integers(1, 64))]
        elif kind == "length" and len(result) >= 8:
            result[:8] = struct.pack("<Q", draw(st.one_of(st.integers(0, len(result) + 8), st.integers(0, 2**64 - 1))))
        elif kind == "digit":
            digits = [index for index, byte in enumerate(result[: 1 << 16]) if 48 <= byte <= 57]
            if digits:
                result[draw(st.sampled_from(digits))] = draw(st.integers(48, 57))
    return bytes(result)
