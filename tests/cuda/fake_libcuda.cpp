// A CUDA driver that only prints its calls, one a line: enough of libcuda.so.1 for CuPy's binding to load and launch
// kernels.
#include <cstdio>
#include <cstring>

static int context = 0;

extern "C" {

int cuCtxGetCurrent(void** current) {
  *current = context ? &context : nullptr;
  return 0;
}

// Replaces the CUDA runtime, which creates a context when a device is set.
void fake_set_device(int device) {
  std::printf("device %d\n", device);
  context = 1;
}

void fake_lose_context() { context = 0; }

int cuModuleLoadData(void** module, const void* image) {
  std::printf("module %.5s\n", (const char*)image);
  *module = (void*)0x10;
  return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  std::printf("function %s of %p\n", name, module);
  *function = (void*)0x20;
  return 0;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** params,
                   void** extra) {
  unsigned char bytes[24];
  std::memcpy(bytes, params[0], sizeof(bytes));
  std::printf("launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %d params ", function, grid_x, grid_y,
              grid_z, block_x, block_y, block_z, shared_bytes, stream, extra != nullptr);
  for (unsigned i = 0; i < sizeof(bytes); ++i) std::printf("%02x", bytes[i]);
  std::printf("\n");
  std::fflush(stdout);
  return 0;
}

int cuGetErrorName(int error, const char** text) {
  *text = "FAKE";
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  *text = "fake";
  return 0;
}
}  // extern "C"
