// Warpgroup products on a CPU, from "Asynchronous Warpgroup Level Matrix Instructions" of the PTX ISA: not
// from the kernels, and stricter than a device. A product is read when all 128 threads have started it;
// its sums come into the registers when they are waited for, which hold NaN (-1) until then. Stopped is
// - a product without wgmma.fence after the kernel's start or after a wait, or that nobody waits for;
// - registers that change while a product is under way ("wgmma.fence", "wgmma.wait_group");
// - shared memory that cp.async wrote and its thread did not fence ("Async Proxy");
// - a copy into shared memory, or a change of it, before a product that reads it was waited for by all;
// - 128 threads that do not meet with one shape and one pair of descriptors (".aligned").
#include <memory>

namespace emu {

// Where shared memory begins in its window: a multiple of 16, no more is promised.
const unsigned SHARED_BASE = 0x490;
typedef unsigned long long u64;

struct Product {
  std::vector<const unsigned char*> chunks;
  std::vector<unsigned char> seen;
  std::vector<float> a, b;  // [64][depth], [n][depth]
  int n, depth, left = 128;
};
struct Pending { std::shared_ptr<Product> product; int sums, group; };
// The true sums of registers that a product is adding to.
struct Sums { unsigned* registers; std::vector<unsigned> values; int under_way; bool whole; };
struct Issuer {
  std::vector<Pending> pending;
  std::vector<Sums> sums;
  std::vector<int> unfenced;
  int committed = 0, turn = 0;
  bool fenced = false;
};
struct Meeting { u64 given[128][4]; };
struct Warpgroup { Meeting slot[2]; std::shared_ptr<Product> product[2]; int arrived = 0, turn = 0; };

static std::vector<Issuer> issuers;
static std::vector<Warpgroup> warpgroups;
// Of each 16 bytes: the thread whose copy no fence follows, and products that read them.
static std::vector<int> unfenced_by, readers;

static void reset_products(int threads) {
  issuers.assign(threads, Issuer());
  warpgroups.assign((threads + 127) / 128, Warpgroup());
  unfenced_by.assign((shared_end - shared_begin) / 16 + 1, -1);
  readers.assign(unfenced_by.size(), 0);
}
static size_t place_of(const void* p) { return ((const unsigned char*)p - shared_begin) / 16; }
static void copy_begins(const void* to) {
  if (readers[place_of(to)]) stop("a copy begins into what a product still reads");
}
static void copy_landed(const void* to) {
  unfenced_by[place_of(to)] = current;
  issuers[current].unfenced.push_back((int)place_of(to));
}
static void products_ended() {
  if (!issuers[current].pending.empty()) stop("a product is never waited for");
}

// "Matrix Descriptor Format": 14 bits each, without their low 4, of the address and of two offsets.
struct Descriptor {
  unsigned start, leading, stride;
  explicit Descriptor(u64 bits) {
    start = (bits & 0x3fff) << 4;
    leading = (bits >> 16 & 0x3fff) << 4;
    stride = (bits >> 32 & 0x3fff) << 4;
    if (bits >> 62 != 1) stop("wgmma: no other swizzle than that of 128 bytes is modelled");
    if (bits >> 49 & 7) stop("wgmma: a base offset is not modelled");
    if (bits & 0x3ff1c000c000c000ull) stop("wgmma: reserved bits of a descriptor");
    // Base offset 0: "when the repeating pattern starts at a 1024-byte boundary".
    if (start & 0x380) stop("wgmma: swizzled lines do not begin at 1024 bytes");
  }
};
// The 16-byte chunk at an address is swapped by the exclusive or with the number of its 128-byte line.
static const unsigned char* swizzled(unsigned address) {
  const unsigned at = (address ^ (address >> 7 & 7) << 4) - SHARED_BASE;
  if (at + 1 > (unsigned)(shared_end - shared_begin)) stop("wgmma: outside of shared memory");
  return shared_begin + at;
}
// Swizzled layouts of "Strides": K-major lines hold K, 8 rows to a pattern, which follow each other by the
// stride offset. MN-major lines hold 64 rows of 2 bytes, 8 of K to a pattern; patterns follow each other
// by the leading offset in M or N, by the stride offset in K.
template <class T>
static void read_matrix(Product& product, std::vector<float>& values, u64 bits, int rows, bool mn_major) {
  const Descriptor d(bits);
  values.resize(rows * product.depth);
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < product.depth; ++k) {
      const unsigned address =
          mn_major ? d.start + r / 64 * d.leading + k / 8 * d.stride + k % 8 * 128 + r % 64 * 2
                   : d.start + r / 8 * d.stride + r % 8 * 128 + k * T::bytes;
      const unsigned char* at = swizzled(address);
      icd::u32 word = 0;
      memcpy(&word, at, T::bytes);
      values[r * product.depth + k] = (float)icd::element((T*)nullptr, word, 0);
      if (address % 16) continue;
      if (unfenced_by[place_of(at)] >= 0) stop("wgmma reads a copy that no proxy fence follows");
      ++readers[place_of(at)];
      product.chunks.push_back(at);
      product.seen.insert(product.seen.end(), at, at + 16);
    }
}
template <class T> static std::shared_ptr<Product> start_product(const u64 (&given)[4]) {
  std::shared_ptr<Product> made(new Product());
  made->n = (int)given[2];
  made->depth = 32 / T::bytes;
  read_matrix<T>(*made, made->a, given[0], 64, given[3] & 1);
  read_matrix<T>(*made, made->b, given[1], made->n, given[3] & 2);
  return made;
}
// What all 128 threads start together.
template <class T> static std::shared_ptr<Product> meet(const u64 (&mine)[4]) {
  if (fibers.size() % 128) stop("wgmma: threads are no whole warpgroups");
  Warpgroup& group = warpgroups[current / 128];
  const int turn = issuers[current].turn++;
  Meeting& slot = group.slot[turn & 1];
  memcpy(slot.given[current % 128], mine, sizeof mine);
  ++progress;
  if (++group.arrived == 128) {
    for (int i = 1; i < 128; ++i)
      if (memcmp(slot.given[i], slot.given[0], sizeof mine)) stop("wgmma: threads differ");
    group.product[turn & 1] = start_product<T>(slot.given[0]);
    group.arrived = 0;
    ++group.turn;
  }
  while (group.turn <= turn) yield();
  return group.product[turn & 1];
}
static int hold(Issuer& issuer, void* registers, int count) {
  size_t at = 0;
  while (at < issuer.sums.size() && issuer.sums[at].registers != registers) ++at;
  if (at < issuer.sums.size() && issuer.sums[at].under_way) return (int)at;
  if (!issuer.fenced) stop("wgmma: no wgmma.fence before it");
  if (at == issuer.sums.size()) issuer.sums.push_back(Sums());
  const unsigned* values = (const unsigned*)registers;
  issuer.sums[at] = {(unsigned*)registers, {values, values + count}, 0, false};
  memset(registers, 0xff, count * 4);
  return (int)at;
}
template <class T, class Acc>
static void start(Acc* registers, u64 a, u64 b, int n, bool a_mn_major, bool b_mn_major) {
  if ((a_mn_major || b_mn_major) && T::bytes != 2) stop("wgmma: only 16-bit types are transposed");
  const u64 mine[4] = {a, b, (u64)n, (u64)a_mn_major | (u64)b_mn_major << 1};
  std::shared_ptr<Product> product = meet<T>(mine);
  Issuer& issuer = issuers[current];
  const int sums = hold(issuer, registers, n / 2);
  ++issuer.sums[sums].under_way;
  issuer.sums[sums].whole = Acc(0.5f) == 0;
  issuer.pending.push_back({product, sums, issuer.committed});
}
// "Matrix Fragments for wgmma.mma_async.m64nNk16", accumulator D: 16 rows to a warp, of each 8 columns
// two neighbours of row lane / 4, then those of the row 8 below.
template <class Acc> static void add(std::vector<unsigned>& values, const Product& product) {
  const int lane = current % 32, warp = current % 128 / 32;
  for (size_t i = 0; i < values.size(); ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < product.depth; ++k)
      sum += product.a[row * product.depth + k] * product.b[column * product.depth + k];
    Acc value;
    memcpy(&value, &values[i], 4);
    value += (Acc)sum;
    memcpy(&values[i], &value, 4);
  }
}
static void finish(const Pending& one) {
  Issuer& issuer = issuers[current];
  Sums& sums = issuer.sums[one.sums];
  Product& product = *one.product;
  for (size_t i = 0; i < product.chunks.size(); ++i)
    if (memcmp(product.chunks[i], &product.seen[16 * i], 16)) stop("shared memory changes under wgmma");
  if (--product.left == 0)
    for (const unsigned char* chunk : product.chunks) --readers[place_of(chunk)];
  for (size_t i = 0; i < sums.values.size(); ++i)
    if (sums.registers[i] != ~0u) stop("registers change under wgmma");
  if (sums.whole) add<int>(sums.values, product);
  else add<float>(sums.values, product);
  if (--sums.under_way == 0) memcpy(sums.registers, sums.values.data(), sums.values.size() * 4);
}
static void wait_products(int most) {
  Issuer& issuer = issuers[current];
  std::vector<Pending> later;
  for (const Pending& one : issuer.pending)
    if (one.group >= issuer.committed - most) later.push_back(one);
    else finish(one);
  issuer.pending.swap(later);
  if (!issuer.pending.empty()) return;
  issuer.sums.clear();
  issuer.fenced = false;
}

}  // namespace emu

namespace icd {
static inline u32 shared_address(const void* p) {
  return (u32)((const unsigned char*)p - emu::shared_begin) + emu::SHARED_BASE;
}
static inline void fence_async_proxy() {
  emu::Issuer& issuer = emu::issuers[emu::current];
  for (int place : issuer.unfenced)
    if (emu::unfenced_by[place] == emu::current) emu::unfenced_by[place] = -1;
  issuer.unfenced.clear();
}
static inline int warpgroup() { return emu::current / 128; }
static inline void wgmma_fence() { emu::issuers[emu::current].fenced = true; }
static inline void wgmma_commit() { ++emu::issuers[emu::current].committed; }
template <int N> static inline void wgmma_wait() { emu::wait_products(N); }
template <class T, class Acc, int N>
static inline void wgmma(T, Acc (&c)[N][4], unsigned long long a, unsigned long long b) {
  emu::start<T>(&c[0][0], a, b, 8 * N, false, false);
}
template <class C> static inline void pin(C&) {}
}  // namespace icd
