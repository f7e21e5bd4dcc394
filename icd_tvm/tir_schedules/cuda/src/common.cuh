// Warp and copy instructions that all kernels share. Fragment layouts are those of the PTX ISA,
// "Matrix Fragments for mma.m16n8k16" and ".m16n8k32". With ICD_EMULATE they come from the host
// emulation of the tests instead, so that the very same kernels run on a CPU.
#ifndef ICD_COMMON
#define ICD_COMMON
#ifndef ICD_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ICD_DEVICE __device__ __forceinline__
#endif

namespace icd {

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

// Operand types. `bytes` of one element; the accumulator; the instruction.
struct F16 { typedef float Acc; static const int bytes = 2; };
struct BF16 { typedef float Acc; static const int bytes = 2; };
struct S8 { typedef int Acc; static const int bytes = 1; };
struct S4 { typedef float Acc; static const int bytes = 0; };
struct F8 { typedef float Acc; static const int bytes = 1; };  // e4m3: no infinities, 0x7f is NaN
struct F32 { typedef float Acc; static const int bytes = 4; };

struct alignas(16) Chunk { u32 w[4]; };

#ifndef ICD_EMULATE
ICD_DEVICE void sync_block() { __syncthreads(); }
ICD_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
ICD_DEVICE u32 shuffle_xor(u32 value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
ICD_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, zeros where `valid` is false; L1 is bypassed.
ICD_DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
               "l"(from), "r"(valid ? 16 : 0) : "memory");
}
ICD_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int N> ICD_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}
// Streamed once: 16 bytes through the read-only path, first to leave L1.
ICD_DEVICE Chunk load_stream(const void* p) {
  Chunk r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3]) : "l"(p));
  return r;
}
// Read more than once: 16 bytes in one instruction.
ICD_DEVICE Chunk load_chunk(const void* p) {
  uint4 v = *(const uint4*)p;
  return Chunk{{v.x, v.y, v.z, v.w}};
}
ICD_DEVICE void store_chunk(void* p, const Chunk& c) {
  *(uint4*)p = make_uint4(c.w[0], c.w[1], c.w[2], c.w[3]);
}
ICD_DEVICE void load_matrix(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))
               : "memory");
}
ICD_DEVICE void load_matrix_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))
               : "memory");
}
ICD_DEVICE void mma(F16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ICD_DEVICE void mma(BF16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ICD_DEVICE void mma(S8, int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// A with two of every four elements of a row: 16 x 16 kept ones, and `meta` of the lanes whose number
// is even or odd by halves of K: for 8 kept elements of row lane / 4, and of the row 8 below, 2 bits
// each that say which of the four it is, in ascending order ("Sparse matrix storage" of the PTX ISA).
ICD_DEVICE void mma_sparse(F16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                 "r"(b[3]), "r"(meta));
}
ICD_DEVICE void mma_sparse(BF16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 meta) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                 "r"(b[3]), "r"(meta));
}
// sm_89 and later. On sm_90 ptxas makes fp16 products of it: fp8 tensor cores there want wgmma.
ICD_DEVICE void mma(F8, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, "
               "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ICD_DEVICE float half_to_float(u16 bits) { return __half2float(__ushort_as_half(bits)); }
ICD_DEVICE u16 float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
ICD_DEVICE u16 float_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
ICD_DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
#endif

ICD_DEVICE float widen(F16, u16 bits) { return half_to_float(bits); }
ICD_DEVICE float widen(BF16, u16 bits) { return bits_to_float((u32)bits << 16); }
// Two e4m3, the low byte first. Every one is an fp16 too.
ICD_DEVICE float2 widen_fp8(u16 two) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  u32 both;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(both) : "h"(two));
  return make_float2(half_to_float((u16)(both & 0xffff)), half_to_float((u16)(both >> 16)));
#else
  // Sign, exponent and mantissa where fp16 has them are 2^-8 of the value; NaN becomes 480.
  u16 low = (u16)((two & 0x80) << 8 | (two & 0x7f) << 7);
  u16 high = (u16)((two & 0x8000) | (two & 0x7f00) >> 1);
  return make_float2(half_to_float(low) * 256.0f, half_to_float(high) * 256.0f);
#endif
}
ICD_DEVICE u16 narrow(F16, float x) { return float_to_half(x); }
ICD_DEVICE u16 narrow(BF16, float x) { return float_to_bf16(x); }
template <class T> ICD_DEVICE u32 narrow2(T t, float low, float high) {
  return (u32)narrow(t, low) | ((u32)narrow(t, high) << 16);
}
template <class T> ICD_DEVICE void widen8(T t, const Chunk& chunk, float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = widen(t, (u16)(chunk.w[i] & 0xffff));
    out[2 * i + 1] = widen(t, (u16)(chunk.w[i] >> 16));
  }
}

// Sum or maximum over aligned groups of `width` lanes; every lane gets it.
template <int WIDTH> ICD_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int m = WIDTH / 2; m > 0; m /= 2) x += shuffle_xor(x, m);
  return x;
}

// One element of a tensor of type T, for epilogues.
ICD_DEVICE float load_one(F32, const void* p, long i) { return ((const float*)p)[i]; }
ICD_DEVICE float load_one(F16 t, const void* p, long i) { return widen(t, ((const u16*)p)[i]); }
ICD_DEVICE float load_one(BF16 t, const void* p, long i) { return widen(t, ((const u16*)p)[i]); }
ICD_DEVICE float2 load_two(F32, const void* p, long i) { return ((const float2*)p)[i / 2]; }
template <class T> ICD_DEVICE float2 load_two(T t, const void* p, long i) {
  u32 both = ((const u32*)p)[i / 2];
  return make_float2(widen(t, (u16)(both & 0xffff)), widen(t, (u16)(both >> 16)));
}
ICD_DEVICE void store_two(F32, void* p, long i, float a, float b) {
  ((float2*)p)[i / 2] = make_float2(a, b);
}
ICD_DEVICE void store_two(F16 t, void* p, long i, float a, float b) {
  ((u32*)p)[i / 2] = narrow2(t, a, b);
}
ICD_DEVICE void store_two(BF16 t, void* p, long i, float a, float b) {
  ((u32*)p)[i / 2] = narrow2(t, a, b);
}
// What a code stands for: (code - point) * step.
struct Codes { float step, point; };
// The number whose nearest code is stored; other types store the value itself.
ICD_DEVICE float coded(S8, float x, Codes by) { return rintf(x / by.step) + by.point; }
template <class T> ICD_DEVICE float coded(T, float x, Codes) { return x; }
ICD_DEVICE u32 code_of(float x) { return (u32)(int)fminf(fmaxf(rintf(x), -128.0f), 127.0f) & 0xff; }
ICD_DEVICE void store_two(S8, void* p, long i, float a, float b) {
  ((u16*)p)[i / 2] = (u16)(code_of(a) | code_of(b) << 8);
}
ICD_DEVICE void store_one(F32, void* p, long i, float a) { ((float*)p)[i] = a; }
ICD_DEVICE void store_one(F16 t, void* p, long i, float a) { ((u16*)p)[i] = narrow(t, a); }
ICD_DEVICE void store_one(BF16 t, void* p, long i, float a) { ((u16*)p)[i] = narrow(t, a); }

// 0: none, 1: GELU by erf, 2: ReLU, 3: SiLU.
template <int ACT> ICD_DEVICE float activate(float x) {
  if (ACT == 1) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
  if (ACT == 2) return x > 0.0f ? x : 0.0f;
  if (ACT == 3) return x / (1.0f + expf(-x));
  return x;
}

}  // namespace icd
#endif
