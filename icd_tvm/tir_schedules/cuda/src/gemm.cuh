// C[M, N] = act(A[M, K] W[K, N] + bias) + residual on tensor cores, dense or with dead blocks of W.
// Stages of A and W tiles come by cp.async into swizzled shared memory; fragments by ldmatrix.
#ifndef ICD_GEMM
#define ICD_GEMM

namespace icd {

// What sums a tile of C: warps, or warpgroups of 128 threads (gemm_wgmma.cuh, sm_90a alone).
struct Mma {};
struct Wgmma {};

// What the kernel is compiled for. Rows of a tile hold 64 bytes of K: 32 fp16 or 64 int8
// or fp8.
template <class T_, class OUT_, int BM_, int BN_, int WM_, int WN_, int STAGES_, int ACT_, bool BIAS_,
          bool RESIDUAL_, int SLAB_, int SPLITS_, bool STRAYS_ = false, class PATH_ = Mma>
struct GemmConfig {
  typedef T_ T;
  typedef OUT_ Out;
  typedef PATH_ Path;
  static const int BM = BM_, BN = BN_, WM = WM_, WN = WN_, STAGES = STAGES_, ACT = ACT_;
  static const bool BIAS = BIAS_, RESIDUAL = RESIDUAL_, STRAYS = STRAYS_;
  // Chunks of 16 bytes in a live block of W; 0: dense.
  static const int SLAB = SLAB_, SPLITS = SPLITS_;
  static const int CHUNKS = 4, ROW = 64;
  static const int THREADS = (BM / WM) * (BN / WN) * 32;
  static const int A_BYTES = BM * ROW, STAGE = A_BYTES + BN * ROW;
};

// Rows r and r + 1 share a 128-byte line; the exclusive or spreads 8 rows over all banks.
ICD_DEVICE int swizzle(int row, int chunk) { return row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4); }
// Any 8 rows of 128 bytes meet all banks once.
ICD_DEVICE int wide_swizzle(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

template <class G> struct GemmTile {
  const u8* a;
  const u8* w;       // tiles of this column block, [tile][BN][64 bytes]
  const int* slabs;  // live blocks of this column block, -1 where padded
  int m0, m, k_chunks, row_bytes;

  ICD_DEVICE int chunk_of(int tile, int c) const {
    int at = tile * G::CHUNKS + c;
    if (G::SLAB == 0) return at < k_chunks ? at : -1;
    int block = slabs[at / (G::SLAB ? G::SLAB : 1)];
    int chunk = block * G::SLAB + at % (G::SLAB ? G::SLAB : 1);
    return block < 0 || chunk >= k_chunks ? -1 : chunk;
  }
  ICD_DEVICE void load(u8* stage, int tile, int thread) const {
#pragma unroll
    for (int i = 0; i < (G::BM * G::CHUNKS + G::THREADS - 1) / G::THREADS; ++i) {
      int at = thread + i * G::THREADS, row = at / G::CHUNKS, c = at % G::CHUNKS;
      // Fewer pieces than threads where a block makes 16 rows.
      if (G::BM * G::CHUNKS < G::THREADS && at >= G::BM * G::CHUNKS) break;
      int chunk = chunk_of(tile, c);
      bool valid = chunk >= 0 && m0 + row < m;
      const u8* from = valid ? a + (long)(m0 + row) * row_bytes + chunk * 16 : a;
      copy_async(stage + swizzle(row, c), from, valid);
    }
    const u8* tile_w = w + (long)tile * G::BN * G::ROW;
#pragma unroll
    for (int i = 0; i < G::BN * G::CHUNKS / G::THREADS; ++i) {
      int at = thread + i * G::THREADS;
      copy_async(stage + G::A_BYTES + swizzle(at / G::CHUNKS, at % G::CHUNKS), tile_w + at * 16, true);
    }
  }
};

template <class G>
ICD_DEVICE void gemm_stage(typename G::T::Acc (&acc)[G::WM / 16][G::WN / 8][4], const u8* stage,
                           int wm, int wn, int lane) {
#pragma unroll
  for (int step = 0; step < G::CHUNKS / 2; ++step) {
    u32 fa[G::WM / 16][4], fb[G::WN / 16][4];
#pragma unroll
    for (int i = 0; i < G::WM / 16; ++i)
      load_matrix(fa[i], stage + swizzle(wm + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < G::WN / 16; ++j)
      load_matrix(fb[j], stage + G::A_BYTES +
                             swizzle(wn + j * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < G::WM / 16; ++i)
#pragma unroll
      for (int j = 0; j < G::WN / 8; ++j)
        mma(typename G::T(), acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
  }
}

// Adds tiles `first` to `last` of K; `stages` is shared memory.
template <class G>
ICD_DEVICE void gemm_sums(Mma, typename G::T::Acc (&acc)[G::WM / 16][G::WN / 8][4],
                          const GemmTile<G>& tile, int first, int last, u8* stages) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int wm = warp / (G::BN / G::WN) * G::WM, wn = warp % (G::BN / G::WN) * G::WN;
#pragma unroll
  for (int s = 0; s < G::STAGES - 1; ++s) {
    if (first + s < last) tile.load(stages + s * G::STAGE, first + s, thread);
    copy_commit();
  }
  for (int t = first; t < last; ++t) {
    copy_wait<G::STAGES - 2>();
    // Also: all warps are done with the stage that is filled next.
    sync_block();
    int ahead = t + G::STAGES - 1;
    if (ahead < last) tile.load(stages + (ahead - first) % G::STAGES * G::STAGE, ahead, thread);
    copy_commit();
    gemm_stage<G>(acc, stages + (t - first) % G::STAGES * G::STAGE, wm, wn, lane);
  }
}

// Elements of W outside its live blocks, by column: `starts` int32[N + 1] counts fours in `list`, whose
// words hold an input in the low half and a value in the high half. `turned`: A as [K, stride], so
// that a warp reads neighbouring rows of one input together.
struct Strays {
  const int* starts;
  const void* list;
  const void* turned;
  int stride;
};

// `row` and `column`: of the thread's first element of C.
template <class G>
ICD_DEVICE void add_strays(float (&acc)[G::WM / 16][G::WN / 8][4], const Strays& strays, int row,
                           int column, int n) {
#pragma unroll
  for (int j = 0; j < G::WN / 8; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int at = column + j * 8 + e;
      if (at >= n) continue;
      for (int four = strays.starts[at]; four < strays.starts[at + 1]; ++four) {
        Chunk some = load_chunk((const u8*)strays.list + (long)four * 16);
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          float value = widen(typename G::T(), (u16)(some.w[s] >> 16));
          long from = (long)(some.w[s] & 0xffff) * strays.stride + row;
#pragma unroll
          for (int i = 0; i < G::WM / 16; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
              acc[i][j][half * 2 + e] +=
                  value * load_one(typename G::T(), strays.turned, from + i * 16 + half * 8);
        }
      }
    }
}

// What only products of int8 have. `row_zero`: the zero points of A, or null; what they add is taken
// away by the sums of the columns of W. `codes`: of C where it is int8.
struct GemmEnd {
  const float* row_zero;
  const float* column_sums;
  Codes codes;
};

// What an epilogue reads for two neighbouring columns, once for all rows.
template <class G> struct GemmColumns {
  float2 bias, scale, sums;
  bool scaled;
  GemmEnd end;

  ICD_DEVICE GemmColumns(const void* bias_, const float* column_scale, int column,
                         GemmEnd end_ = GemmEnd()) {
    end = end_;
    sums = end.row_zero ? load_two(F32(), end.column_sums, column) : make_float2(0, 0);
    scaled = column_scale != nullptr;
    bias = G::BIAS && bias_ ? load_two(F32(), bias_, column) : make_float2(0, 0);
    scale = scaled ? load_two(F32(), column_scale, column) : make_float2(1, 1);
  }
  // int8 and fp8 products are scaled by row of A and column of W.
  ICD_DEVICE float2 value(float x, float y, const float* row_scale, int row) const {
    if (end.row_zero) {
      x -= end.row_zero[row] * sums.x;
      y -= end.row_zero[row] * sums.y;
    }
    if (scaled) {
      const float by = row_scale ? row_scale[row] : 1.0f;
      x *= by * scale.x;
      y *= by * scale.y;
    }
    return make_float2(activate<G::ACT>(x + bias.x), activate<G::ACT>(y + bias.y));
  }
  ICD_DEVICE void finish(void* c, float x, float y, const void* residual, const float* row_scale,
                         int row, long at) const {
    float2 two = value(x, y, row_scale, row);
    if constexpr (G::RESIDUAL) {
      float2 more = load_two(typename G::Out(), residual, at);
      two.x += more.x;
      two.y += more.y;
    }
    store_two(typename G::Out(), c, at, coded(typename G::Out(), two.x, end.codes),
              coded(typename G::Out(), two.y, end.codes));
  }
};

// What is written where; `end` and the scales are those of integers and fp8.
template <class G> struct GemmResult {
  void* c;
  const void *bias, *residual;
  const float *row_scale, *column_scale;
  int m, n;
  GemmEnd end;
};

// Writes a tile; `row` and `column` of C: of the thread's first sum.
template <class G>
ICD_DEVICE void gemm_write(Mma, const typename G::T::Acc (&acc)[G::WM / 16][G::WN / 8][4],
                           const GemmResult<G>& to, int first_row, int first_column) {
#pragma unroll
  for (int j = 0; j < G::WN / 8; ++j) {
    int column = first_column + j * 8;
    if (column >= to.n) continue;
    const GemmColumns<G> columns(to.bias, to.column_scale, column, to.end);
#pragma unroll
    for (int i = 0; i < G::WM / 16; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int row = first_row + i * 16 + half * 8;
        if (row >= to.m) continue;
        float x = (float)acc[i][j][half * 2], y = (float)acc[i][j][half * 2 + 1];
        if (G::SPLITS > 1)
          store_two(F32(), to.c, ((long)blockIdx.z * to.m + row) * to.n + column, x, y);
        else
          columns.finish(to.c, x, y, to.residual, to.row_scale, row, (long)row * to.n + column);
      }
  }
}

// Grid: x column blocks, y row blocks, z parts of K. With parts, C is float32[SPLITS, M, N] of plain
// sums. `slabs` is int32[column blocks, tiles * 64 / 16 / SLAB]; `tiles` of K for each column block.
template <class G>
ICD_DEVICE void gemm(void* c, const void* a, const void* w, const void* slabs, const void* bias,
                     const void* residual, const float* row_scale, const float* column_scale,
                     int m, int n, int k, int tiles, void* shared, Strays strays = Strays(),
                     GemmEnd end = GemmEnd()) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int wm = warp / (G::BN / G::WN) * G::WM, wn = warp % (G::BN / G::WN) * G::WN;
  const int per_part = (tiles + G::SPLITS - 1) / G::SPLITS, first = blockIdx.z * per_part;
  const int last = first + per_part < tiles ? first + per_part : tiles;
  GemmTile<G> tile;
  tile.a = (const u8*)a;
  tile.w = (const u8*)w + (long)blockIdx.x * tiles * G::BN * G::ROW;
  tile.slabs = (const int*)slabs + blockIdx.x * (tiles * G::CHUNKS / (G::SLAB ? G::SLAB : 1));
  tile.m0 = blockIdx.y * G::BM;
  tile.m = m;
  tile.row_bytes = k * G::T::bytes;
  tile.k_chunks = tile.row_bytes / 16;

  typename G::T::Acc acc[G::WM / 16][G::WN / 8][4];
#pragma unroll
  for (int i = 0; i < G::WM / 16; ++i)
#pragma unroll
    for (int j = 0; j < G::WN / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = 0;

  gemm_sums(typename G::Path(), acc, tile, first, last, (u8*)shared);
  const int row = tile.m0 + wm + lane / 4, column = blockIdx.x * G::BN + wn + lane % 4 * 2;
  if constexpr (G::STRAYS) {
    if (blockIdx.z == 0) add_strays<G>(acc, strays, row, column, n);
  }
  const GemmResult<G> to = {c, bias, residual, row_scale, column_scale, m, n, end};
  gemm_write(typename G::Path(), acc, to, row, column);
}

// Sum of the parts of K, in order, then the epilogue; a thread makes two columns.
template <class G>
ICD_DEVICE void gemm_reduce(void* c, const float* parts, const void* bias, const void* residual,
                            const float* row_scale, const float* column_scale, int m, int n,
                            GemmEnd end = GemmEnd()) {
  long at = ((long)blockIdx.x * 256 + threadIdx.x) * 2;
  if (at >= (long)m * n) return;
  float x = 0, y = 0;
#pragma unroll
  for (int s = 0; s < G::SPLITS; ++s) {
    float2 two = load_two(F32(), parts, (long)s * m * n + at);
    x += two.x;
    y += two.y;
  }
  const GemmColumns<G> columns(bias, column_scale, (int)(at % n), end);
  columns.finish(c, x, y, residual, row_scale, (int)(at / n), at);
}

}  // namespace icd
#endif
