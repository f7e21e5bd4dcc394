// int8 codes of rows, by one step for all or by the range of each row; as the norm writes them.
#ifndef ICD_QUANTIZE
#define ICD_QUANTIZE

namespace icd {

// As NormConfig, of which it is the end.
template <class X_, int WARPS_, int ROWS_, int PAIRS_, int CODES_> struct QuantizeConfig {
  typedef X_ X;
  static const int WARPS = WARPS_, ROWS = ROWS_, PAIRS = PAIRS_, LANES = WARPS * 32;
  static const int CODES = CODES_;
};

// Grid: x blocks of ROWS rows. x: [rows, width].
template <class G>
ICD_DEVICE void quantize(const void* x, int rows, int width, void* shared, RowCodes to) {
  const int at = threadIdx.x % G::LANES, row = blockIdx.x * G::ROWS + threadIdx.x / G::LANES;
  const bool valid = row < rows;
  const long first = (long)(valid ? row : 0) * width;
  float2 kept[G::PAIRS];
#pragma unroll
  for (int i = 0; i < G::PAIRS; ++i) {
    int column = (i * G::LANES + at) * 2;
    kept[i] = column < width ? load_two(typename G::X(), x, first + column) : make_float2(0, 0);
  }
  row_codes<G>(kept, to, row, valid, width, shared);
}

}  // namespace icd
#endif
