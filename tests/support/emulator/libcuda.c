// The part of libcuda that Triton links to: a launch goes to a callback, all else succeeds and does nothing.
#include <stddef.h>
#include <stdint.h>

typedef void (*callback_t)(const void *config, void *function, void **parameters);
static callback_t callback = 0;

void emulator_set_callback(callback_t function) { callback = function; }

int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) {
  if (callback) callback(config, function, parameters);
  return 0;
}

int cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  *(uint64_t *)data = pointer;
  return 0;
}

int cuCtxGetCurrent(void **context) {
  *context = (void *)1;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = "an error of the emulator";
  return 0;
}

int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}

#define DOES_NOTHING(name) int name() { return 0; }
DOES_NOTHING(cuCtxGetLimit) DOES_NOTHING(cuCtxSetCurrent) DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuDeviceGet) DOES_NOTHING(cuDeviceGetAttribute) DOES_NOTHING(cuDevicePrimaryCtxRetain)
DOES_NOTHING(cuFuncGetAttribute) DOES_NOTHING(cuFuncSetAttribute) DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuInit) DOES_NOTHING(cuModuleGetFunction) DOES_NOTHING(cuModuleLoadData)
DOES_NOTHING(cuOccupancyMaxActiveClusters) DOES_NOTHING(cuTensorMapEncodeTiled)
