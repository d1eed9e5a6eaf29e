// SparseMatMul in ONNX Runtime on CUDA: float16 x and y, the layouts of cuda/kernels.h. Knows no mathematics.
//
// A library of its own, so that machines without CUDA need not load it. All inputs are on the device; what can be checked
// there without copying them back is their types and shapes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <exception>
#include <memory>

#include "../../common/ort_tensor.h"
#include "../cuda/kernels.h"
#include "../declaration.h"

namespace {

using ort::Tensor;
namespace cuda = optimize::sparse_matmul::cuda;

constexpr size_t kInputs = 7;  // x bitmap values offsets bias scale x_scale
constexpr int64_t kTile = 64;

struct Instance {
  const OrtApi* api;
  cuda::Weight weight{};
  int64_t inputs = 0;
  bool int8 = false;
};

template <size_t kCount>
int32_t index_of(const std::string& name, const char* const (&names)[kCount], const char* what) {
  const auto* found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw ort::Error{nullptr, std::string(what) + " '" + name + "' has no CUDA kernel"};
  return static_cast<int32_t>(found - std::begin(names));
}

std::unique_ptr<Instance> make(const OrtApi* api, const OrtKernelInfo* info) {
  const int64_t declaration = ort::int_attribute(api, info, "declaration");
  if (declaration != OPTIMIZE_SPARSE_MATMUL_DECLARATION)
    throw ort::Error{nullptr, "the model was made for another declaration of the operator (" +
                                  std::to_string(declaration) + ") than this library (" +
                                  std::to_string(OPTIMIZE_SPARSE_MATMUL_DECLARATION) +
                                  "); rebuild the library, or make the model again, with the same version"};
  auto instance = std::make_unique<Instance>();
  instance->api = api;
  cuda::Weight& w = instance->weight;
  w.K = ort::int_attribute(api, info, "K");
  w.N = ort::int_attribute(api, info, "N");
  if (w.K <= 0 || w.N <= 0) throw ort::Error{nullptr, "K and N must be positive"};
  constexpr const char* kLayouts[] = {"mma16", "mma8", "sp16", "sp8"};
  constexpr cuda::Layout kNumbers[] = {cuda::Layout::mma16, cuda::Layout::mma8, cuda::Layout::sp16,
                                        cuda::Layout::sp8};
  w.layout = kNumbers[index_of(ort::string_attribute(api, info, "layout"), kLayouts, "layout")];
  constexpr const char* kActivations[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  w.activation = index_of(ort::string_attribute(api, info, "activation"), kActivations, "activation");
  w.type = cuda::Type::f16;
  instance->inputs = ort::int_attribute(api, info, "num_inputs");
  instance->int8 = w.layout == cuda::Layout::mma8 || w.layout == cuda::Layout::sp8;
  if (instance->int8 && instance->inputs < 6)
    throw ort::Error{nullptr, "int8 values need a bias and a scale per column: expected 6 or 7 inputs, got " +
                                  std::to_string(instance->inputs)};
  return instance;
}

Tensor input(const OrtApi* api, OrtKernelContext* context, size_t index, const char* name, int type, int64_t size) {
  const OrtValue* value = nullptr;
  ort::check(ort::call<OrtStatus*>(api, ort::KernelContext_GetInput, static_cast<const OrtKernelContext*>(context),
                                   index, &value));
  if (value == nullptr) throw ort::Error{nullptr, std::string("input '") + name + "' is missing"};
  Tensor tensor = ort::read_tensor(api, value);
  if (tensor.type != type || (size >= 0 && tensor.size() != size))
    throw ort::Error{nullptr, std::string("input '") + name + "' has element type " + std::to_string(tensor.type) +
                                  " and " + std::to_string(tensor.size()) + " elements, expected type " +
                                  std::to_string(type) + (size < 0 ? "" : " and " + std::to_string(size))};
  return tensor;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw ort::Error{nullptr, cudaGetErrorString(error)};
}

void compute(const Instance& instance, OrtKernelContext* context) {
  const OrtApi* api = instance.api;
  cuda::Weight w = instance.weight;
  const int64_t tiles = (w.K + kTile - 1) / kTile * ((w.N + kTile - 1) / kTile);
  const Tensor x = input(api, context, 0, "x", ort::kFloat16, -1);
  if (x.shape.empty() || x.shape.back() != w.K)
    throw ort::Error{nullptr, "the last dimension of x is " + std::to_string(x.shape.empty() ? 0 : x.shape.back()) +
                                  ", expected K = " + std::to_string(w.K)};
  w.bitmap = static_cast<const uint8_t*>(input(api, context, 1, "bitmap", ort::kInt8, tiles * 512).data);
  const bool int8 = instance.int8;
  w.values = input(api, context, 2, "values", int8 ? ort::kInt8 : ort::kFloat16, -1).data;
  w.offsets = static_cast<const int32_t*>(input(api, context, 3, "offsets", ort::kInt32, tiles + 1).data);
  if (instance.inputs > 4) w.bias = input(api, context, 4, "bias", ort::kFloat16, w.N).data;
  if (int8) w.scale = static_cast<const float*>(input(api, context, 5, "scale", ort::kFloat, w.N).data);
  if (int8 && instance.inputs > 6)
    w.x_scale = static_cast<const float*>(input(api, context, 6, "x_scale", ort::kFloat, 1).data);
  std::vector<int64_t> shape = x.shape;
  shape.back() = w.N;
  OrtValue* output = nullptr;
  ort::check(ort::call<OrtStatus*>(api, ort::KernelContext_GetOutput, context, size_t{0},
                                   static_cast<const int64_t*>(shape.data()), shape.size(), &output));
  void *y = nullptr, *stream = nullptr, *workspace = nullptr;
  ort::check(ort::call<OrtStatus*>(api, ort::GetTensorMutableData, output, &y));
  ort::check(ort::call<OrtStatus*>(api, ort::KernelContext_GetGPUComputeStream,
                                   static_cast<const OrtKernelContext*>(context), &stream));
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t tokens = x.size() / w.K;
  const size_t bytes = cuda::workspace_bytes(w, tokens);
  if (bytes > 0) check(cudaMallocAsync(&workspace, bytes, on));  // in the order of the stream: nothing waits
  const cudaError_t error = cuda::run(w, x.data, tokens, y, workspace, on);
  if (workspace != nullptr) check(cudaFreeAsync(workspace, on));
  check(error);
}

template <typename Body>
OrtStatus* guarded(const OrtApi* api, int code, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const ort::Error& error) {
    return ort::to_status(api, {error.status, "SparseMatMul: " + error.text}, code);
  } catch (const std::exception& error) {
    return ort::call<OrtStatus*>(api, ort::CreateStatus, int{ort::kFail}, error.what());
  }
}

OrtCustomOp declare() {
  OrtCustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "SparseMatMul"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) -> int {
    constexpr int kTypes[kInputs] = {ort::kFloat16, ort::kInt8,  ort::kUndefined, ort::kInt32,
                                     ort::kFloat16, ort::kFloat, ort::kFloat};
    return kTypes[index];
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ort::kFloat16; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return index < 4 ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, ort::kInvalidGraph, [&] { *kernel = make(api, info).release(); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Instance& instance = *static_cast<Instance*>(kernel);
    return guarded(instance.api, ort::kInvalidArgument, [&] { compute(instance, context); });
  };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 2147483647; };
  return op;
}

}  // namespace

// Called by SessionOptions.register_custom_ops_library.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                             const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (!api) return nullptr;  // no status can be made without the interface
  static const OrtCustomOp op = declare();
  OrtCustomOpDomain* domain = nullptr;  // owned by the session options' domain list for the life of the process
  if (OrtStatus* status = ort::call<OrtStatus*>(api, ort::CreateCustomOpDomain, "optimize", &domain)) return status;
  if (OrtStatus* status = ort::call<OrtStatus*>(api, ort::CustomOpDomain_Add, domain, &op)) return status;
  return ort::call<OrtStatus*>(api, ort::AddCustomOpDomain, options, domain);
}
