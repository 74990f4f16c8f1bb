"""Products of 4-bit inputs and weights in the emulator, and their operands as layers have them."""

import torch
from torch import Tensor

from dcomp.kernels.cuda import nibbles
from dcomp.kernels.cuda.arguments import LinearArguments, QuantizeNibblesArguments
from dcomp.kernels.cuda.nibbles import NibbleRows
from dcomp.kernels.packing import Stored, int8_image, pack_int4
from tests.support.emulated import Emulator, grid_of, type_of, untouched
from tests.support.products import integers

WARPS = 8  # of a block, a row each


class Operands:
    """Random inputs `[M, I]` and weights `[O, I]` in groups, their rows for the kernel and their int8 images."""

    def __init__(
        self, generator: torch.Generator, size: tuple[int, int, int], groups: tuple[int, int], block: int
    ) -> None:
        """Draw operands of M, O, I, with groups of inputs and of weights."""
        rows, outputs, channels = size
        group, count = groups[0], -(-channels // groups[0])
        codes = integers(generator, 0, 15, rows, channels, dtype=torch.uint8)
        zeros = integers(generator, 0, 15, rows, count, dtype=torch.uint8)
        sizes = integers(generator, 1, 15, rows, count, dtype=torch.uint8)
        sizes = torch.minimum(sizes, 127 // torch.maximum(zeros, 15 - zeros))
        self.inputs = nibbles.input_rows(codes, zeros, sizes, group, block)
        zero, size_ = (part.int().repeat_interleave(group, 1)[:, :channels] for part in (zeros, sizes))
        self.image = ((codes.int() - zero) * size_).to(torch.int8)
        group, count = groups[1], -(-channels // groups[1])
        multiplier = integers(generator, 1, 15, outputs, count)
        multiplier *= torch.randint(0, 2, multiplier.shape, generator=generator, dtype=torch.int8) * 2 - 1
        self.stored = Stored(pack_int4(integers(generator, -8, 7, outputs, count * group)), multiplier)
        self.weight, self.factor = nibbles.weight_rows(self.stored, channels, block)
        self.weight_image = int8_image(*self.stored, channels)

    def run(self, emulator: Emulator, name: str) -> Tensor:
        """Return the sums as a kernel has them, fp32 `[M, O]`."""
        outputs = len(self.weight_image)
        factor = torch.ones(outputs) if self.factor is None else self.factor
        return linear(emulator, name, self.inputs, self.weight, (torch.ones(len(self.image)), factor))

    def sums(self) -> Tensor:
        """Return what they are."""
        return (self.image.double() @ self.weight_image.double().t()).float()


def linear(
    emulator: Emulator, name: str, inputs: NibbleRows, weight: NibbleRows, scales: tuple[Tensor, Tensor]
) -> Tensor:
    """Return `[M, O]` fp32; scales are those of rows and columns."""
    rows, outputs = len(inputs.data), len(weight.data)
    out = untouched(rows, outputs)
    tensors = {
        "x": inputs.data,
        "weight": weight.data,
        "x_scale": scales[0],
        "weight_scale": scales[1],
        "bias": None,
        "out": out,
        "x_multipliers": inputs.multipliers,
        "weight_multipliers": weight.multipliers,
    }
    sizes = {"rows": rows, "outputs": outputs, "depth": inputs.data.shape[1], "corrections": inputs.corrections}
    emulator.launch(name, grid_of(name, rows, outputs), LinearArguments, **tensors, **sizes, out_type=type_of(out))
    return out


def quantize(emulator: Emulator, x: Tensor, group: int, block: int) -> tuple[NibbleRows, Tensor]:
    """Return rows of `[M, C]` and scales `[M]`."""
    rows, channels = x.shape
    codes = untouched(rows, nibbles.row_bytes(channels, block), dtype=torch.uint8)
    multipliers = untouched(nibbles.stages(channels), -(-rows // 4) * 4, 4, dtype=torch.uint8)
    scale = untouched(rows)
    sizes = {
        "rows": rows,
        "channels": channels,
        "depth": codes.shape[1],
        "group": -(-min(group, channels) // block) * block,
        "block": block,
        "x_type": type_of(x),
    }
    tensors = {"x": x, "codes": codes, "multipliers": multipliers, "scale": scale}
    emulator.launch("quantize_nibbles", (-(-rows // WARPS), 1), QuantizeNibblesArguments, **tensors, **sizes)
    return NibbleRows(codes, multipliers, nibbles.corrections(channels, block)), scale


def same_rows(found: tuple[NibbleRows, Tensor], expected: tuple[NibbleRows, Tensor]) -> bool:
    """Whether rows and their scales are equal, NaN in the same places."""
    count = len(found[1])
    return (
        torch.equal(found[0].data, expected[0].data)
        and torch.equal(found[0].multipliers[:, :count], expected[0].multipliers[:, :count])
        and torch.equal(found[1].nan_to_num(nan=-7.25), expected[1].nan_to_num(nan=-7.25))
    )
