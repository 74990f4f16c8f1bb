"""The entry points of `kernels.cu`: threads and shared memory of a block, and the tile of the output that it makes."""

from dataclasses import dataclass

_STEP = 64  # of K, as in products.cuh
# Of a column in a stage, multipliers among them; rows of `_NIBBLES` have some too.
_WEIGHT_BYTES = {"w8a8": 64, "w4a8": 36, "w4a8_channel": 32, "w4a4_group64": 68, "w4a4_group32": 72}
_NIBBLES = ("w4a4_group64", "w4a4_group32")
_STAGES = {("w4a8", 256): 4, ("w4a8_channel", 256): 4, ("w4a8_channel", 128): 4}  # 3 of all others


@dataclass(frozen=True)
class Entry:
    """A kernel as the host must launch it.

    Attributes:
        threads: of a block.
        shared_memory: bytes of a block.
        rows, columns: of the output, that a block makes; 0 where blocks share work otherwise (see `arguments.h`), and
            columns where it makes all of them.
    """

    name: str
    threads: int
    shared_memory: int = 0
    rows: int = 0
    columns: int = 0


def _product(operation: str, weight: str, rows: int, columns: int, branch: str = "") -> Entry:
    stages = _STAGES.get((weight, rows), 3)
    threads = {256: 256, 128: 256, 64: 128}[rows]
    of_row = _STEP + 4 if weight in _NIBBLES else _STEP
    shared_memory = stages * (rows * of_row + columns * _WEIGHT_BYTES[weight])
    return Entry(f"{operation}_{weight}{branch}_{rows}x{columns}", threads, shared_memory, rows, columns)


def _attention(width: int, rows: int, threads: int) -> Entry:
    tile = 64 * (-(-width // 32) * 32 + 8 + 2 * width)  # of keys, as in key_value_tiles.cuh
    return Entry(f"attention_{width}", threads, 2 * tile, rows)


TILES = ((256, 128), (128, 128), (64, 64))
LOW_RANK = "_low_rank"  # behind the kind of a product with a branch
_NO_TILE = {"w4a4_group32": (256, 128)}  # devices that take it have blocks of 64 alone, see rows.py
_PRODUCTS = [
    *(_product("linear", weight, *tile) for weight in _WEIGHT_BYTES for tile in TILES if tile != _NO_TILE.get(weight)),
    *(_product("linear", weight, *tile, LOW_RANK) for weight in _WEIGHT_BYTES for tile in TILES[1:]),
    *(_product("conv", weight, *tile) for weight in _WEIGHT_BYTES for tile in TILES if weight not in _NIBBLES),
]
_ATTENTION = [
    _attention(48, 128, 128),
    _attention(64, 128, 128),
    _attention(80, 128, 256),
    _attention(128, 128, 256),
    _attention(160, 128, 256),
]
_OTHERS = [
    Entry("key_value_moments", 256, 2048),
    Entry("key_value_tiles", 256, 2048),
    Entry("quantize_static", 256),
    Entry("sample_range", 256, 64),
    Entry("quantize_sample", 256),
    Entry("quantize_token", 256),
    Entry("group_peak", 256, 32),
    Entry("quantize_group", 256),
    Entry("quantize_group_token", 256),
    Entry("low_rank_token", 256, 32768),
    Entry("low_rank_group", 256, 32768),
    Entry("quantize_nibbles", 256),
    Entry("unpack_int8", 256),
    Entry("unpack_int4", 256),
    Entry("group_norm_moments", 256),
    Entry("group_norm_range", 256, 2112),
    Entry("group_norm_static", 256, 2112),
    Entry("group_norm_sample", 256, 2112),
    Entry("layer_norm_token", 256),
]
ENTRIES = {entry.name: entry for entry in (*_PRODUCTS, *_ATTENTION, *_OTHERS)}
