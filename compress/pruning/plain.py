"""Cuts that a config of diffusers can say: a denoiser without some of its blocks then opens without dcomp.

Heads, hidden channels and missing branches have no key in any config; a whole block of a transformer has, and so has
each of the blocks within a U-Net's transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dcomp.compress.pruning.cut_list import CutList
from dcomp.compress.pruning.units import find_units

_COUNTS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
_PLACES = ("dual_attention_layers",)  # keys that name blocks by their place in the first of these lists
OF_THE_PROCESS = ("quantization_config", "_use_default_values")  # keys of a config that say nothing of shapes


def plain_config(denoiser: nn.Module, cuts: CutList, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config of a cut denoiser's shapes, or None if there is none.

    Args:
        denoiser: that was cut.
        cuts: that were made.
        config: of the original.
    """
    if cuts.kept or not cuts.removed:
        return None
    config = {key: value for key, value in config.items() if key not in OF_THE_PROCESS}
    original = _empty(type(denoiser), config)
    units = find_units(original)
    if any(units.parts[name].kind != "block" for name in cuts.removed):
        return None
    found = config | _lists(original, cuts) | _stages(denoiser)
    try:
        same = _shapes(_empty(type(denoiser), found)) == _shapes(denoiser)
    except Exception:  # a constructor that cannot make this says so in any way
        return None
    return found if same else None


def _lists(original: nn.Module, cuts: CutList) -> dict[str, Any]:
    """Return the keys of lists of blocks that lie in the denoiser itself."""
    changed: dict[str, Any] = {}
    config: Any = getattr(original, "config", {})
    for name, key in _COUNTS.items():
        blocks: Any = getattr(original, name, None)
        if blocks is None or key not in config:
            continue
        stay = [place for place in range(len(blocks)) if f"{name}.{place}" not in cuts.removed]
        changed[key] = len(stay)
        if name == "transformer_blocks":
            for places in _PLACES:
                if config.get(places) is not None:
                    changed[places] = [new for new, old in enumerate(stay) if old in config[places]]
    return changed


def _stages(denoiser: Any) -> dict[str, Any]:
    """Return the keys of a U-Net whose transformers have several blocks each."""
    if "transformer_layers_per_block" not in getattr(denoiser, "config", {}):
        return {}

    def depths(stage: Any) -> int | list[int]:
        found = [len(each.transformer_blocks) for each in getattr(stage, "attentions", ())]
        return found[0] if len({*found}) == 1 else found or 1

    down = [depths(stage) for stage in denoiser.down_blocks]
    middle = getattr(denoiser.mid_block, "attentions", ())
    if middle:
        count = len(middle[0].transformer_blocks)
        last = down[-1]
        if getattr(denoiser.down_blocks[-1], "attentions", ()) and last != count:
            return {}  # the middle takes the number of the last stage
        down[-1] = count
    return {
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": [depths(stage) for stage in denoiser.up_blocks],
    }


def _empty(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = kind.from_config(dict(config))
    return model


def _shapes(denoiser: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in denoiser.state_dict().items()}
