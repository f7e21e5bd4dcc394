// Layer norm and RMS norm of rows, an addition before it if need be. WARPS warps share a row, whose
// elements stay in registers between the sums.
#ifndef ICD_NORM
#define ICD_NORM

namespace icd {

// X: of the rows and of what is added to them. CENTRE: layer norm, else RMS norm. PAIRS of
// neighbouring elements for each lane; ROWS of a block.
template <class X_, class OUT_, int WARPS_, int ROWS_, int PAIRS_, bool CENTRE_, bool BETA_,
          bool RESIDUAL_>
struct NormConfig {
  typedef X_ X;
  typedef OUT_ Out;
  static const int WARPS = WARPS_, ROWS = ROWS_, PAIRS = PAIRS_, LANES = WARPS * 32;
  static const bool CENTRE = CENTRE_, BETA = BETA_, RESIDUAL = RESIDUAL_;
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

// Grid: x blocks of ROWS rows. out, x, residual: [rows, width]; gamma, beta: float32[width].
template <class G>
ICD_DEVICE void norm(void* out, const void* x, const void* residual, const void* gamma,
                     const void* beta, int rows, int width, float eps, void* shared) {
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
  if (!valid) return;
#pragma unroll
  for (int i = 0; i < G::PAIRS; ++i) {
    int column = (i * G::LANES + at) * 2;
    if (column >= width) continue;
    float2 by = load_two(F32(), gamma, column);
    float2 more = G::BETA ? load_two(F32(), beta, column) : make_float2(0, 0);
    store_two(typename G::Out(), out, first + column, kept[i].x * inverse * by.x + more.x,
              kept[i].y * inverse * by.y + more.y);
  }
}

}  // namespace icd
#endif
