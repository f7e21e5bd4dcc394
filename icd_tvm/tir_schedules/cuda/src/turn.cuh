// [rows, columns] to [columns, stride] of 16-bit elements, zeros beyond `rows`.
#ifndef ICD_TURN
#define ICD_TURN

namespace icd {

// 64 x 64 elements a block of 128 threads; a row of the tile has one element more against conflicts.
struct TurnConfig { static const int TILE = 64, THREADS = 128, ROW = TILE + 2; };

template <class G>
ICD_DEVICE void turn(void* to, const void* from, int rows, int columns, int stride, void* shared) {
  u16* tile = (u16*)shared;
  const int column0 = blockIdx.x * G::TILE, row0 = blockIdx.y * G::TILE;
#pragma unroll
  for (int i = 0; i < G::TILE * G::TILE / 8 / G::THREADS; ++i) {
    int at = threadIdx.x + i * G::THREADS, row = row0 + at / 8, column = column0 + at % 8 * 8;
    Chunk chunk = {{0, 0, 0, 0}};
    if (row < rows && column < columns)
      chunk = load_chunk((const u8*)from + ((long)row * columns + column) * 2);
#pragma unroll
    for (int e = 0; e < 8; ++e)
      tile[at / 8 * G::ROW + at % 8 * 8 + e] = (u16)(chunk.w[e / 2] >> (e % 2 * 16));
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < G::TILE * G::TILE / 2 / G::THREADS; ++i) {
    int at = threadIdx.x + i * G::THREADS, column = at / 32, row = at % 32 * 2;
    if (column0 + column >= columns || row0 + row >= stride) continue;
    u32 two = tile[row * G::ROW + column] | (u32)tile[(row + 1) * G::ROW + column] << 16;
    ((u32*)to)[((long)(column0 + column) * stride + row0 + row) / 2] = two;
  }
}

}  // namespace icd
#endif
