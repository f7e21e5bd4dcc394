// One token of a selective state space layer (Gu, Dao, Mamba, 2023), batch 1: the convolution with its
// activation and moved window, and the scan with softplus, discretisation, skip and gate. Between them
// x_proj needs all channels, so they are two kernels.
#ifndef ICD_MAMBA_STEP
#define ICD_MAMBA_STEP

namespace icd {

// T: of activations; BC: of b and c. States are float32. TAPS is 4: a window of a channel is one
// float4 load.
template <class T_, int STATES_, class BC_ = F32> struct MambaConfig {
  typedef T_ T;
  typedef BC_ BC;
  static const int STATES = STATES_, TAPS = 4, LANES = STATES / 4, THREADS = 128;
};

template <class T> ICD_DEVICE float4 load_four(T t, const void* p, long i) {
  float2 low = load_two(t, p, i), high = load_two(t, p, i + 2);
  return make_float4(low.x, low.y, high.x, high.y);
}
ICD_DEVICE float4 load_four(F32, const void* p, long i) { return ((const float4*)p)[i / 4]; }

// Grid: x blocks of 128 channels. out, x: T[channels]; window_out, window: float32[channels, 4], the
// last four inputs, oldest first; weight: float32[channels, 4]; bias: float32[channels].
template <class G>
ICD_DEVICE void conv_step(void* out, void* window_out, const void* x, const void* window,
                          const void* weight, const float* bias, int channels) {
  int i = blockIdx.x * G::THREADS + threadIdx.x;
  if (i >= channels) return;
  float4 old = ((const float4*)window)[i], w = ((const float4*)weight)[i];
  float4 now = make_float4(old.y, old.z, old.w, load_one(typename G::T(), x, i));
  ((float4*)window_out)[i] = now;
  float sum = now.x * w.x + now.y * w.y + now.z * w.z + now.w * w.w + bias[i];
  store_one(typename G::T(), out, i, activate<3>(sum));
}

// Grid: x blocks of 128 / LANES channels; LANES threads hold the states of a channel, four each.
// out, x, z, dt: T[channels]; state_out, state: float32[channels, STATES]; a: float32[channels, STATES]
// (-exp(A_log)); b, c: BC[STATES]; d, dt_bias: float32[channels].
template <class G>
ICD_DEVICE void scan_step(void* out, void* state_out, const void* x, const void* z, const void* dt,
                          const void* state, const void* a, const void* b, const void* c,
                          const float* d, const float* dt_bias, int channels) {
  const int lane = threadIdx.x % G::LANES;
  const int channel = blockIdx.x * (G::THREADS / G::LANES) + threadIdx.x / G::LANES;
  const bool valid = channel < channels;
  const int at = valid ? channel : 0;
  float raw = load_one(typename G::T(), dt, at) + dt_bias[at];
  float step = raw > 20.0f ? raw : log1pf(expf(raw));
  float input = load_one(typename G::T(), x, at);
  float4 h = ((const float4*)state)[(long)at * G::LANES + lane];
  float4 rate = ((const float4*)a)[(long)at * G::LANES + lane];
  float4 in = load_four(typename G::BC(), b, lane * 4);
  float4 read = load_four(typename G::BC(), c, lane * 4);
  float drive = step * input;
  h = make_float4(h.x * expf(step * rate.x) + drive * in.x, h.y * expf(step * rate.y) + drive * in.y,
                  h.z * expf(step * rate.z) + drive * in.z, h.w * expf(step * rate.w) + drive * in.w);
  float sum = warp_sum<G::LANES>(h.x * read.x + h.y * read.y + h.z * read.z + h.w * read.w);
  if (!valid) return;
  ((float4*)state_out)[(long)at * G::LANES + lane] = h;
  if (lane != 0) return;
  sum += d[at] * input;
  store_one(typename G::T(), out, at, sum * activate<3>(load_one(typename G::T(), z, at)));
}

}  // namespace icd
#endif
