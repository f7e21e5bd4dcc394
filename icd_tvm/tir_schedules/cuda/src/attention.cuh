// Encoder attention without a score matrix in memory (Dao, FlashAttention-2, 2023): a block makes 64
// queries of one head, running maximum and sum in registers, keys and values by cp.async.
#ifndef ICD_ATTENTION
#define ICD_ATTENTION

namespace icd {

template <class T_, int D_, class OUT_ = T_> struct AttentionConfig {
  typedef T_ T;
  typedef OUT_ Out;
  static const int D = D_, QUERIES = 64, KEYS = 64, THREADS = 128;
  static const int CHUNKS = D / 8, ROW = D * 2;
  static const int TILE = KEYS * ROW;
  // Queries, then two stages of keys and values.
  static const int SHARED = QUERIES * ROW + 4 * TILE;
};

// 16-byte chunk `c` of row r in a tile of rows of D halves: any 8 rows meet all banks once.
template <int D> ICD_DEVICE int head_swizzle(int row, int c) {
  const int mask = D / 8 < 8 ? D / 8 - 1 : 7, shift = D == 32 ? 1 : 0;
  return row * D * 2 + ((c ^ ((row >> shift) & mask)) << 4);
}

template <class G>
ICD_DEVICE void load_rows(u8* tile, const u8* from, int first, int count, long stride, int thread) {
#pragma unroll
  for (int i = 0; i < G::KEYS * G::CHUNKS / G::THREADS; ++i) {
    int at = thread + i * G::THREADS, row = at / G::CHUNKS, c = at % G::CHUNKS;
    bool valid = first + row < count;
    copy_async(tile + head_swizzle<G::D>(row, c),
               valid ? from + (first + row) * stride + c * 16 : from, valid);
  }
}

template <class G> struct AttentionState {
  float out[G::D / 8][4], top[2], sum[2];
};

// Scores of 16 queries against 64 keys; two columns of a row lie in one thread.
template <class G>
ICD_DEVICE void attention_scores(float (&s)[8][4], const u8* queries, const u8* keys, int warp,
                                 int lane) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = 0;
#pragma unroll
  for (int step = 0; step < G::D / 16; ++step) {
    u32 a[4];
    load_matrix(a, queries + head_swizzle<G::D>(warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 b[4];
      load_matrix(b, keys + head_swizzle<G::D>(j * 16 + lane % 8 + lane / 16 * 8,
                                               step * 2 + lane / 8 % 2));
      mma(typename G::T(), s[2 * j], a, b[0], b[1]);
      mma(typename G::T(), s[2 * j + 1], a, b[2], b[3]);
    }
  }
}

// Scale, mask, and rescale what was summed under an older maximum. A row has 4 threads.
template <class G>
ICD_DEVICE void attention_softmax(AttentionState<G>& state, float (&s)[8][4], const float* mask,
                                  float scale, int first, int keys, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = state.top[half];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int key = first + j * 8 + lane % 4 * 2 + e;
        float& x = s[j][half * 2 + e];
        x = key < keys ? x * scale + (mask ? mask[key] : 0.0f) : -INFINITY;
        top = fmaxf(top, x);
      }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    // A row whose keys are all masked so far has no finite maximum.
    float base = top == -INFINITY ? 0.0f : top;
    float shrink = expf(state.top[half] - base), sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        s[j][half * 2 + e] = expf(s[j][half * 2 + e] - base);
        sum += s[j][half * 2 + e];
      }
    state.sum[half] = state.sum[half] * shrink + sum;
    state.top[half] = top;
#pragma unroll
    for (int d = 0; d < G::D / 8; ++d) {
      state.out[d][half * 2] *= shrink;
      state.out[d][half * 2 + 1] *= shrink;
    }
  }
}

// The accumulators of two neighbouring 8-column tiles are the operand of a product over 16 keys.
template <class G>
ICD_DEVICE void attention_values(AttentionState<G>& state, const float (&s)[8][4], const u8* values,
                                 int lane) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    u32 a[4];
    a[0] = narrow2(typename G::T(), s[2 * step][0], s[2 * step][1]);
    a[1] = narrow2(typename G::T(), s[2 * step][2], s[2 * step][3]);
    a[2] = narrow2(typename G::T(), s[2 * step + 1][0], s[2 * step + 1][1]);
    a[3] = narrow2(typename G::T(), s[2 * step + 1][2], s[2 * step + 1][3]);
#pragma unroll
    for (int d = 0; d < G::D / 16; ++d) {
      u32 b[4];
      load_matrix_trans(b, values + head_swizzle<G::D>(step * 16 + lane % 16, d * 2 + lane / 16));
      mma(typename G::T(), state.out[2 * d], a, b[0], b[1]);
      mma(typename G::T(), state.out[2 * d + 1], a, b[2], b[3]);
    }
  }
}

// Grid: x blocks of 64 queries, y head, z batch. q, k, v, out: [batch, rows, heads, D] with `stride`
// elements from row to row (3 heads D where q, k and v come from one matmul); out is contiguous.
// `mask`: float32[batch, keys] to be added to the scores, or null. `codes`: of an int8 out.
template <class G>
ICD_DEVICE void attention(void* out, const void* q, const void* k, const void* v, const float* mask,
                          int queries, int keys, int heads, int stride, float scale, void* shared,
                          Codes codes = Codes()) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int head = blockIdx.y, batch = blockIdx.z, first_query = blockIdx.x * G::QUERIES;
  const long row = (long)stride * 2;
  const u8* q_rows = (const u8*)q + batch * queries * row + head * G::ROW;
  const u8* k_rows = (const u8*)k + batch * keys * row + head * G::ROW;
  const u8* v_rows = (const u8*)v + batch * keys * row + head * G::ROW;
  const float* own_mask = mask ? mask + (long)batch * keys : mask;
  u8 *q_tile = (u8*)shared, *stages = q_tile + G::QUERIES * G::ROW;

  AttentionState<G> state;
#pragma unroll
  for (int half = 0; half < 2; ++half) state.top[half] = -INFINITY, state.sum[half] = 0;
#pragma unroll
  for (int d = 0; d < G::D / 8; ++d)
#pragma unroll
    for (int e = 0; e < 4; ++e) state.out[d][e] = 0;

  load_rows<G>(q_tile, q_rows, first_query, queries, row, thread);
  load_rows<G>(stages, k_rows, 0, keys, row, thread);
  load_rows<G>(stages + G::TILE, v_rows, 0, keys, row, thread);
  copy_commit();
  const int tiles = (keys + G::KEYS - 1) / G::KEYS;
  for (int t = 0; t < tiles; ++t) {
    copy_wait<0>();
    sync_block();
    u8* here = stages + t % 2 * 2 * G::TILE;
    u8* next = stages + (t + 1) % 2 * 2 * G::TILE;
    if (t + 1 < tiles) {
      load_rows<G>(next, k_rows, (t + 1) * G::KEYS, keys, row, thread);
      load_rows<G>(next + G::TILE, v_rows, (t + 1) * G::KEYS, keys, row, thread);
    }
    copy_commit();
    float s[8][4];
    attention_scores<G>(s, q_tile, here, warp, lane);
    attention_softmax<G>(state, s, own_mask, scale, t * G::KEYS, keys, lane);
    attention_values<G>(state, s, here + G::TILE, lane);
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = state.sum[half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    int query = first_query + warp * 16 + lane / 4 + half * 8;
    if (query >= queries) continue;
    long at = (((long)batch * queries + query) * heads + head) * G::D + lane % 4 * 2;
#pragma unroll
    for (int d = 0; d < G::D / 8; ++d)
      store_two(typename G::Out(), out, at + d * 8,
                coded(typename G::Out(), state.out[d][half * 2] * inverse, codes),
                coded(typename G::Out(), state.out[d][half * 2 + 1] * inverse, codes));
  }
}

}  // namespace icd
#endif
