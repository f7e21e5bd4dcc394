// Layer norm and RMS norm of rows, an addition before it if need be, int8 codes of its result behind
// it. WARPS warps share a row, whose elements stay in registers between the sums.
#ifndef ICD_NORM
#define ICD_NORM

namespace icd {

// X: of the rows and of what is added to them. CENTRE: layer norm, else RMS norm. PAIRS of
// neighbouring elements for each lane; ROWS of a block. CODES 0: none, 1: of one step for all,
// 2: of a step for each row, by its own range.
template <class X_, class OUT_, int WARPS_, int ROWS_, int PAIRS_, bool CENTRE_, bool BETA_,
          bool RESIDUAL_, int CODES_ = 0>
struct NormConfig {
  typedef X_ X;
  typedef OUT_ Out;
  static const int WARPS = WARPS_, ROWS = ROWS_, PAIRS = PAIRS_, LANES = WARPS * 32;
  static const bool CENTRE = CENTRE_, BETA = BETA_, RESIDUAL = RESIDUAL_;
  static const int CODES = CODES_;
};

// Where the codes of rows go: [rows, width], and for CODES 2 float32[rows] of steps and of codes of
// 0.0. `by`: of all rows, for CODES 1.
struct RowCodes {
  void* codes;
  float* steps;
  float* points;
  Codes by;
};

// Sum over the warps of a row; every lane gets it. `sums` holds WARPS floats for each row.
template <class G> ICD_DEVICE float row_sum(float x, float* sums, int row, int warp, int lane) {
  x = warp_sum<32>(x);
  if (G::WARPS == 1) return x;
  // What a sum before this one left there has been read by all.
  sync_block();
  if (lane == 0) sums[row * G::WARPS + warp] = x;
  sync_block();
  float total = 0;
#pragma unroll
  for (int w = 0; w < G::WARPS; ++w) total += sums[row * G::WARPS + w];
  return total;
}

// The same of the maximum.
template <class G> ICD_DEVICE float row_most(float x, float* kept, int row, int warp, int lane) {
#pragma unroll
  for (int m = 16; m > 0; m /= 2) x = fmaxf(x, shuffle_xor(x, m));
  if (G::WARPS == 1) return x;
  sync_block();
  if (lane == 0) kept[row * G::WARPS + warp] = x;
  sync_block();
#pragma unroll
  for (int w = 0; w < G::WARPS; ++w) x = fmaxf(x, kept[row * G::WARPS + w]);
  return x;
}

// Write the codes of a row whose elements the lanes hold. A range holds 0 (ONNX,
// DynamicQuantizeLinear; there it is that of the whole tensor).
template <class G>
ICD_DEVICE void row_codes(const float2 (&kept)[G::PAIRS], RowCodes to, int row, bool valid, int width,
                          void* shared) {
  const int row_here = threadIdx.x / G::LANES, at = threadIdx.x % G::LANES;
  Codes by = to.by;
  if (G::CODES == 2) {
    float low = 0, high = 0;
#pragma unroll
    for (int i = 0; i < G::PAIRS; ++i) {
      if ((i * G::LANES + at) * 2 >= width) continue;
      low = fminf(low, fminf(kept[i].x, kept[i].y));
      high = fmaxf(high, fmaxf(kept[i].x, kept[i].y));
    }
    high = row_most<G>(high, (float*)shared, row_here, at / 32, at % 32);
    low = -row_most<G>(-low, (float*)shared, row_here, at / 32, at % 32);
    by.step = (high - low) / 255.0f;
    if (by.step == 0) by.step = 1.0f;
    by.point = fminf(fmaxf(rintf(-low / by.step), 0.0f), 255.0f) - 128.0f;
    if (valid && at == 0) to.steps[row] = by.step, to.points[row] = by.point;
  }
  if (!valid) return;
#pragma unroll
  for (int i = 0; i < G::PAIRS; ++i) {
    int column = (i * G::LANES + at) * 2;
    if (column >= width) continue;
    store_two(S8(), to.codes, (long)row * width + column, coded(S8(), kept[i].x, by),
              coded(S8(), kept[i].y, by));
  }
}

// Grid: x blocks of ROWS rows. out, x, residual: [rows, width]; gamma, beta: float32[width]. No out:
// the codes are all that is read.
template <class G>
ICD_DEVICE void norm(void* out, const void* x, const void* residual, const void* gamma,
                     const void* beta, int rows, int width, float eps, void* shared,
                     RowCodes to = RowCodes()) {
  const int row_here = threadIdx.x / G::LANES, at = threadIdx.x % G::LANES;
  const int warp = at / 32, lane = at % 32, row = blockIdx.x * G::ROWS + row_here;
  const bool valid = row < rows;
  const long first = (long)(valid ? row : 0) * width;
  float2 kept[G::PAIRS];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < G::PAIRS; ++i) {
    int column = (i * G::LANES + at) * 2;
    kept[i] = make_float2(0, 0);
    if (column >= width) continue;
    kept[i] = load_two(typename G::X(), x, first + column);
    if (G::RESIDUAL) {
      float2 more = load_two(typename G::X(), residual, first + column);
      kept[i] = make_float2(kept[i].x + more.x, kept[i].y + more.y);
    }
    sum += kept[i].x + kept[i].y;
  }
  float mean = 0;
  if (G::CENTRE) mean = row_sum<G>(sum, (float*)shared, row_here, warp, lane) / width;
  // A second pass over registers: no cancellation.
  float squares = 0;
#pragma unroll
  for (int i = 0; i < G::PAIRS; ++i) {
    if ((i * G::LANES + at) * 2 >= width) continue;
    kept[i] = make_float2(kept[i].x - mean, kept[i].y - mean);
    squares += kept[i].x * kept[i].x + kept[i].y * kept[i].y;
  }
  squares = row_sum<G>(squares, (float*)shared, row_here, warp, lane) / width;
  const float inverse = 1.0f / sqrtf(squares + eps);
#pragma unroll
  for (int i = 0; i < G::PAIRS; ++i) {
    int column = (i * G::LANES + at) * 2;
    if (column >= width) continue;
    float2 by = load_two(F32(), gamma, column);
    float2 more = G::BETA ? load_two(F32(), beta, column) : make_float2(0, 0);
    kept[i] = make_float2(kept[i].x * inverse * by.x + more.x, kept[i].y * inverse * by.y + more.y);
    if (valid && out) store_two(typename G::Out(), out, first + column, kept[i].x, kept[i].y);
  }
  if constexpr (G::CODES > 0) row_codes<G>(kept, to, row, valid, width, shared);
}

}  // namespace icd
#endif
