// A CUDA runtime without a driver: what host code compiled by nvcc calls is handed to Python.
//
// Declarations are our own, after the ABI of the CUDA runtime API reference, so that no CUDA header is needed. The
// library is linked under the SONAME and the symbol version of the libcudart that the caller's binary asks for.
// Functions that are missing here make the loader refuse the binary (it is loaded with RTLD_NOW) and name the symbol.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct LaunchAttribute {
  int id;
  char padding[4];
  union {
    char bytes[64];
    Dim3 cluster;
  } value;
};

struct LaunchConfig {
  Dim3 grid, block;
  size_t shared;
  void* stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct FunctionAttributes {
  size_t shared, constant, local;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared;
};

// Functions that Python fills in. Each returns a CUDA error code, 0 for success.
struct Hooks {
  int (*launch)(int module, const char* name, const unsigned* grid, const unsigned* block, const unsigned* cluster,
                size_t shared, void** arguments);
  int (*function_attribute)(int module, const char* name, int attribute, int value);
  int (*device_attribute)(int attribute, int* value);
  int (*allocate)(size_t size, void** pointer);
  int (*occupancy)(int block, size_t shared, int* blocks);
  int (*encode)(void* map, int type, unsigned rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                const unsigned* box, const unsigned* steps, int interleave, int swizzle, int fill);
  int (*touched)(const void* pointer, size_t size);
};

struct Function {
  int module;
  std::string name;
};

struct Fatbin {
  unsigned magic, version;
  const void* data;
};

// A stream's events come in the order in which they are recorded.
struct Stream {
  uint64_t recorded = 0, done = 0;
  bool held = false, capturing = false;
};

struct Event {
  void* stream;
  uint64_t number;
};

constexpr int kInvalidValue = 1, kInvalidDeviceFunction = 98, kNotReady = 600, kNotSupported = 801;
constexpr int kNotPermitted = 800, kRelaxed = 2;
constexpr int kClusterDimension = 4;

Hooks hooks;
int last_error = 0;
Dim3 pushed_grid, pushed_block;
size_t pushed_shared;
void* pushed_stream;
int synchronisations = 0, live_events = 0, frees = 0, capture_mode = 0;

// Functions with static storage, as binaries register themselves before any other constructor may have run.
std::unordered_map<const void*, Function>& functions() {
  static std::unordered_map<const void*, Function> table;
  return table;
}

std::unordered_map<void*, Stream>& streams() {
  static std::unordered_map<void*, Stream> table;
  return table;
}

std::vector<const void*>& fatbins() {
  static std::vector<const void*> list;
  return list;
}

int noted(int error) {
  if (error) last_error = error;
  return error;
}

int launch(const void* function, Dim3 grid, Dim3 block, Dim3 cluster, size_t shared, void** arguments) {
  auto found = functions().find(function);
  if (found == functions().end() || !hooks.launch) return noted(kInvalidDeviceFunction);
  unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  unsigned c[3] = {cluster.x, cluster.y, cluster.z};
  return noted(hooks.launch(found->second.module, found->second.name.c_str(), g, b, c, shared, arguments));
}

int copy(void* to, const void* from, size_t size) {
  std::memmove(to, from, size);
  return hooks.touched ? hooks.touched(to, size) : 0;
}

int fill(void* to, int value, size_t size) {
  std::memset(to, value, size);
  return hooks.touched ? hooks.touched(to, size) : 0;
}

int occupancy(int* blocks, int threads, size_t shared) {
  return noted(hooks.occupancy ? hooks.occupancy(threads, shared, blocks) : kInvalidValue);
}

int encode_tiled(void* map, int type, unsigned rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                 const unsigned* box, const unsigned* steps, int interleave, int swizzle, int /*promotion*/,
                 int out_of_bounds) {
  if (!hooks.encode) return kInvalidValue;
  return hooks.encode(map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, out_of_bounds);
}

int entry_point(const char* name, void** function, int* status) {
  bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  if (status) *status = known ? 0 : 1;
  return known ? 0 : noted(kInvalidValue);
}

}  // namespace

extern "C" {

void mock_set_hooks(const Hooks* given) {
  hooks = *given;
  last_error = 0;
}
// For tests: the events of a stream that is held do not come until it is let go.
void mock_hold_stream(void* stream, bool held) {
  Stream& state = streams()[stream];
  state.held = held;
  if (!held) state.done = state.recorded;
}
void mock_capture(void* stream, bool capturing) { streams()[stream].capturing = capturing; }
int mock_synchronisations() { return synchronisations; }
int mock_live_events() { return live_events; }
int mock_frees() { return frees; }
int mock_fatbin_count() { return static_cast<int>(fatbins().size()); }
const void* mock_fatbin(int index) { return fatbins()[static_cast<size_t>(index)]; }

// Functions that nvcc's own code calls before main and at a <<<>>> launch.

void** __cudaRegisterFatBinary(void* wrapper) {
  fatbins().push_back(static_cast<const Fatbin*>(wrapper)->data);
  return reinterpret_cast<void**>(fatbins().size());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  functions()[host] = {static_cast<int>(reinterpret_cast<size_t>(handle)) - 1, name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pushed_grid = grid, pushed_block = block, pushed_shared = shared, pushed_stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pushed_grid, *block = pushed_block, *shared = pushed_shared, *static_cast<void**>(stream) = pushed_stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return launch(kernel, grid, block, {1, 1, 1}, shared, arguments);
}

// Launches.

int cudaLaunchKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return launch(function, grid, block, {1, 1, 1}, shared, arguments);
}
int cudaLaunchCooperativeKernel(const void* function, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  return launch(function, grid, block, {1, 1, 1}, shared, arguments);
}
int cudaLaunchKernelExC(const LaunchConfig* config, const void* function, void** arguments) {
  Dim3 cluster{1, 1, 1};
  for (unsigned n = 0; n < config->attribute_count; ++n)
    if (config->attributes[n].id == kClusterDimension) cluster = config->attributes[n].value.cluster;
  return launch(function, config->grid, config->block, cluster, config->shared, arguments);
}
int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  auto found = functions().find(function);
  if (found == functions().end() || !hooks.function_attribute) return noted(kInvalidDeviceFunction);
  return noted(hooks.function_attribute(found->second.module, found->second.name.c_str(), attribute, value));
}
int cudaFuncGetAttributes(FunctionAttributes* attributes, const void*) {
  *attributes = {0, 0, 0, 1024, 0, 0, 0, 0, 0};
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t shared) {
  return occupancy(blocks, threads, shared);
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t shared,
                                                           unsigned) {
  return occupancy(blocks, threads, shared);
}

// Devices and errors.

int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaSetDevice(int device) { return device == 0 ? 0 : noted(101); }
int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  return noted(hooks.device_attribute ? hooks.device_attribute(attribute, value) : kNotSupported);
}
int cudaGetLastError() {
  int error = last_error;
  last_error = 0;
  return error;
}
int cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(int error) { return error ? "an error of the emulated device" : "no error"; }
const char* cudaGetErrorName(int error) { return error ? "cudaErrorEmulated" : "cudaSuccess"; }
int cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cudaDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

// Memory. Everything is synchronous, so that streams and events have nothing to order, except on streams that a test
// holds: what is recorded on one has not come until it is let go.

int cudaMalloc(void** pointer, size_t size) {
  return noted(hooks.allocate ? hooks.allocate(size, pointer) : kNotSupported);
}
int cudaMallocAsync(void** pointer, size_t size, void*) { return cudaMalloc(pointer, size); }
int cudaFree(void* pointer) {
  frees += pointer != nullptr;
  return 0;
}
int cudaFreeAsync(void*, void*) { return 0; }
int cudaMemset(void* to, int value, size_t size) { return fill(to, value, size); }
int cudaMemsetAsync(void* to, int value, size_t size, void*) { return fill(to, value, size); }
int cudaMemcpy(void* to, const void* from, size_t size, int) { return copy(to, from, size); }
int cudaMemcpyAsync(void* to, const void* from, size_t size, int, void*) { return copy(to, from, size); }
int cudaStreamSynchronize(void* stream) {
  synchronisations++;
  mock_hold_stream(stream, false);
  return 0;
}
int cudaDeviceSynchronize() {
  synchronisations++;
  for (auto& [stream, state] : streams()) state.held = false, state.done = state.recorded;
  return 0;
}
int cudaStreamIsCapturing(void* stream, int* status) {
  *status = streams()[stream].capturing;
  return 0;
}
int cudaThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}
int cudaEventCreate(void** event) {
  *event = new Event{};
  live_events++;
  return 0;
}
int cudaEventCreateWithFlags(void** event, unsigned) { return cudaEventCreate(event); }
int cudaEventRecord(void* event, void* stream) {
  Stream& state = streams()[stream];
  if (state.capturing && capture_mode != kRelaxed) return noted(kNotPermitted);
  *static_cast<Event*>(event) = {stream, ++state.recorded};
  if (!state.held) state.done = state.recorded;
  return 0;
}
int cudaEventQuery(void* event) {
  const auto& [stream, number] = *static_cast<Event*>(event);
  return number <= streams()[stream].done ? 0 : noted(kNotReady);
}
int cudaEventSynchronize(void* event) {
  synchronisations++;
  mock_hold_stream(static_cast<Event*>(event)->stream, false);
  return 0;
}
int cudaEventDestroy(void* event) {
  delete static_cast<Event*>(event);
  live_events--;
  return 0;
}
int cudaStreamWaitEvent(void*, void*, unsigned) { return 0; }

// The driver functions that host code asks for by name.

int cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long, int* status) {
  return entry_point(name, function, status);
}
int cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long, int* status) {
  return entry_point(name, function, status);
}

}  // extern "C"
