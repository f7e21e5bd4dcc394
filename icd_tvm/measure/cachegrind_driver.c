/* Calls one function of a TVM library on tensors laid out in one arena.
 *
 * usage: driver LIBRARY SYMBOL ARENA_FILE CALLS [CODE BITS OFFSET NDIM DIM...]...
 * The arena is mapped at a fixed address, so that cache sets are the same in every run. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/c_api.h>

#define MAX_TENSORS 64
#define MAX_DIMS 8
static char* const kArena = (char*)0x100000000000;

static int fail(const char* what) {
  fprintf(stderr, "driver: %s\n", what);
  return 1;
}

int main(int argc, char** argv) {
  static DLTensor tensors[MAX_TENSORS];
  static TVMFFIAny args[MAX_TENSORS];
  static int64_t shapes[MAX_TENSORS][MAX_DIMS], strides[MAX_TENSORS][MAX_DIMS];
  if (argc < 5) return fail("too few arguments");
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail(dlerror());
  TVMFFISafeCallType function = (TVMFFISafeCallType)dlsym(library, argv[2]);
  if (!function) return fail("no such symbol");
  int file = open(argv[3], O_RDONLY);
  struct stat info;
  if (file < 0 || fstat(file, &info)) return fail("cannot open the arena");
  char* arena = mmap(kArena, info.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0);
  if (arena != kArena) return fail("cannot map the arena");
  int count = 0;
  for (int at = 5; at < argc; ++count) {
    if (count == MAX_TENSORS || at + 4 > argc) return fail("bad tensor");
    DLTensor* tensor = &tensors[count];
    tensor->device.device_type = kDLCPU;
    tensor->dtype.code = atoi(argv[at++]);
    tensor->dtype.bits = atoi(argv[at++]);
    tensor->dtype.lanes = 1;
    tensor->data = arena + atoll(argv[at++]);
    tensor->ndim = atoi(argv[at++]);
    if (tensor->ndim > MAX_DIMS || at + tensor->ndim > argc) return fail("bad shape");
    for (int axis = 0; axis < tensor->ndim; ++axis) shapes[count][axis] = atoll(argv[at++]);
    int64_t step = 1;
    for (int axis = tensor->ndim - 1; axis >= 0; --axis) {
      strides[count][axis] = step;
      step *= shapes[count][axis];
    }
    tensor->shape = shapes[count];
    tensor->strides = strides[count];
    args[count].type_index = kTVMFFIDLTensorPtr;
    args[count].v_ptr = tensor;
  }
  for (int call = 0; call < atoi(argv[4]); ++call) {
    TVMFFIAny result;
    memset(&result, 0, sizeof result);
    if (function(NULL, args, count, &result)) return fail("the call failed");
  }
  return 0;
}
