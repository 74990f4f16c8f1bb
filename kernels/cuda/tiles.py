"""The entry points of `kernels.cu`: threads and shared memory of a block, and the tile of the output that it makes."""

from dataclasses import dataclass

_STEP = 64  # of K, as in products.cuh
_WEIGHT_BYTES = {"w8a8": 64, "w4a8": 36, "w4a8_channel": 32}  # of a column in a stage
_STAGES = {("w4a8", 256): 4, ("w4a8_channel", 256): 4, ("w4a8_channel", 128): 4}  # 3 of all others


@dataclass(frozen=True)
class Entry:
    """A kernel as the host must launch it.

    Attributes:
        threads: of a block.
        shared_memory: bytes of a block.
        rows, columns: of the output, that a block makes; 0 where blocks share work otherwise (see `arguments.h`).
    """

    name: str
    threads: int
    shared_memory: int = 0
    rows: int = 0
    columns: int = 0


def _product(operation: str, weight: str, rows: int, columns: int) -> Entry:
    stages = _STAGES.get((weight, rows), 3)
    threads = {256: 256, 128: 256, 64: 128}[rows]
    shared_memory = stages * (rows * _STEP + columns * _WEIGHT_BYTES[weight])
    return Entry(f"{operation}_{weight}_{rows}x{columns}", threads, shared_memory, rows, columns)


TILES = ((256, 128), (128, 128), (64, 64))
_PRODUCTS = [
    _product(operation, weight, *tile) for operation in ("linear", "conv") for weight in _WEIGHT_BYTES for tile in TILES
]
_OTHERS = [
    Entry("quantize_static", 256),
    Entry("sample_range", 256, 64),
    Entry("quantize_sample", 256),
    Entry("quantize_token", 256),
    Entry("group_peak", 256, 32),
    Entry("quantize_group", 256),
    Entry("quantize_group_token", 256),
    Entry("low_rank_token", 256, 32768),
    Entry("low_rank_group", 256, 32768),
    Entry("unpack_int8", 256),
    Entry("unpack_int4", 256),
    Entry("group_norm_moments", 256),
    Entry("group_norm_range", 256, 2112),
    Entry("group_norm_static", 256, 2112),
    Entry("group_norm_sample", 256, 2112),
    Entry("layer_norm_token", 256),
]
ENTRIES = {entry.name: entry for entry in (*_PRODUCTS, *_OTHERS)}
