// A prompt through a selective state space layer (Gu, Dao, Mamba, 2023): time in chunks that run side
// by side. First each chunk but the last from a state of zeros; then the states between chunks, one
// after another; then all chunks from their true states. A decay over a chunk is one exponential of
// the summed steps. With CONV the convolution and its SiLU are made where x is read.
#ifndef ICD_PREFILL_SCAN
#define ICD_PREFILL_SCAN

namespace icd {

// A thread holds OWN states of one channel, in fours LANES apart; LANES threads hold a channel.
template <class T_, int STATES_, bool CONV_> struct PrefillConfig {
  typedef T_ T;
  static const int STATES = STATES_, OWN = STATES < 16 ? STATES : 16, LANES = STATES / OWN;
  static const int FOURS = OWN / 4, THREADS = 128, CHANNELS = THREADS / LANES;
  static const bool CONV = CONV_;
  // Steps in shared memory at once: of x, dt, z by channel, and of b, c by state.
  static const int STEPS = 16, ROW = CHANNELS * 2, RATES = STATES * 4;
  static const int X = 0, DT = STEPS * ROW, Z = 2 * DT, B = 3 * DT, C = B + STEPS * RATES;
  static const int STAGE = C + STEPS * RATES;
};

struct ScanInputs {
  const void *x, *z, *dt, *b, *c;  // T[batch, length, channels] three times; float32[batch, length, STATES]
};

// `count` steps of rows of `bytes` from `from`, of which `valid_bytes` are there.
template <class G>
ICD_DEVICE void load_steps(u8* to, const void* from, long first, int count, int bytes, long stride,
                           int valid_bytes) {
  for (int at = threadIdx.x; at < G::STEPS * bytes / 16; at += G::THREADS) {
    int step = at / (bytes / 16), chunk = at % (bytes / 16);
    bool valid = step < count && chunk * 16 < valid_bytes;
    const u8* source = (const u8*)from + (first + (valid ? step : 0)) * stride;
    copy_async(to + at * 16, valid ? source + chunk * 16 : source, valid);
  }
}

// The last four inputs of a channel, oldest first, and what the convolution makes of them.
template <class G> struct ConvWindow {
  float4 past, weight;
  float bias;

  ICD_DEVICE void load(const void* x, const void* window, const void* weights, const float* biases,
                       long row, long rows, int channel, int channels) {
    float inputs[4];
    const float* old = (const float*)window + ((rows ? row / rows : 0) * channels + channel) * 4;
    const int t = rows ? (int)(row % rows) : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      inputs[i] = t - 4 + i < 0 ? old[t + i]
                                : load_one(typename G::T(), x, (row - 4 + i) * channels + channel);
    past = make_float4(inputs[0], inputs[1], inputs[2], inputs[3]);
    weight = ((const float4*)weights)[channel];
    bias = biases[channel];
  }
  ICD_DEVICE float next(float input) {
    past = make_float4(past.y, past.z, past.w, input);
    return activate<3>(past.x * weight.x + past.y * weight.y + past.z * weight.z +
                       past.w * weight.w + bias);
  }
};

// Grid: x blocks of CHANNELS channels, y chunks of `per_chunk` steps (with CARRY all but the last), z
// batch. starts: float32[batch, chunks, channels, STATES]. CARRY: ends as starts, with one chunk less,
// and totals float32[batch, chunks - 1, channels] of steps. Else out: T[batch, length, channels]; ends:
// float32[batch, channels, STATES] and window_out float32[batch, channels, 4] after the last step.
template <class G, bool CARRY>
ICD_DEVICE void prefill_scan(void* out, void* ends, float* totals, void* window_out,
                             const ScanInputs in, const void* starts, const void* a, const float* d,
                             const float* dt_bias, const void* window, const void* weight,
                             const float* bias, int length, int channels, int per_chunk,
                             void* shared) {
  const int lane = threadIdx.x % G::LANES, own = threadIdx.x / G::LANES;
  const int channel0 = blockIdx.x * G::CHANNELS, channel = channel0 + own;
  const bool valid = channel < channels;
  const int at = valid ? channel : 0, first = blockIdx.y * per_chunk;
  const int last = first + per_chunk < length ? first + per_chunk : length;
  const long row0 = (long)blockIdx.z * length;
  const long part = (long)blockIdx.z * gridDim.y + blockIdx.y;
  const int left = (channels - channel0) * 2 < G::ROW ? (channels - channel0) * 2 : G::ROW;

  float4 h[G::FOURS], rate[G::FOURS];
#pragma unroll
  for (int j = 0; j < G::FOURS; ++j) {
    const int four = j * G::LANES + lane;
    float4 slow = ((const float4*)a)[(long)at * (G::STATES / 4) + four];
    const float e = 1.44269504f;  // exp2f is one instruction
    rate[j] = make_float4(slow.x * e, slow.y * e, slow.z * e, slow.w * e);
    h[j] = make_float4(0, 0, 0, 0);
    if (!CARRY) h[j] = ((const float4*)starts)[(part * channels + at) * (G::STATES / 4) + four];
  }
  const float offset = dt_bias[at], skip = CARRY ? 0.0f : d[at];
  ConvWindow<G> conv;
  if (G::CONV) conv.load(in.x, window, weight, bias, row0 + first, length, at, channels);
  float total = 0;

  u8* stages = (u8*)shared;
  const int tiles = (last - first + G::STEPS - 1) / G::STEPS;
  for (int t = -1; t < tiles; ++t) {
    if (t >= 0) {
      copy_wait<0>();
      // Also: all are done with the stage that is filled next.
      sync_block();
    }
    if (t + 1 < tiles) {
      u8* next = stages + (t + 1) % 2 * G::STAGE;
      const int begin = first + (t + 1) * G::STEPS, count = last - begin;
      const long row = row0 + begin, stride = (long)channels * 2;
      const long column = (long)channel0 * 2;
      load_steps<G>(next + G::X, (const u8*)in.x + column, row, count, G::ROW, stride, left);
      load_steps<G>(next + G::DT, (const u8*)in.dt + column, row, count, G::ROW, stride, left);
      load_steps<G>(next + G::B, in.b, row, count, G::RATES, G::RATES, G::RATES);
      if (!CARRY) {
        load_steps<G>(next + G::Z, (const u8*)in.z + column, row, count, G::ROW, stride, left);
        load_steps<G>(next + G::C, in.c, row, count, G::RATES, G::RATES, G::RATES);
      }
    }
    copy_commit();
    if (t < 0) continue;
    const u8* here = stages + t % 2 * G::STAGE;
    const int begin = first + t * G::STEPS;
    const int count = last - begin < G::STEPS ? last - begin : G::STEPS;
    for (int s = 0; s < count; ++s) {
      const int place = s * G::CHANNELS + own;
      float raw = load_one(typename G::T(), here + G::DT, place) + offset;
      float step = raw > 20.0f ? raw : log1pf(expf(raw));
      float input = load_one(typename G::T(), here + G::X, place);
      if (G::CONV) input = conv.next(input);
      const float drive = step * input;
      total += step;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < G::FOURS; ++j) {
        const int four = s * (G::STATES / 4) + j * G::LANES + lane;
        const float4 write = ((const float4*)(here + G::B))[four];
        h[j] = make_float4(h[j].x * exp2f(step * rate[j].x) + drive * write.x,
                           h[j].y * exp2f(step * rate[j].y) + drive * write.y,
                           h[j].z * exp2f(step * rate[j].z) + drive * write.z,
                           h[j].w * exp2f(step * rate[j].w) + drive * write.w);
        if (CARRY) continue;
        const float4 read = ((const float4*)(here + G::C))[four];
        sum += h[j].x * read.x + h[j].y * read.y + h[j].z * read.z + h[j].w * read.w;
      }
      if (CARRY) continue;
      sum = warp_sum<G::LANES>(sum) + skip * input;
      if (valid && lane == 0)
        store_one(typename G::T(), out, (row0 + begin + s) * channels + channel,
                  sum * activate<3>(load_one(typename G::T(), here + G::Z, place)));
    }
  }

  if (!valid || (!CARRY && last < length)) return;
  const long row = CARRY ? part * channels + channel : (long)blockIdx.z * channels + channel;
#pragma unroll
  for (int j = 0; j < G::FOURS; ++j)
    ((float4*)ends)[row * (G::STATES / 4) + j * G::LANES + lane] = h[j];
  if (lane != 0) return;
  if (CARRY) totals[row] = total;
  if (!CARRY && G::CONV) ((float4*)window_out)[row] = conv.past;
}

// Grid: x blocks of 128 fours of states, z batch. starts: float32[batch, chunks, channels, STATES] from
// state [batch, channels, STATES], and carry and totals of the chunks but the last.
template <class G>
ICD_DEVICE void join_chunks(void* starts, const void* state, const void* carry, const float* totals,
                            const void* a, int channels, int chunks) {
  const long fours = (long)channels * (G::STATES / 4);
  const long at = (long)blockIdx.x * G::THREADS + threadIdx.x;
  if (at >= fours) return;
  float4 rate = ((const float4*)a)[at], h = ((const float4*)state)[blockIdx.z * fours + at];
  for (int chunk = 0; chunk < chunks; ++chunk) {
    ((float4*)starts)[((long)blockIdx.z * chunks + chunk) * fours + at] = h;
    if (chunk + 1 == chunks) break;
    const long part = (long)blockIdx.z * (chunks - 1) + chunk;
    const float total = totals[part * channels + at / (G::STATES / 4)] * 1.44269504f;
    const float4 own = ((const float4*)carry)[part * fours + at];
    h = make_float4(h.x * exp2f(total * rate.x) + own.x, h.y * exp2f(total * rate.y) + own.y,
                    h.z * exp2f(total * rate.z) + own.z, h.w * exp2f(total * rate.w) + own.w);
  }
}

// Grid: x blocks of 128 channels, y runs of 32 steps, z batch. out, x: T[batch, length, channels].
template <class G>
ICD_DEVICE void prefill_conv(void* out, void* window_out, const void* x, const void* window,
                             const void* weight, const float* bias, int length, int channels) {
  const int channel = blockIdx.x * G::THREADS + threadIdx.x, first = blockIdx.y * 32;
  if (channel >= channels) return;
  const long row0 = (long)blockIdx.z * length;
  ConvWindow<G> conv;
  conv.load(x, window, weight, bias, row0 + first, length, channel, channels);
#pragma unroll 8
  for (int t = first; t < first + 32; ++t) {
    if (t >= length) break;
    const long at = (row0 + t) * channels + channel;
    store_one(typename G::T(), out, at, conv.next(load_one(typename G::T(), x, at)));
  }
  if (first + 32 >= length) ((float4*)window_out)[(long)blockIdx.z * channels + channel] = conv.past;
}

}  // namespace icd
#endif
