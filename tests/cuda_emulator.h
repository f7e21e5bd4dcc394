// Runs CUDA kernels on a CPU, thread by thread: every thread of a block is a fiber that goes on until
// it meets a barrier or a warp instruction. Written from the PTX ISA's fragment tables, not from the
// kernels. Made to notice mistakes:
// - asynchronous copies land only when they are waited for; shared memory starts as NaN;
// - threads run in either order (ICD order 0: first to last, 1: last to first, else shuffled);
// - a barrier that not all threads reach, or addresses that are not aligned or not shared, stop it;
// - rows of one ldmatrix phase that share banks are counted.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#define ICD_EMULATE
#define ICD_DEVICE inline
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emu {

struct Dim { int x, y, z; };
struct Copy { void* to; const void* from; bool valid; int group; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> copies;
  int committed = 0, warp_turn = 0;
  bool done = false;
};
struct Warp { char slot[2][32][64]; int arrived = 0, turn = 0; };

static Dim thread_index, block_index, grid_size;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static ucontext_t scheduler;
static int current, barrier_arrived, barrier_turn, progress;
static unsigned char *shared_begin, *shared_end;
static long conflicts;
static void (*body)(void*);
static void* body_argument;

static char failure[200];

static void fail(const char* why) {
  if (!failure[0])
    snprintf(failure, sizeof failure, "%s (block %d %d %d, thread %d)", why, block_index.x,
             block_index.y, block_index.z, current);
}
// Leaves the thread for good; the scheduler gives up at once.
static void stop(const char* why) {
  fail(why);
  for (;;) swapcontext(&fibers[current].context, &scheduler);
}
static void yield() {
  swapcontext(&fibers[current].context, &scheduler);
  thread_index = {current, 0, 0};
}
static void barrier() {
  int turn = barrier_turn;
  ++progress;
  if (++barrier_arrived == (int)fibers.size()) {
    barrier_arrived = 0;
    ++barrier_turn;
  }
  while (barrier_turn == turn) yield();
}
// Give `bytes` to the warp, return what lane `from` gave. Two slots: no lane is two turns ahead.
struct Exchange {
  Warp& warp;
  int turn;
  explicit Exchange(const void* mine, size_t bytes) : warp(warps[current / 32]), turn(0) {
    turn = fibers[current].warp_turn++;
    memcpy(warp.slot[turn & 1][current % 32], mine, bytes);
    ++progress;
    if (++warp.arrived == 32) {
      warp.arrived = 0;
      ++warp.turn;
    }
    while (warp.turn <= turn) yield();
  }
  template <class V> V of(int lane) const {
    V value;
    memcpy(&value, warp.slot[turn & 1][lane], sizeof value);
    return value;
  }
};
static void check_shared(const void* p, const char* what) {
  const unsigned char* at = (const unsigned char*)p;
  if ((uintptr_t)p % 16 || at < shared_begin || at + 16 > shared_end) stop(what);
}
// What products of warpgroups (cuda_emulator_wgmma.h) have to do with copies, and with a thread's end.
static void reset_products(int threads);
static void copy_begins(const void* to);
static void copy_landed(const void* to);
static void products_ended();

static void entry() {
  body(body_argument);
  products_ended();
  if (!fibers[current].copies.empty()) {
    // Copies that nobody waits for land in a block that is gone.
    for (const Copy& copy : fibers[current].copies)
      if (copy.valid) stop("a copy is never waited for");
  }
  fibers[current].done = true;
  ++progress;
  swapcontext(&fibers[current].context, &scheduler);
}
static void run_block(int threads, int order, std::mt19937& random) {
  reset_products(threads);
  fibers.resize(threads);
  warps.assign(threads / 32, Warp());
  barrier_arrived = barrier_turn = 0;
  std::vector<int> sequence(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(64 << 10);
    fiber.copies.clear();
    fiber.committed = fiber.warp_turn = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
    sequence[i] = order == 1 ? threads - 1 - i : i;
  }
  if (order > 1) std::shuffle(sequence.begin(), sequence.end(), random);
  for (int left = threads; left > 0;) {
    progress = 0;
    left = 0;
    for (int i : sequence) {
      if (fibers[i].done) continue;
      current = i;
      thread_index = {i, 0, 0};
      swapcontext(&scheduler, &fibers[i].context);
      if (failure[0]) return;
      left += !fibers[i].done;
    }
    if (left && !progress) return fail("not all threads reach a barrier or warp instruction");
  }
}

}  // namespace emu

#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define gridDim emu::grid_size

namespace icd {
typedef unsigned int u32;
typedef unsigned short u16;
struct F16;
struct BF16;
struct S8;
struct F8;
struct Chunk;

static inline void sync_block() { emu::barrier(); }
template <class V> static inline V shuffle_xor(V value, int mask) {
  emu::Exchange all(&value, sizeof value);
  return all.of<V>((emu::current % 32) ^ mask);
}
static inline void copy_async(void* to, const void* from, bool valid) {
  emu::check_shared(to, "copy_async: bad shared address");
  if ((uintptr_t)from % 16) emu::stop("copy_async: unaligned global address");
  emu::copy_begins(to);
  emu::Fiber& fiber = emu::fibers[emu::current];
  fiber.copies.push_back({to, from, valid, fiber.committed});
}
static inline void copy_commit() { ++emu::fibers[emu::current].committed; }
template <int N> static inline void copy_wait() {
  emu::Fiber& fiber = emu::fibers[emu::current];
  std::vector<emu::Copy> later;
  for (const emu::Copy& copy : fiber.copies) {
    if (copy.group >= fiber.committed - N) {
      later.push_back(copy);
      continue;
    }
    if (copy.valid) memcpy(copy.to, copy.from, 16);
    else memset(copy.to, 0, 16);
    emu::copy_landed(copy.to);
  }
  fiber.copies.swap(later);
}
template <class C = Chunk> static inline C load_stream(const void* p) {
  if ((uintptr_t)p % 16) emu::stop("load_stream: unaligned address");
  C r;
  memcpy(&r, p, 16);
  return r;
}
template <class C = Chunk> static inline C load_chunk(const void* p) { return load_stream<C>(p); }
template <class C> static inline void store_chunk(void* p, const C& c) {
  if ((uintptr_t)p % 16) emu::stop("store_chunk: unaligned address");
  memcpy(p, &c, 16);
}
static inline void matrix_words(u32 (&r)[4], const void* row, bool trans) {
  emu::check_shared(row, "ldmatrix: bad shared address");
  emu::Exchange all(&row, sizeof row);
  const int lane = emu::current % 32;
  for (int m = 0; m < 4; ++m) {
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) {
      unsigned bank = 1u << ((uintptr_t)(all.of<const u16*>(8 * m + i)) / 16 % 8);
      if (lane == 0 && (banks & bank)) ++emu::conflicts;
      banks |= bank;
    }
    u16 low, high;
    if (trans) {
      low = all.of<const u16*>(8 * m + lane % 4 * 2)[lane / 4];
      high = all.of<const u16*>(8 * m + lane % 4 * 2 + 1)[lane / 4];
    } else {
      low = all.of<const u16*>(8 * m + lane / 4)[lane % 4 * 2];
      high = all.of<const u16*>(8 * m + lane / 4)[lane % 4 * 2 + 1];
    }
    r[m] = low | (u32)high << 16;
  }
}
static inline void load_matrix(u32 (&r)[4], const void* row) { matrix_words(r, row, false); }
static inline void load_matrix_trans(u32 (&r)[4], const void* row) { matrix_words(r, row, true); }

static inline float bits_to_float(u32 bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline float half_to_float(u16 bits) { _Float16 x; memcpy(&x, &bits, 2); return (float)x; }
static inline u16 float_to_half(float x) { _Float16 h = (_Float16)x; u16 r; memcpy(&r, &h, 2); return r; }
static inline u16 float_to_bf16(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Fragments { u32 a[4], b[2]; };
// Element k of a row of a 32-byte fragment row, of type T.
static inline float element(F16*, u32 word, int part) { return half_to_float((u16)(word >> part * 16)); }
static inline float element(BF16*, u32 word, int part) {
  return bits_to_float((word >> part * 16 & 0xffff) << 16);
}
static inline int element(S8*, u32 word, int part) { return (int8_t)(word >> part * 8); }
// e4m3 of the OCP 8-bit floating point specification: bias 7, subnormals, one NaN, no infinity.
static inline float element(F8*, u32 word, int part) {
  const int bits = word >> part * 8 & 0xff, exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return NAN;
  const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return bits & 0x80 ? -size : size;
}

template <class T, class Acc>
static inline void matrix_multiply(Acc (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int depth) {
  Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emu::Exchange all(&mine, sizeof mine);
  const int lane = emu::current % 32, per_word = depth / 8;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    Acc sum = 0;
    for (int k = 0; k < depth; ++k) {
      const int within = k % (depth / 2), upper = k / (depth / 2);
      u32 wa = all.of<Fragments>(row % 8 * 4 + within / per_word).a[row / 8 + upper * 2];
      u32 wb = all.of<Fragments>(column * 4 + within / per_word).b[upper];
      sum += element((T*)nullptr, wa, within % per_word) * element((T*)nullptr, wb, within % per_word);
    }
    c[e] += sum;
  }
}
struct SparseFragments { u32 a[4], b[4], meta; };
// A 16 x 16 of kept elements; those of the first 16 of K have their places in lane 0 of four, the
// others in lane 1 (sparsity selector 0): 2 bits each, row lane / 4 below, the row 8 on above.
template <class T>
static inline void mma_sparse(T, float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  SparseFragments mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, meta};
  emu::Exchange all(&mine, sizeof mine);
  const int lane = emu::current % 32;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float sum = 0;
    for (int kept = 0; kept < 16; ++kept) {
      const int half = kept / 8, within = kept % 8;
      const u32 places = all.of<SparseFragments>(row % 8 * 4 + half).meta >> row / 8 * 16;
      const int place = places >> within * 2 & 3, before = places >> (within & 6) * 2 & 3;
      if (within % 2 && place <= before) emu::stop("mma_sparse: places are not in order");
      const int k = kept / 2 * 4 + place;
      u32 wa = all.of<SparseFragments>(row % 8 * 4 + within / 2).a[row / 8 + half * 2];
      u32 wb = all.of<SparseFragments>(column * 4 + k % 8 / 2).b[k / 8];
      sum += element((T*)nullptr, wa, within % 2) * element((T*)nullptr, wb, k % 2);
    }
    c[e] += sum;
  }
}
template <class T> static inline void mma(T, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  matrix_multiply<T>(c, a, b0, b1, 32 / T::bytes);
}
template <class T> static inline void mma(T, int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  matrix_multiply<T>(c, a, b0, b1, 32);
}
}  // namespace icd

#include "cuda_emulator_wgmma.h"

extern "C" const char* emulator_failure() { return emu::failure; }

// Run a kernel; returns how often rows of one ldmatrix phase shared a bank, -1 if it was stopped.
static long emulate(void (*body)(void*), void* argument, const int* grid, int threads,
                    unsigned char* shared, int shared_bytes, int order) {
  std::mt19937 random(order);
  emu::body = body;
  emu::body_argument = argument;
  emu::conflicts = 0;
  emu::failure[0] = 0;
  emu::grid_size = {grid[0], grid[1], grid[2]};
  emu::shared_begin = shared;
  emu::shared_end = shared + shared_bytes;
  for (int z = 0; z < grid[2]; ++z)
    for (int y = 0; y < grid[1]; ++y)
      for (int x = 0; x < grid[0]; ++x) {
        emu::block_index = {x, y, z};
        memset(shared, 0xff, shared_bytes);
        emu::run_block(threads, order, random);
        if (emu::failure[0]) return -1;
      }
  return emu::conflicts;
}
