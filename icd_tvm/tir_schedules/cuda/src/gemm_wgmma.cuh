// The sums of gemm.cuh by warpgroups: wgmma.mma_async reads both operands from shared memory, and goes on
// while the next tiles are copied. Needs sm_90a: code for it runs on compute capability 9.0 alone.
#ifndef ICD_GEMM_WGMMA
#define ICD_GEMM_WGMMA

namespace icd {

typedef unsigned long long u64;

// A matrix in shared memory for wgmma, K-major, 128-byte swizzle (PTX ISA, "Matrix Descriptor Format"
// of the asynchronous warpgroup instructions): address / 16 in bits 0 to 13; the leading offset, which
// this layout does not read, from bit 16; 1024 bytes / 16 from 8 rows to the next 8, from bit 32; base
// offset 0, for swizzled lines begin at multiples of 1024; mode 1 from bit 62.
ICD_DEVICE u64 matrix_descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#ifndef ICD_EMULATE
// Copies are written by the generic proxy, wgmma reads by the async proxy ("Async Proxy").
ICD_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
// The same for all lanes, and known to be: descriptors lie in uniform registers.
ICD_DEVICE int warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }
ICD_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
ICD_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int N> ICD_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(N) : "memory");
}
// The compiler knows nothing of sums that are still on their way: none is moved across this.
template <int N> ICD_DEVICE void pin(float (&c)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}
template <int N> ICD_DEVICE void pin(int (&c)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j)
    asm volatile("" : "+r"(c[j][0]), "+r"(c[j][1]), "+r"(c[j][2]), "+r"(c[j][3])::"memory");
}

// Names of registers by tens, then the registers: c[j] has of columns 8 j to 8 j + 7 two neighbours of a row,
// and two of the row 8 below ("Matrix Fragments for wgmma.mma_async.m64nNk16", accumulator D).
#define ICD_TEN(t)                                                                                  \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define ICD_HUNDRED                                                                                 \
  ICD_TEN() ", " ICD_TEN(1) ", " ICD_TEN(2) ", " ICD_TEN(3) ", " ICD_TEN(4) ", " ICD_TEN(5) ", "    \
  ICD_TEN(6) ", " ICD_TEN(7) ", " ICD_TEN(8) ", " ICD_TEN(9)
#define ICD_NAMES_128                                                                               \
  ICD_TEN() ", " ICD_TEN(1) ", " ICD_TEN(2) ", " ICD_TEN(3) ", " ICD_TEN(4) ", " ICD_TEN(5)         \
  ", %60, %61, %62, %63"
#define ICD_NAMES_256                                                                               \
  ICD_HUNDRED ", " ICD_TEN(10) ", " ICD_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define ICD_4(r, j) r(c[j][0]), r(c[j][1]), r(c[j][2]), r(c[j][3])
#define ICD_16(r, j) ICD_4(r, j), ICD_4(r, j + 1), ICD_4(r, j + 2), ICD_4(r, j + 3)
#define ICD_SUMS_128(r) ICD_16(r, 0), ICD_16(r, 4), ICD_16(r, 8), ICD_16(r, 12)
#define ICD_SUMS_256(r) ICD_SUMS_128(r), ICD_16(r, 16), ICD_16(r, 20), ICD_16(r, 24), ICD_16(r, 28)
// 64 rows of A times N columns of W and 32 bytes of K are added to c. `end`: nothing is negated, and
// nothing transposed, which integers cannot be.
#define ICD_WGMMA(type, acc, r, n, words, kinds, descriptors, end)                                  \
  ICD_DEVICE void wgmma(type, acc (&c)[n / 8][4], u64 a, u64 b) {                                   \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n words "." kinds " {" ICD_NAMES_##n "}, "    \
                 descriptors ", 1" end ";\n" : ICD_SUMS_##n(r) : "l"(a), "l"(b));                   \
  }
#define ICD_WGMMAS(n, descriptors)                                                                  \
  ICD_WGMMA(F16, float, "+f", n, "k16", "f32.f16.f16", descriptors, ", 1, 1, 0, 0")                 \
  ICD_WGMMA(BF16, float, "+f", n, "k16", "f32.bf16.bf16", descriptors, ", 1, 1, 0, 0")              \
  ICD_WGMMA(S8, int, "+r", n, "k32", "s32.s8.s8", descriptors, "")
ICD_WGMMAS(128, "%64, %65")
ICD_WGMMAS(256, "%128, %129")
#endif

// A stage holds two tiles: 128 bytes of K for each row of A and each column of W.
template <class G> struct WgmmaStage {
  static const int A_BYTES = G::BM * 128, BYTES = A_BYTES + G::BN * 128;

  // Of tiles `at` and `at + 1`, as far as they are below `last`; the rest is zero.
  static ICD_DEVICE void load(u8* stage, const GemmTile<G>& tile, int at, int last, int thread) {
    const int whole = last - at < 2 ? 1 : 2, c = thread & 7, line = thread >> 3;
    const int chunk = (c >> 2) < whole ? tile.chunk_of(at + (c >> 2), c & 3) : -1;
    const u8* row_a = tile.a + (long)(tile.m0 + line) * tile.row_bytes + (long)chunk * 16;
#pragma unroll
    for (int i = 0; i < G::BM; i += G::THREADS / 8) {
      const bool valid = chunk >= 0 && tile.m0 + line + i < tile.m;
      const u8* from = valid ? row_a + (long)i * tile.row_bytes : tile.a;
      copy_async(stage + wide_swizzle(line, c) + i * 128, from, valid);
    }
    // A warp reads 512 bytes; 8 threads write two rows whose chunks lie in different banks.
    const int row = (thread >> 5) * 8 + (thread >> 2 & 1) * 4 + (thread >> 3 & 3);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = half < whole;
      const u8* from = tile.w + ((long)(at + half * valid) * G::BN + row) * G::ROW + (c & 3) * 16;
      u8* to = stage + A_BYTES + wide_swizzle(row, half * 4 + (c & 3));
#pragma unroll
      for (int i = 0; i < G::BN; i += G::THREADS / 4)
        copy_async(to + i * 128, from + i * G::ROW, valid);
    }
  }
};

// Adds tiles `first` to `last` of K: a warpgroup makes 64 rows. Stage t - 2 is filled while t - 1 and t
// are read: all warpgroups had waited for product t - 2 when they met at the barrier of t.
template <class G>
ICD_DEVICE void gemm_sums(Wgmma, typename G::T::Acc (&acc)[G::WM / 16][G::WN / 8][4],
                          const GemmTile<G>& tile, int first, int last, u8* shared) {
  typedef WgmmaStage<G> S;
  const int thread = threadIdx.x, group = warpgroup(), stages = (last - first + 1) / 2;
  const u32 begin = shared_address(shared), base = (begin + 1023) & ~1023u;
  u8* buffer = shared + (base - begin);
#pragma unroll
  for (int s = 0; s < G::STAGES - 2; ++s) {
    if (s < stages) S::load(buffer + s * S::BYTES, tile, first + 2 * s, last, thread);
    copy_commit();
  }
  pin(acc[0]);
  for (int t = 0; t < stages; ++t) {
    copy_wait<G::STAGES - 3>();
    fence_async_proxy();
    sync_block();
    const u32 stage = base + t % G::STAGES * S::BYTES, w = stage + S::A_BYTES;
    const u32 a = stage + group * 64 * 128;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma(typename G::T(), acc[0], matrix_descriptor(a + step * 32), matrix_descriptor(w + step * 32));
    wgmma_commit();
    const int ahead = t + G::STAGES - 2;
    if (ahead < stages)
      S::load(buffer + ahead % G::STAGES * S::BYTES, tile, first + 2 * ahead, last, thread);
    copy_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  pin(acc[0]);
}

// What lane i of four holds in word q becomes what lane q holds in word i.
ICD_DEVICE void turn_four(u32 (&words)[4]) {
#pragma unroll
  for (int by = 1; by < 4; by *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & by) continue;
      const bool upper = threadIdx.x & by;
      const u32 other = shuffle_xor(upper ? words[i] : words[i + by], by);
      if (upper) words[i] = other;
      else words[i + by] = other;
    }
}

// Types of 16 bits go out by 16 bytes: four lanes, which hold two columns each of four blocks of 8, write a
// block each, 64 bytes of a row together, and read the residual so. Lanes beyond C only exchange.
template <class G>
ICD_DEVICE void gemm_write_wide(const typename G::T::Acc (&acc)[G::WN / 8][4], const GemmResult<G>& to,
                                int first_row, int first_column) {
  typename G::Out out;
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < G::WN / 8; j += 4)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + half * 8, mine = first_column - lane * 2 + (j + lane) * 8;
      const bool inside = row < to.m && mine < to.n;
      const long at = ((long)row * to.n + mine) * 2;
      Chunk more = {{0, 0, 0, 0}};
      if constexpr (G::RESIDUAL) {
        if (inside) more = load_chunk((const u8*)to.residual + at);
        turn_four(more.w);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = first_column + (j + i) * 8;
        const GemmColumns<G> columns(to.bias, to.column_scale, column < to.n ? column : 0, to.end);
        const float x = (float)acc[j + i][half * 2], y = (float)acc[j + i][half * 2 + 1];
        float2 two = columns.value(x, y, to.row_scale, row < to.m ? row : 0);
        if constexpr (G::RESIDUAL) {
          two.x += widen(out, (u16)(more.w[i] & 0xffff));
          two.y += widen(out, (u16)(more.w[i] >> 16));
        }
        more.w[i] = narrow2(out, two.x, two.y);
      }
      turn_four(more.w);
      if (inside) store_chunk((u8*)to.c + at, more);
    }
}
template <class G>
ICD_DEVICE void gemm_write(Wgmma, const typename G::T::Acc (&acc)[G::WM / 16][G::WN / 8][4],
                           const GemmResult<G>& to, int first_row, int first_column) {
  if constexpr (G::SPLITS == 1 && G::Out::bytes == 2)
    gemm_write_wide<G>(acc[0], to, first_row, first_column);
  else
    gemm_write(Mma(), acc, to, first_row, first_column);
}

}  // namespace icd
#endif
