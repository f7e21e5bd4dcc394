// y[N] = act(W[N, K] x[K] + bias) + residual: W is streamed once in 16-byte pieces.
#ifndef ICD_GEMV
#define ICD_GEMV

namespace icd {

// Elements in 16 bytes of W.
ICD_DEVICE constexpr int per_chunk(F16) { return 8; }
ICD_DEVICE constexpr int per_chunk(BF16) { return 8; }
ICD_DEVICE constexpr int per_chunk(S8) { return 16; }
ICD_DEVICE constexpr int per_chunk(F8) { return 16; }
ICD_DEVICE constexpr int per_chunk(S4) { return 32; }

// W of type T, x and y of type X. WARPS share ROWS rows each time; SPLIT of them share one row by
// parts of K. SLAB: elements of K in a live block, 0: dense. GROUP: elements of K with one scale.
template <class T_, class X_, class OUT_, int ROWS_, int WARPS_, int SPLIT_, int ACT_, bool BIAS_,
          bool RESIDUAL_, int SLAB_, int GROUP_>
struct GemvConfig {
  typedef T_ T;
  typedef X_ X;
  typedef OUT_ Out;
  static const int ROWS = ROWS_, WARPS = WARPS_, SPLIT = SPLIT_, ACT = ACT_, SLAB = SLAB_;
  static const int GROUP = GROUP_;
  static const bool BIAS = BIAS_, RESIDUAL = RESIDUAL_;
  static const int ROWS_PER_BLOCK = WARPS / SPLIT * ROWS;
  // Elements of a chunk that surely have one scale: those of a live block, else all.
  static const int PER = per_chunk(T_()), SAME = SLAB && SLAB < PER ? SLAB : PER;
};

ICD_DEVICE float weight_at(F16 t, const Chunk& c, int i) {
  return widen(t, (u16)(c.w[i / 2] >> (i % 2 * 16)));
}
ICD_DEVICE float weight_at(BF16 t, const Chunk& c, int i) {
  return widen(t, (u16)(c.w[i / 2] >> (i % 2 * 16)));
}
ICD_DEVICE float weight_at(S8, const Chunk& c, int i) {
  return (float)(signed char)(c.w[i / 4] >> (i % 4 * 8));
}
// Element i of a word is its nibble i, in two's complement.
ICD_DEVICE float weight_at(S4, const Chunk& c, int i) {
  return (float)((int)(c.w[i / 8] << (28 - i % 8 * 4)) >> 28);
}

ICD_DEVICE float weight_at(F8, const Chunk& c, int i) {
  float2 two = widen_fp8((u16)(c.w[i / 4] >> (i / 2 % 2 * 16)));
  return i % 2 ? two.y : two.x;
}

// Piece `at` of 8 elements of x as W is stored; `inputs`: of its first element in x, -1 where padded.
template <class G>
ICD_DEVICE void load_inputs(float* xs, int& inputs, const void* x, const int* live, int at) {
  const int PIECES = G::SLAB ? G::SLAB / 8 : 1;
  int from = at;
  if (G::SLAB) {
    int block = live[at / PIECES];
    from = block < 0 ? -1 : block * PIECES + at % PIECES;
  }
  float eight[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (from >= 0) widen8(typename G::X(), load_chunk((const u8*)x + (long)from * 16), eight);
#pragma unroll
  for (int e = 0; e < 8; ++e) xs[e] = eight[e];
  inputs = from * 8;
}

// `chunks` of 16 bytes in a row as stored. `blocks`: int32[N / group_rows, chunks * elements / SLAB],
// the live blocks of x for each group of rows, -1 where padded. `scales`: float32[N, groups], groups
// of GROUP elements of x; float32[N] without them.
template <class G>
ICD_DEVICE void gemv(void* y, const void* x, const void* w, const void* blocks, const float* scales,
                     const void* bias, const void* residual, int n, int chunks, int group_rows,
                     int groups, void* shared) {
  const int PER = G::PER;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % G::SPLIT;
  const int row0 = blockIdx.x * G::ROWS_PER_BLOCK + warp / G::SPLIT * G::ROWS;
  const u8* row = (const u8*)w + (long)row0 * chunks * 16;
  const int* live = (const int*)blocks;
  if (G::SLAB) live += row0 / group_rows * (chunks * PER / (G::SLAB ? G::SLAB : 1));
  float acc[G::ROWS];
#pragma unroll
  for (int r = 0; r < G::ROWS; ++r) acc[r] = 0;

  for (int c = part * 32 + lane; c < chunks; c += G::SPLIT * 32) {
    Chunk piece[G::ROWS];
#pragma unroll
    for (int r = 0; r < G::ROWS; ++r)
      if (row0 + r < n) piece[r] = load_stream(row + ((long)r * chunks + c) * 16);
    float xs[PER];
    int inputs[PER / 8];
#pragma unroll
    for (int i = 0; i < PER / 8; ++i) load_inputs<G>(xs + i * 8, inputs[i], x, live, c * (PER / 8) + i);
#pragma unroll
    for (int r = 0; r < G::ROWS; ++r) {
      if (row0 + r >= n) continue;
#pragma unroll
      for (int first = 0; first < PER; first += G::SAME) {
        float dot = 0;
#pragma unroll
        for (int i = first; i < first + G::SAME; ++i) dot += weight_at(typename G::T(), piece[r], i) * xs[i];
        int input = inputs[first / 8] < 0 ? 0 : inputs[first / 8];
        if (G::GROUP) dot *= scales[(long)(row0 + r) * groups + input / (G::GROUP ? G::GROUP : 1)];
        acc[r] += dot;
      }
    }
  }

  float* partial = (float*)shared;
#pragma unroll
  for (int r = 0; r < G::ROWS; ++r) {
    acc[r] = warp_sum<32>(acc[r]);
    if (lane == 0) partial[warp * G::ROWS + r] = acc[r];
  }
  sync_block();
  int mine = threadIdx.x, out = blockIdx.x * G::ROWS_PER_BLOCK + mine;
  if (mine >= G::ROWS_PER_BLOCK || out >= n) return;
  float sum = 0;
#pragma unroll
  for (int s = 0; s < G::SPLIT; ++s)
    sum += partial[(mine / G::ROWS * G::SPLIT + s) * G::ROWS + mine % G::ROWS];
  if (!G::GROUP && scales) sum *= scales[out];
  if (G::BIAS) sum += ((const float*)bias)[out];
  sum = activate<G::ACT>(sum);
  if (G::RESIDUAL) sum += load_one(typename G::Out(), residual, out);
  store_one(typename G::Out(), y, out, sum);
}

}  // namespace icd
#endif
