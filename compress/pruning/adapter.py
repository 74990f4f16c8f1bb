"""LoRA adapters of the original model, made to fit the pruned one: the same rows and columns are cut out of them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dcomp.calibrate.adapters import AdapterError, check_adapter, parse_adapter
from dcomp.calibrate.model_files import DENOISERS
from dcomp.compress.manifest import MANIFEST, read_manifest
from dcomp.compress.pruning.cut import cuts_of, lost, renamed
from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.plain import OF_THE_PROCESS
from dcomp.compress.pruning.units import Part, Units, find_units

_METADATA = "lora_adapter_metadata"  # of diffusers
_BLOCK = re.compile(r"[\w.]+\.\d{1,9}")
_PAIR = re.compile(r"(?P<path>.+?)\.(?P<which>lora_A|lora_B|lora\.down|lora\.up)(?P<rest>\.weight|\..+\.weight)$")


def fit_lora(pipe: Any, adapter: str | Path) -> dict[str, Tensor] | None:
    """Return an adapter's tensors for a pipeline whose denoiser is pruned, to be given to `pipe.load_lora_weights`.

    Matrices of layers that are gone are left out. What the file says of scales is multiplied into the matrices. None
    where nothing was cut: the file fits as it is.

    Args:
        pipe: an open `DiffusionPipeline`.
        adapter: safetensors file in the format of diffusers or PEFT, made for the model before it was pruned.

    Raises:
        AdapterError: the file cannot be used, or nothing in it belongs to a layer that is left.
        ModelError: it is damaged.
    """
    path, _ = parse_adapter(str(adapter))
    check_adapter(path)
    found: dict[str, Tensor] | None = None
    for name in DENOISERS:
        if isinstance(component := getattr(pipe, name, None), nn.Module):
            cuts, units = _cuts_and_units(component)
            if cuts:
                found = _fitted(component, name, found or _scaled(path), cuts, units, str(path))
    return found


def _scaled(path: Path) -> dict[str, Tensor]:
    """Read an adapter, each pair of matrices with the scale that the file's metadata give it."""
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    for key, tensor in tensors.items():
        match = _PAIR.match(key)
        component, _, layer = match["path"].partition(".") if match else ("", "", "")
        alpha = about.get(f"{component}.lora_alpha")
        if match is None or match["which"] != "lora_B" or alpha is None:
            continue
        for pattern, value in (about.get(f"{component}.alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alpha = value
        rank = tensor.shape[1]
        tensors[key] = tensor * (alpha / (rank**0.5 if about.get(f"{component}.use_rslora") else rank))
    return tensors


def _cuts_and_units(denoiser: Any) -> tuple[CutList, Units]:
    """Return what was cut out of a denoiser, and what its original consists of."""
    cuts = cuts_of(denoiser)
    config = {key: value for key, value in denoiser.config.items() if key not in OF_THE_PROCESS}
    if cuts:
        with torch.device("meta"):
            return cuts, find_units(type(denoiser).from_config(config))
    # Where plain diffusers opens what is left, the manifest says which blocks are gone.
    folder = Path(getattr(denoiser.config, "_name_or_path", "") or "").parent
    if not (folder / MANIFEST).is_file():
        return cuts, Units({}, {})
    removed = (read_manifest(folder).pruning or {}).get("removed", [])
    blocks = {name: Part(name, "block") for name in map(str, removed) if _BLOCK.fullmatch(name)}
    return CutList(frozenset(blocks)), Units(blocks, {})


def _fitted(
    denoiser: Any, component: str, tensors: Mapping[str, Tensor], cuts: CutList, units: Units, where: str
) -> dict[str, Tensor]:
    gone = lost((units.groups[name], members) for name, members in cuts.kept.items())
    paths = {path for path, _ in denoiser.named_modules()}
    fitted: dict[str, Tensor] = {}
    known = used = 0
    for key, tensor in tensors.items():
        match = _PAIR.match(key)
        if not key.startswith(f"{component}."):
            if key.startswith("lora_"):
                raise AdapterError(
                    "The names of the adapter's tensors are those of another format",
                    where=f"{where}, {key[:80]}",
                    remedy="Save it with `save_lora_weights` of diffusers, or fuse it before pruning with --lora.",
                )
            fitted[key] = tensor
            continue
        if match is None:
            raise AdapterError(
                "A tensor of the adapter is no matrix of a LoRA",
                where=f"{where}, {key[:80]}",
                remedy="Fuse the adapter before pruning, with --lora.",
            )
        known += 1
        path = match["path"].removeprefix(f"{component}.")
        new = renamed(path, cuts, units)
        if new not in paths:
            continue
        used += 1
        axis = 1 if match["which"] in ("lora_A", "lora.down") else 0
        away = gone.get((f"{path}.weight", axis), [])
        if away and max(away) >= tensor.shape[axis]:
            raise AdapterError(
                f"The adapter is not of this model: {key[:80]} has the shape {list(tensor.shape)}",
                where=where,
                remedy="Use an adapter made for the model before it was pruned.",
            )
        stays = sorted({*range(tensor.shape[axis])} - {*away})
        cut = tensor.index_select(axis, torch.tensor(stays)) if away else tensor
        fitted[f"{component}.{new}.{match['which']}{match['rest']}"] = cut.contiguous()
    if known and not used:
        raise AdapterError(
            "All layers that the adapter is for were cut out",
            where=where,
            remedy="Fuse it before pruning, with --lora.",
        )
    return fitted
