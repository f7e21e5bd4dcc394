// One query for each head against a cache whose live slots were moved together: a block reads a part
// of one key-value head once for all query heads that share it (Dao et al., Flash-Decoding, 2023).
#ifndef ICD_DECODE_ATTENTION
#define ICD_DECODE_ATTENTION

namespace icd {

// T: of q and out; KV: of the cache, F16, BF16, F32, or S8 or F8 with scales. PAGE: slots of a page, 0: the
// slots of a head lie together. BY_CHANNEL: a scale for each channel of a page instead of each slot.
template <class T_, class KV_, int D_, int SHARED_HEADS_, int WARPS_, int PAGE_ = 0,
          bool BY_CHANNEL_ = false>
struct DecodeConfig {
  typedef T_ T;
  typedef KV_ KV;
  static const int D = D_, HEADS = SHARED_HEADS_, WARPS = WARPS_, PAGE = PAGE_;
  static const bool BY_CHANNEL = BY_CHANNEL_;
  // A thread holds the PER elements of 16 bytes; LANES threads hold a slot.
  static const int PER = 16 / KV::bytes, LANES = D / PER, SLOTS = 32 / LANES;
  static const int RECORD = D + 2;
};

template <class G> ICD_DEVICE void cache_widen(F16 t, const Chunk& c, float (&out)[G::PER]) {
  widen8(t, c, out);
}
template <class G> ICD_DEVICE void cache_widen(BF16 t, const Chunk& c, float (&out)[G::PER]) {
  widen8(t, c, out);
}
template <class G> ICD_DEVICE void cache_widen(F32, const Chunk& c, float (&out)[G::PER]) {
#pragma unroll
  for (int i = 0; i < G::PER; ++i) out[i] = bits_to_float(c.w[i]);
}
template <class G> ICD_DEVICE void cache_widen(S8, const Chunk& c, float (&out)[G::PER]) {
#pragma unroll
  for (int i = 0; i < G::PER; ++i) out[i] = (float)(signed char)(c.w[i / 4] >> (i % 4 * 8));
}

template <class G> ICD_DEVICE void cache_widen(F8, const Chunk& c, float (&out)[G::PER]) {
#pragma unroll
  for (int i = 0; i < G::PER; i += 2) {
    float2 two = widen_fp8((u16)(c.w[i / 4] >> (i / 2 % 2 * 16)));
    out[i] = two.x;
    out[i + 1] = two.y;
  }
}
template <class G>
ICD_DEVICE void scale_channels(float (&x)[G::PER], const float* scales, long page, int at_lane) {
#pragma unroll
  for (int i = 0; i < G::PER; i += 4) {
    float4 four = ((const float4*)scales)[(page * G::D + at_lane * G::PER + i) / 4];
    x[i] *= four.x;
    x[i + 1] *= four.y;
    x[i + 2] *= four.z;
    x[i + 3] *= four.w;
  }
}

// Bring two running softmax sums together.
template <class G>
ICD_DEVICE void merge_sums(float& top, float& sum, float (&out)[G::PER], int mask) {
  float other = shuffle_xor(top, mask), joint = fmaxf(top, other);
  float base = joint == -INFINITY ? 0.0f : joint;
  float mine = expf(top - base);
  float theirs = expf(other - base);
  sum = sum * mine + shuffle_xor(sum, mask) * theirs;
#pragma unroll
  for (int i = 0; i < G::PER; ++i) out[i] = out[i] * mine + shuffle_xor(out[i], mask) * theirs;
  top = joint;
}

// Grid: x part of the slots, y key-value head, z batch. q: [batch, kv heads, HEADS, D]. k, v: [batch,
// kv heads, capacity, D], of which the first live[batch, kv head] slots count. k_scale, v_scale:
// float32[batch, kv heads, capacity]. With pages: k, v: [pages of the pool, PAGE, D], each page of one
// head; `pages`: int32[batch, kv heads, capacity], where its slots are, in order; scales: float32[pages
// of the pool, PAGE or, by channel, D]. parts: float32[batch, kv heads, parts, HEADS, D + 2] of
// weighted sums, maximum and sum.
template <class G>
ICD_DEVICE void decode_attention(void* parts, const void* q, const void* k, const void* v,
                                 const float* k_scale, const float* v_scale, const int* live,
                                 int capacity, float scale, void* shared,
                                 const int* pages = nullptr) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int at_lane = lane % G::LANES, slot = lane / G::LANES;
  const int kv_heads = gridDim.y;
  const long head = (long)blockIdx.z * kv_heads + blockIdx.y;
  const int count = live[head], per_part = (count + gridDim.x - 1) / gridDim.x;
  const int first = blockIdx.x * per_part;
  const int last = first + per_part < count ? first + per_part : count;

  float query[G::HEADS][G::PER], out[G::HEADS][G::PER], top[G::HEADS], sum[G::HEADS];
#pragma unroll
  for (int h = 0; h < G::HEADS; ++h) {
    top[h] = -INFINITY;
    sum[h] = 0;
#pragma unroll
    for (int i = 0; i < G::PER; i += 2) {
      long at = (head * G::HEADS + h) * G::D + at_lane * G::PER + i;
      float2 two = load_two(typename G::T(), q, at);
      query[h][i] = two.x * scale;
      query[h][i + 1] = two.y * scale;
      out[h][i] = out[h][i + 1] = 0;
    }
  }
  for (int base = first + warp * G::SLOTS; base < last; base += G::WARPS * G::SLOTS) {
    int row = base + slot;
    bool valid = row < last;
    long at = valid ? row : first, page = 0;
    if (G::PAGE) {
      const int size = G::PAGE ? G::PAGE : 1;
      page = pages[head * capacity + at / size];
      at = page * size + at % size;
    } else {
      at += head * capacity;
    }
    float key[G::PER], value[G::PER];
    Chunk raw_key = load_stream((const u8*)k + (at * G::LANES + at_lane) * 16);
    Chunk raw_value = load_stream((const u8*)v + (at * G::LANES + at_lane) * 16);
    cache_widen<G>(typename G::KV(), raw_key, key);
    cache_widen<G>(typename G::KV(), raw_value, value);
    float by_key = 1.0f, by_value = 1.0f;
    if (G::BY_CHANNEL) {
      scale_channels<G>(key, k_scale, page, at_lane);
      scale_channels<G>(value, v_scale, page, at_lane);
    } else if (k_scale) {
      by_key = k_scale[at];
      by_value = v_scale[at];
    }
#pragma unroll
    for (int h = 0; h < G::HEADS; ++h) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < G::PER; ++i) score += query[h][i] * key[i];
      score = warp_sum<G::LANES>(score) * by_key;
      if (!valid) score = -INFINITY;
      float joint = fmaxf(top[h], score), from = joint == -INFINITY ? 0.0f : joint;
      float shrink = expf(top[h] - from), weight = expf(score - from);
      sum[h] = sum[h] * shrink + weight;
#pragma unroll
      for (int i = 0; i < G::PER; ++i)
        out[h][i] = out[h][i] * shrink + weight * by_value * value[i];
      top[h] = joint;
    }
  }
  float* records = (float*)shared;
#pragma unroll
  for (int h = 0; h < G::HEADS; ++h) {
#pragma unroll
    for (int mask = G::LANES; mask < 32; mask *= 2) merge_sums<G>(top[h], sum[h], out[h], mask);
    float* own = records + (warp * G::HEADS + h) * G::RECORD;
    if (slot == 0)
#pragma unroll
      for (int i = 0; i < G::PER; ++i) own[at_lane * G::PER + i] = out[h][i];
    if (lane == 0) own[G::D] = top[h], own[G::D + 1] = sum[h];
  }
  sync_block();
  float* result = (float*)parts + (head * gridDim.x + blockIdx.x) * G::HEADS * G::RECORD;
  for (int i = threadIdx.x; i < G::HEADS * G::D; i += G::WARPS * 32) {
    const float* mine = records + i / G::D * G::RECORD;
    float joint = -INFINITY, total = 0, weighted = 0;
    for (int w = 0; w < G::WARPS; ++w)
      joint = fmaxf(joint, mine[w * G::HEADS * G::RECORD + G::D]);
    float from = joint == -INFINITY ? 0.0f : joint;
    for (int w = 0; w < G::WARPS; ++w) {
      const float* record = mine + w * G::HEADS * G::RECORD;
      float weight = expf(record[G::D] - from);
      total += weight * record[G::D + 1];
      weighted += weight * record[i % G::D];
    }
    float* to = result + i / G::D * G::RECORD;
    to[i % G::D] = weighted;
    if (i % G::D == 0) to[G::D] = joint, to[G::D + 1] = total;
  }
}

// Grid: x batch * kv heads; HEADS * D threads. out: [batch, kv heads, HEADS, D].
template <class G> ICD_DEVICE void decode_combine(void* out, const float* parts, int count) {
  const int h = threadIdx.x / G::D, d = threadIdx.x % G::D;
  const float* own = parts + (long)blockIdx.x * count * G::HEADS * G::RECORD + h * G::RECORD;
  float joint = -INFINITY, total = 0, weighted = 0;
  for (int p = 0; p < count; ++p) joint = fmaxf(joint, own[p * G::HEADS * G::RECORD + G::D]);
  float from = joint == -INFINITY ? 0.0f : joint;
  for (int p = 0; p < count; ++p) {
    const float* record = own + p * G::HEADS * G::RECORD;
    float weight = expf(record[G::D] - from);
    total += weight * record[G::D + 1];
    weighted += weight * record[d];
  }
  long at = ((long)blockIdx.x * G::HEADS + h) * G::D + d;
  store_one(typename G::T(), out, at, total > 0 ? weighted / total : 0.0f);
}

}  // namespace icd
#endif
