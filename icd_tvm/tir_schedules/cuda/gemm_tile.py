"""What a block of a matmul kernel makes of C: the choices, and which one fits a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

from icd_tvm.tir_schedules.cuda.archs import HOPPER, SMS

ROW = 64  # bytes of K in a tile
STAGES = 4
LAUNCH = 500  # rows of 64 bytes that a multiprocessor reads from DRAM in 1 us
# Lines that wgmma reads begin at multiples of this; what a block is given need not.
WGMMA_LINES = 1024
# Fewer rows of A do not fill tiles of wgmma.
WGMMA_ROWS = 256


@dataclass(frozen=True)
class GemmTile:
    """Rows and columns of C that a block and a warp make, and parts of K.

    With ``wgmma`` four warps together make 64 rows and all columns; a stage holds two tiles of K.
    """

    m: int
    n: int
    warp_m: int
    warp_n: int
    splits: int = 1
    stages: int = STAGES
    wgmma: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.m // self.warp_m * (self.n // self.warp_n) * 32

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        tile = (self.m + self.n) * ROW
        return self.stages * 2 * tile + WGMMA_LINES if self.wgmma else self.stages * tile


# Large ones first: the more of C a block makes, the fewer bytes it reads for an operation.
TILES = (
    GemmTile(128, 128, 64, 32),
    GemmTile(128, 64, 32, 32),
    GemmTile(64, 128, 32, 32),
    GemmTile(64, 64, 32, 32),
    GemmTile(32, 64, 16, 32),
    GemmTile(16, 64, 16, 16),
)
# Three stages, so that two blocks share a multiprocessor: one multiplies while the other writes C.
WGMMA_TILES = (
    GemmTile(128, 256, 16, 256, wgmma=True),
    GemmTile(128, 128, 16, 128, stages=3, wgmma=True),
    GemmTile(64, 128, 16, 128, wgmma=True),
)


def tiles_of(m: int, dtype: str, arch: str) -> tuple[GemmTile, ...]:
    """Return the tiles to choose from: those of wgmma on sm_90a, for many rows.

    Parameters
    ----------
    m : int
        Rows of A.
    dtype : str
        Of A and W.
    arch : str
        A key of `SMS`.
    """
    has = arch == HOPPER and m >= WGMMA_ROWS and dtype in ("float16", "bfloat16", "int8")
    return WGMMA_TILES if has else TILES


def choose_tile(
    m: int,
    n: int,
    k_tiles: int,
    arch: str,
    columns: int | None = None,
    *,
    tiles: tuple[GemmTile, ...] = TILES,
    parts: bool = True,
) -> GemmTile:
    """Return the tile of least modelled time, with parts of K where too few blocks fill the device.

    Parameters
    ----------
    m, n : int
        Rows and columns of C.
    k_tiles : int
        Tiles of K, each of 64 bytes.
    arch : str
        A key of `SMS`.
    columns : int, optional
        Columns that a block must have: those of a group with one list of live blocks.
    tiles : tuple of GemmTile
        To choose from.
    parts : bool
        Whether K may be parted.
    """
    fits = [tile for tile in tiles if columns in (None, tile.n)]
    if parts:
        fits += [_split(tile, m, n, k_tiles, SMS[arch]) for tile in fits]
    return min(fits, key=lambda tile: _cost(tile, m, n, k_tiles, SMS[arch]))


def _split(tile: GemmTile, m: int, n: int, k_tiles: int, sms: int) -> GemmTile:
    blocks = -(-m // tile.m) * -(-n // tile.n)
    # A part must be long enough to fill its stages, and its sums cost traffic.
    splits = max(1, min(sms // blocks, k_tiles // (2 * STAGES), 8)) if m <= 128 else 1
    return replace(tile, splits=splits)


def _cost(tile: GemmTile, m: int, n: int, k_tiles: int, sms: int) -> float:
    """Return modelled time, in rows of 64 bytes that a multiprocessor loads.

    Waves of blocks times what one loads or computes; parts of K are written and read once more, in
    float32, and cost a launch.
    """
    blocks = -(-m // tile.m) * -(-n // tile.n) * tile.splits
    # Small tiles are bound by the bytes they load: a tile of 128 x 128 hides them.
    work = max(tile.m * tile.n / 128, tile.m + tile.n)
    sums = 8 * tile.splits * m * n / ROW / sms + LAUNCH if tile.splits > 1 else 0
    return float(-(-blocks // sms) * work * -(-k_tiles // tile.splits) + sums)
