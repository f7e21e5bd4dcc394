// A new token's key and value rows go into the caches, in place, queries and keys rotated on the way.
#ifndef ICD_APPEND
#define ICD_APPEND

namespace icd {

// T: of the rows; KV: of the caches; LENGTH: the integer type of the slot. D channels of a head.
template <class T_, class KV_, class LENGTH_, int D_, bool ROTATE_> struct AppendConfig {
  typedef T_ T;
  typedef KV_ KV;
  typedef LENGTH_ Length;
  static const int D = D_, HALF = D / 2;
  static const bool ROTATE = ROTATE_;
};

// x * cos + (-second half, first half) * sin (Su et al., RoFormer, 2021), element i of a head.
template <class G>
ICD_DEVICE float rotated(const void* row, const float* cos, const float* sin, int head, int i) {
  const int other = i < G::HALF ? i + G::HALF : i - G::HALF;
  float mine = load_one(typename G::T(), row, (long)head * G::D + i);
  if (!G::ROTATE) return mine;
  float turned = load_one(typename G::T(), row, (long)head * G::D + other);
  return mine * cos[i] + (i < G::HALF ? -turned : turned) * sin[i];
}

// Grid: x query heads, then key heads, then value heads of one token; D threads. q_out: T[heads, D];
// caches: [kv heads, slots, D]; q, k, v: T rows of all heads; cos, sin: float32[D].
template <class G>
ICD_DEVICE void append(void* q_out, void* keys, void* values, const void* q, const void* k,
                       const void* v, const float* cos, const float* sin,
                       const typename G::Length* length, int heads, int kv_heads, int slots) {
  const int i = threadIdx.x;
  int head = blockIdx.x;
  if (head < heads) {
    store_one(typename G::T(), q_out, (long)head * G::D + i, rotated<G>(q, cos, sin, head, i));
    return;
  }
  head -= heads;
  const long slot = (long)*length;
  // No slot has this number: the cache is full, and the token is dropped.
  if (slot < 0 || slot >= slots) return;
  if (head < kv_heads) {
    long at = ((long)head * slots + slot) * G::D + i;
    store_one(typename G::KV(), keys, at, rotated<G>(k, cos, sin, head, i));
    return;
  }
  head -= kv_heads;
  long at = ((long)head * slots + slot) * G::D + i;
  store_one(typename G::KV(), values, at, load_one(typename G::T(), v, (long)head * G::D + i));
}

}  // namespace icd
#endif
