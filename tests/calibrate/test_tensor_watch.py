import pytest
import torch
from torch import Tensor, nn

from dcomp.calibrate.tensor_watch import TensorWatch

CONV, LINEAR = nn.Conv2d(6, 2, 1), nn.Linear(6, 2)


def images(*channels: int) -> list[Tensor]:
    return [torch.randn(1, c, 4, 4) for c in channels]


def read_by(layer: nn.Module, make) -> TensorWatch:
    watch = TensorWatch(torch.zeros(1))
    with watch:
        x = make()
    watch.reads("layer", layer, x)
    return watch


@pytest.mark.parametrize("cat", [torch.cat, torch.concat, torch.concatenate])
@pytest.mark.parametrize("dim", [1, -3])
def test_convolution_sees_the_parts_of_its_channel_axis(cat, dim: int) -> None:
    watch = read_by(CONV, lambda: cat(images(1, 2, 3), dim=dim))
    assert watch.boundaries == {"layer": (1, 3)}
    assert watch.direct == {"layer"}


def test_linear_sees_the_parts_of_its_last_axis_and_tokens_are_no_channels() -> None:
    a, b = torch.randn(1, 5, 2), torch.randn(1, 5, 4)
    assert read_by(LINEAR, lambda: torch.cat((a, b), -1)).boundaries == {"layer": (2,)}
    tokens = [torch.randn(1, 3, 6), torch.randn(1, 4, 6)]
    assert read_by(LINEAR, lambda: torch.cat(tokens, 1)).boundaries == {}
    assert read_by(CONV, lambda: torch.cat(images(6, 6), 0)).boundaries == {}
    assert read_by(CONV, lambda: torch.cat(images(6, 6))).boundaries == {}


@pytest.mark.parametrize(
    ("layer", "direct"),
    [
        (nn.GroupNorm(2, 6), False),
        (nn.SiLU(), False),
        (nn.GELU(), False),
        (nn.Dropout(0.5).eval(), True),
        (nn.Upsample(scale_factor=2), True),
        (nn.AvgPool2d(2), True),
    ],
)
def test_boundaries_pass_what_keeps_channels_apart(layer: nn.Module, direct: bool) -> None:
    watch = read_by(CONV, lambda: layer(torch.cat(images(2, 4), 1).to(torch.float32)))
    assert watch.boundaries == {"layer": (2,)}
    assert watch.direct == ({"layer"} if direct else set())


def test_layer_norm_keeps_the_boundaries_of_features() -> None:
    parts = [torch.randn(1, 5, 2), torch.randn(1, 5, 4)]
    watch = read_by(LINEAR, lambda: nn.LayerNorm(6)(torch.cat(parts, 2)))
    assert (watch.boundaries, watch.direct) == ({"layer": (2,)}, set())


def test_boundaries_end_where_channels_are_mixed() -> None:
    assert read_by(CONV, lambda: nn.Conv2d(6, 6, 1)(torch.cat(images(2, 4), 1))).boundaries == {}
    assert read_by(CONV, lambda: torch.cat(images(2, 4), 1).flip(1)).boundaries == {}


def test_concatenations_nest() -> None:
    watch = read_by(CONV, lambda: torch.cat([*images(1), torch.cat(images(2, 3), 1)], 1))
    assert watch.boundaries == {"layer": (1, 3)}


def test_pieces_of_one_tensor_are_no_concatenation() -> None:
    (image,) = images(6)
    assert read_by(CONV, lambda: torch.cat([image[:, 3:], image[:, :3]], 1)).boundaries == {}


def test_functions_of_the_latents_alone_are_still_the_latents() -> None:
    latents, other = images(6, 6)
    watch = TensorWatch(latents)
    with watch:
        made = {
            "same": latents,
            "affine": 2 * latents - 1,
            "tokens": latents.flatten(2).transpose(1, 2),
            "patches": nn.functional.pixel_unshuffle(latents, 2),
            "half": latents.chunk(2, dim=1)[1],
            "sum": latents + other,
            "other": other * 2,
            "layer": nn.Conv2d(6, 6, 1, bias=False)(latents),
        }
    for name, x in made.items():
        watch.reads(name, LINEAR, x)
    assert watch.first == {"same", "affine", "tokens", "patches", "half"}


def test_readers_of_one_tensor_share_a_number() -> None:
    x, y = images(6, 6)
    watch = TensorWatch(x)
    for name, read in (("q", x), ("k", x), ("q", y), ("o", torch.zeros(6)), ("v", y)):
        watch.reads(name, LINEAR, read)
    numbers = watch.inputs
    assert numbers["q"] == numbers["k"]
    assert len({numbers[name] for name in "qov"}) == 3


def test_a_number_outlives_no_tensor() -> None:
    watch = TensorWatch(torch.zeros(1))
    for name in "abcdefgh":
        watch.reads(name, LINEAR, torch.zeros(6))  # the allocator gives the same memory, often the same id
    assert len(set(watch.inputs.values())) == 8
