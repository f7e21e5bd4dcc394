// The part of CUDA's driver that the suite uses, on the host: memory is the host's, "machine code" is
// the path of a library that tests/cuda_emulation.py made, and every launch takes a microsecond.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef long (*Entry)(void**, const int*, int, unsigned char*, int, int);
typedef struct { Entry entry; int count, shared; } Function;
typedef struct { Function* function; int grid[3], threads, shared; uint64_t values[32]; } Launch;
typedef struct { Launch* launches; int count, replayed; } Graph;
enum { INVALID = 1, FAILED = 700 };

static Graph* capturing;
static long started;
static int profiling;

int cuInit(unsigned flags) { return flags ? INVALID : 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 0; return ordinal; }
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = &started; return device; }
int cuCtxSetCurrent(void* context) { return context == &started ? 0 : INVALID; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamCreate(void** stream, unsigned flags) { *stream = &capturing; return flags != 1; }
int cuStreamSynchronize(void* stream) { return stream == &capturing ? 0 : INVALID; }
int cuDeviceGetName(char* name, int size, int device) { snprintf(name, size, "Emulated"); return device; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = 1; return device;
    case 38: *value = 1 << 16; return device;
    case 75: *value = 9; return device;
    case 76: *value = 0; return device;
  }
  return INVALID;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = dlopen((const char*)image, RTLD_NOW);
  return *module ? 0 : INVALID;
}
int cuModuleGetFunction(void** result, void* module, const char* name) {
  char count[200];
  Function* function = calloc(1, sizeof *function);
  snprintf(count, sizeof count, "%s_count", name);
  function->entry = (Entry)dlsym(module, name);
  int* arguments = dlsym(module, count);
  if (!function->entry || !arguments) return INVALID;
  function->count = *arguments;
  *result = function;
  return 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  if (attribute != 8) return INVALID;
  ((Function*)function)->shared = value;
  return 0;
}
int cuMemAlloc_v2(uint64_t* pointer, size_t size) {
  *pointer = (uint64_t)aligned_alloc(256, (size + 255) / 256 * 256);
  memset((void*)*pointer, 0xff, size);
  return 0;
}
int cuMemFree_v2(uint64_t pointer) { free((void*)pointer); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t size) { memcpy((void*)to, from, size); return 0; }
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) { memcpy(to, (void*)from, size); return 0; }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void* stream) {
  memcpy((void*)to, (void*)from, size);
  ++started;
  return stream == &capturing ? 0 : INVALID;
}
static int run(const Launch* launch) {
  unsigned char* raw = malloc(launch->shared + 64);
  unsigned char* shared = raw + (64 - (uintptr_t)raw % 64) % 64;
  ++started;
  long conflicts = launch->function->entry((void**)launch->values, launch->grid, launch->threads, shared,
                                           launch->shared, 0);
  free(raw);
  return conflicts ? FAILED : 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** arguments, void** extra) {
  Launch launch = {function, {(int)x, (int)y, (int)z}, (int)threads, (int)shared, {0}};
  if (by != 1 || bz != 1 || extra || stream != &capturing || (int)shared > launch.function->shared)
    return INVALID;
  for (int i = 0; i < launch.function->count; ++i) launch.values[i] = *(uint64_t*)arguments[i];
  if (!capturing) return run(&launch);
  capturing->launches = realloc(capturing->launches, (capturing->count + 1) * sizeof launch);
  capturing->launches[capturing->count++] = launch;
  return 0;
}
int cuStreamBeginCapture_v2(void* stream, int mode) {
  capturing = calloc(1, sizeof *capturing);
  return stream == &capturing && mode == 1 ? 0 : INVALID;
}
int cuStreamEndCapture(void* stream, void** graph) {
  *graph = capturing;
  capturing = NULL;
  return stream == &capturing ? 0 : INVALID;
}
int cuGraphInstantiateWithFlags(void** ready, void* graph, unsigned long long flags) {
  *ready = graph;
  return flags ? INVALID : 0;
}
// Only one launch of a graph is executed, once: its times count, values are checked elsewhere.
int cuGraphLaunch(void* ready, void* stream) {
  Graph* graph = ready;
  if (stream != &capturing || !graph->count) return INVALID;
  int status = graph->replayed++ ? 0 : run(graph->launches);
  started += graph->count - (graph->replayed == 1);
  return status;
}
int cuEventCreate(void** event, unsigned flags) { *event = calloc(1, sizeof(long)); return (int)flags; }
int cuEventRecord(void* event, void* stream) { *(long*)event = started; return stream != &capturing; }
int cuEventSynchronize(void* event) { return event ? 0 : INVALID; }
int cuEventElapsedTime(float* milliseconds, void* first, void* last) {
  *milliseconds = 1e-3f * (float)(*(long*)last - *(long*)first);
  return 0;
}
int cuProfilerStart(void) { return profiling ? INVALID : (profiling = 1, 0); }
int cuProfilerStop(void) { return profiling ? (profiling = 0) : INVALID; }
int cuEventDestroy_v2(void* event) { free(event); return 0; }
