// The functions of the CUDA runtime that kernels/cuda calls, on the CPU, for tests with emulated kernels: linked in
// place of libcudart. Everything is done when the call returns, or when a graph that recorded it is launched; device
// memory is host memory, poisoned when allocated. What a recording must not do fails as it does on a GPU.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <set>
#include <utility>
#include <vector>

// The handles that CUDA leaves opaque.
struct CUgraph_st {
  std::vector<std::function<cudaError_t()>> nodes;
  cudaStream_t origin = nullptr;
  std::set<cudaStream_t> forked;    // other streams that record into it
  std::set<cudaStream_t> unjoined;  // those whose last work nothing waits for
};
struct CUstream_st {
  cudaGraph_t recording = nullptr;
};
struct CUevent_st {
  std::chrono::steady_clock::time_point reached;
  cudaStream_t recorded_by = nullptr;  // while that records a graph
};
struct CUgraphExec_st {
  std::vector<std::function<cudaError_t()>> nodes;
};

namespace spillway::emulation {

void AllowShared(const void* kernel, std::size_t size_bytes);
CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
                     const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                     CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                     CUtensorMapFloatOOBfill fill);

cudaError_t Queue(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (stream->recording == nullptr) return work();
  stream->recording->nodes.push_back(std::move(work));
  if (stream != stream->recording->origin) stream->recording->unjoined.insert(stream);
  return cudaSuccess;
}

void HoldCallbacks(bool holds);
void SetPtxVersion(int version);

}  // namespace spillway::emulation

namespace {

std::vector<std::function<void()>> held_callbacks;
bool holds_callbacks = false;

constexpr std::size_t kTotalBytes = std::size_t{4} << 30;
constexpr int kSharedBytesPerMultiprocessor = 228 << 10;
int num_recordings = 0;
int ptx_version = 90;

cudaError_t Allocate(void** memory, std::size_t size_bytes) {
  if (num_recordings > 0) return cudaErrorStreamCaptureUnsupported;
  *memory = std::aligned_alloc(256, (size_bytes + 255) / 256 * 256);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*memory, 0xcb, size_bytes);
  return cudaSuccess;
}

}  // namespace

// As if the device were busy with what was queued before a callback; then they run.
void spillway::emulation::HoldCallbacks(bool holds) {
  holds_callbacks = holds;
  if (holds) return;
  for (const auto& callback : std::exchange(held_callbacks, {})) callback();
}

void spillway::emulation::SetPtxVersion(int version) { ptx_version = version; }

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int /*device*/) {
  *properties = {};
  std::strcpy(properties->name, "emulated");
  properties->major = 9;
  properties->multiProcessorCount = 3;
  properties->totalGlobalMem = kTotalBytes;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = *total = kTotalBytes;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, std::size_t size_bytes) { return Allocate(memory, size_bytes); }
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t size_bytes, unsigned /*flags*/) {
  return Allocate(memory, size_bytes);
}
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaMemset(void* memory, int value, std::size_t size_bytes) {
  std::memset(memory, value, size_bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t size_bytes, cudaStream_t stream) {
  return spillway::emulation::Queue(stream, [=] { return cudaMemset(memory, value, size_bytes); });
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t size_bytes, cudaMemcpyKind /*kind*/) {
  std::memcpy(to, from, size_bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size_bytes, cudaMemcpyKind /*kind*/,
                            cudaStream_t stream) {
  return spillway::emulation::Queue(stream, [=] {
    std::memcpy(to, from, size_bytes);
    return cudaSuccess;
  });
}
cudaError_t cudaMemcpyBatchAsync(void* const* to, const void* const* from, const std::size_t* sizes, std::size_t count,
                                 cudaMemcpyAttributes* /*attributes*/, std::size_t* /*firsts*/,
                                 std::size_t /*num_attributes*/, cudaStream_t stream) {
  if (stream->recording != nullptr) return cudaErrorStreamCaptureUnsupported;
  for (std::size_t i = count; i > 0; --i) {  // nothing promises their order
    if (sizes[i - 1] == 0) return cudaErrorInvalidValue;
    std::memcpy(to[i - 1], from[i - 1], sizes[i - 1]);
  }
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream->recording == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaMemcpy2D(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                         std::size_t height, cudaMemcpyKind /*kind*/) {
  for (std::size_t row = 0; row < height; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch, static_cast<const char*>(from) + row * from_pitch, width);
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
  *stream = new CUstream_st;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (stream->recording != nullptr) return cudaErrorStreamCaptureUnsupported;
  return held_callbacks.empty() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaStreamQuery(stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned /*flags*/) {
  if (event->recorded_by == nullptr)
    return stream->recording == nullptr ? cudaSuccess : cudaErrorStreamCaptureIsolation;
  const cudaGraph_t graph = event->recorded_by->recording;
  if (stream->recording == nullptr) graph->forked.insert(stream);
  stream->recording = graph;
  graph->unjoined.erase(event->recorded_by);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
  ++num_recordings;
  stream->recording = new CUgraph_st;
  stream->recording->origin = stream;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  --num_recordings;
  *graph = stream->recording;
  stream->recording = nullptr;
  for (const cudaStream_t forked : (*graph)->forked) forked->recording = nullptr;
  if ((*graph)->unjoined.empty()) return cudaSuccess;
  cudaGraphDestroy(*graph);
  *graph = nullptr;
  return cudaErrorStreamCaptureUnjoined;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long /*flags*/) {
  *executable = new CUgraphExec_st{graph->nodes};
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t /*stream*/) {
  for (const auto& node : executable->nodes) {
    if (const cudaError_t error = node(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
  *event = new CUevent_st;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->recorded_by = stream->recording == nullptr ? nullptr : stream;
  event->reached = std::chrono::steady_clock::now();
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t /*event*/) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t /*event*/) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = std::chrono::duration<float, std::milli>(to->reached - from->reached).count();
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  if (stream->recording != nullptr) return cudaErrorStreamCaptureUnsupported;
  if (holds_callbacks) {
    held_callbacks.emplace_back([=] { function(data); });
  } else {
    function(data);
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "emulated error"; }
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    spillway::emulation::AllowShared(function, static_cast<std::size_t>(value));
  }
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerMultiprocessor) return cudaErrorInvalidValue;
  *value = kSharedBytesPerMultiprocessor;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* /*function*/) {
  *attributes = {};
  attributes->ptxVersion = ptx_version;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned /*version*/,
                                             unsigned long long /*flags*/, cudaDriverEntryPointQueryResult* result) {
  const bool is_known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = is_known ? reinterpret_cast<void*>(&spillway::emulation::EncodeTiled) : nullptr;
  *result = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, const void* /*function*/,
                                                          int /*num_threads*/, std::size_t /*shared_bytes*/) {
  *num_blocks = 3;
  return cudaSuccess;
}

}  // extern "C"
