// C[M, N] = act(A[M, K] W[K, N] + bias) + residual on sparse tensor cores: at most two of every four
// elements of a column of W. The sparse operand of mma.sp is the first, so that a warp makes C
// transposed, which goes through shared memory on its way out.
#ifndef ICD_GEMM_24
#define ICD_GEMM_24

namespace icd {

// A tile has 64 elements of K: 128 bytes of a row of A, 64 bytes of the kept elements of a column of
// W, and 8 bytes that say which they are.
template <class T_, class OUT_, int BM_, int BN_, int WM_, int WN_, int STAGES_, int ACT_, bool BIAS_,
          bool RESIDUAL_>
struct Gemm24Config {
  typedef T_ T;
  typedef OUT_ Out;
  static const int BM = BM_, BN = BN_, WM = WM_, WN = WN_, STAGES = STAGES_, ACT = ACT_;
  static const bool BIAS = BIAS_, RESIDUAL = RESIDUAL_;
  static const int THREADS = (BM / WM) * (BN / WN) * 32;
  static const int A_BYTES = BM * 128, W_BYTES = BN * 64, META_BYTES = BN * 8;
  static const int STAGE = A_BYTES + W_BYTES + META_BYTES;
  // Of C in shared memory: four floats more, so that a warp writes to all banks.
  static const int LINE = BN + 4;
};

template <class G> struct Gemm24Tile {
  const u8 *a, *w, *meta;
  int m0, m, k_chunks, row_bytes;

  ICD_DEVICE void load(u8* stage, int tile, int thread) const {
#pragma unroll
    for (int i = 0; i < G::BM * 8 / G::THREADS; ++i) {
      int at = thread + i * G::THREADS, row = at / 8, c = at % 8, chunk = tile * 8 + c;
      bool valid = chunk < k_chunks && m0 + row < m;
      const u8* from = valid ? a + (long)(m0 + row) * row_bytes + chunk * 16 : a;
      copy_async(stage + wide_swizzle(row, c), from, valid);
    }
    u8* kept = stage + G::A_BYTES;
#pragma unroll
    for (int i = 0; i < G::BN * 4 / G::THREADS; ++i) {
      int at = thread + i * G::THREADS;
      copy_async(kept + swizzle(at / 4, at % 4), w + (long)tile * G::W_BYTES + at * 16, true);
    }
    if (thread < G::META_BYTES / 16)
      copy_async(kept + G::W_BYTES + thread * 16, meta + (long)tile * G::META_BYTES + thread * 16, true);
  }
};

template <class G>
ICD_DEVICE void gemm_24_stage(float (&acc)[G::WN / 16][G::WM / 8][4], const u8* stage, int wm, int wn,
                              int lane) {
  const u8* kept = stage + G::A_BYTES;
  const u32* words = (const u32*)(kept + G::W_BYTES);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    u32 fw[G::WN / 16][4], meta[G::WN / 16];
#pragma unroll
    for (int i = 0; i < G::WN / 16; ++i) {
      load_matrix(fw[i], kept + swizzle(wn + i * 16 + lane % 16, step * 2 + lane / 16));
      meta[i] = words[((wn / 16 + i) * 2 + step) * 16 + lane / 4 * 2 + lane % 2];
    }
#pragma unroll
    for (int j = 0; j < G::WM / 8; ++j) {
      u32 fa[4];
      load_matrix(fa, stage + wide_swizzle(wm + j * 8 + lane % 8, step * 4 + lane / 8));
#pragma unroll
      for (int i = 0; i < G::WN / 16; ++i) mma_sparse(typename G::T(), acc[i][j], fw[i], fa, meta[i]);
    }
  }
}

// Grid: x column blocks, y row blocks. w: T[column blocks, tiles, BN, 32] kept elements; meta:
// u32[column blocks, tiles, BN / 16, 2 halves of the tile, 8 rows, 2 halves of a product].
template <class G>
ICD_DEVICE void gemm_24(void* c, const void* a, const void* w, const void* meta, const void* bias,
                        const void* residual, int m, int n, int k, int tiles, void* shared) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int wm = warp / (G::BN / G::WN) * G::WM, wn = warp % (G::BN / G::WN) * G::WN;
  u8* stages = (u8*)shared;
  Gemm24Tile<G> tile;
  tile.a = (const u8*)a;
  tile.w = (const u8*)w + (long)blockIdx.x * tiles * G::W_BYTES;
  tile.meta = (const u8*)meta + (long)blockIdx.x * tiles * G::META_BYTES;
  tile.m0 = blockIdx.y * G::BM;
  tile.m = m;
  tile.row_bytes = k * 2;
  tile.k_chunks = k / 8;

  float acc[G::WN / 16][G::WM / 8][4];
#pragma unroll
  for (int i = 0; i < G::WN / 16; ++i)
#pragma unroll
    for (int j = 0; j < G::WM / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;

#pragma unroll
  for (int s = 0; s < G::STAGES - 1; ++s) {
    if (s < tiles) tile.load(stages + s * G::STAGE, s, thread);
    copy_commit();
  }
  for (int t = 0; t < tiles; ++t) {
    copy_wait<G::STAGES - 2>();
    // Also: all warps are done with the stage that is filled next.
    sync_block();
    int ahead = t + G::STAGES - 1;
    if (ahead < tiles) tile.load(stages + ahead % G::STAGES * G::STAGE, ahead, thread);
    copy_commit();
    gemm_24_stage<G>(acc, stages + t % G::STAGES * G::STAGE, wm, wn, lane);
  }

  sync_block();
  float* out = (float*)shared;
#pragma unroll
  for (int i = 0; i < G::WN / 16; ++i)
#pragma unroll
    for (int j = 0; j < G::WM / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int row = wm + j * 8 + lane % 4 * 2 + e % 2, column = wn + i * 16 + lane / 4 + e / 2 * 8;
        out[row * G::LINE + column] = acc[i][j][e];
      }
  sync_block();
  for (int at = thread; at < G::BM * G::BN / 2; at += G::THREADS) {
    int in_row = at % (G::BN / 2) * 2, column = blockIdx.x * G::BN + in_row;
    int in_block = at / (G::BN / 2), row = tile.m0 + in_block;
    if (row >= m || column >= n) continue;
    float2 two = load_two(F32(), out, in_block * G::LINE + in_row);
    const GemmColumns<G> columns(bias, nullptr, column);
    columns.finish(c, two.x, two.y, residual, nullptr, row, (long)row * n + column);
  }
}

}  // namespace icd
#endif
