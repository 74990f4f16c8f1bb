"""Distances between calls, against tensors that hooks saw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dcomp.cachequant.drift import record_reference
from dcomp.cachequant.zones import find_zones
from dcomp.calibrate.pipeline import open_pipeline
from tests.cachequant.conftest import prompts_of, settings_of

STEPS, WINDOW = 5, 3


def test_distances_are_those_of_what_the_modules_returned(folder_of: Callable[[str], Path], recorded_call: Any) -> None:
    name = "UNet2DConditionModel"
    zones = {zone.name: zone for zone in find_zones(*recorded_call(name))}
    pipeline = open_pipeline(folder_of(name))
    chosen = [zones["all"], zones["deep2"]]
    seen: dict[str, list[Tensor]] = {zone.name: [] for zone in chosen}
    hooks = [
        pipeline.denoiser.get_submodule(zone.predicted[0]).register_forward_hook(
            lambda module, args, output, own=seen[zone.name]: own.append(
                (output if isinstance(output, Tensor) else output[0]).double()
            )
        )
        for zone in chosen
    ]
    settings = settings_of(pipeline, STEPS, batch_size=2)
    pipeline.run(prompts_of(pipeline, 3), range(3), settings, decode=False)
    for hook in hooks:
        hook.remove()
    found = record_reference(pipeline, chosen, prompts_of(pipeline, 3), range(3), settings, window=WINDOW)
    assert len(found.timesteps) == STEPS
    assert found.timesteps[0] > found.timesteps[-1]
    for zone, tensors in seen.items():
        # Two batches, of two samples and of one, each with guidance.
        calls = [torch.cat((tensors[i], tensors[STEPS + i])) for i in range(STEPS)]
        assert found.bytes_kept[zone] == tensors[STEPS].nbytes // 2
        drift = found.drifts[zone]
        for s in range(STEPS):
            for t in range(STEPS):
                if t - s >= WINDOW:
                    assert drift.absolute[s, t] == drift.cosine[s, t] == torch.inf
                elif t <= s:
                    assert drift.absolute[s, t] == drift.cosine[s, t] == 0
                else:
                    distance = (calls[t] - calls[s]).abs().sum()
                    assert float(drift.absolute[s, t]) == pytest.approx(float(distance))
                    cosine = 1 - cosine_similarity(calls[s].flatten(1), calls[t].flatten(1)).mean()
                    assert float(drift.cosine[s, t]) == pytest.approx(float(cosine), abs=1e-9)
