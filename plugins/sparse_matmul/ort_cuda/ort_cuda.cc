// SparseMatMul in ONNX Runtime on CUDA: float16 x and y, the layouts of cuda/kernels.h. Knows no mathematics.
//
// A library of its own, so that machines without CUDA need not load it. All inputs are on the device; what can be checked
// there without copying them back is their types and shapes.
#include <cuda_runtime_api.h>

#include <memory>

#include "../../common/ort_op.h"
#include "../cuda/kernels.h"
#include "../declaration.h"
#include "../sparse_matmul.h"
#include "stream_memory.h"

namespace {

using ort::Tensor;
namespace cuda = optimize::sparse_matmul::cuda;

using optimize::sparse_matmul::kBitmapBytes;
using optimize::sparse_matmul::kTile;

struct Instance {
  const OrtApi* api;
  cuda::Weight weight{};
  int64_t inputs = 0;
};

std::unique_ptr<Instance> make(const OrtApi* api, const OrtKernelInfo* info) {
  ort::check_declaration(ort::int_attribute(api, info, "declaration"), OPTIMIZE_SPARSE_MATMUL_DECLARATION);
  auto instance = std::make_unique<Instance>();
  instance->api = api;
  cuda::Weight& w = instance->weight;
  w.K = ort::int_attribute(api, info, "K");
  w.N = ort::int_attribute(api, info, "N");
  if (w.K <= 0 || w.N <= 0) throw ort::Error{nullptr, "K and N must be positive"};
  const std::string layout = ort::string_attribute(api, info, "layout");
  const cuda::Layout* known = cuda::find_layout(layout);
  if (known == nullptr) throw ort::Error{nullptr, "layout '" + layout + "' has no CUDA kernel"};
  w.layout = *known;
  const std::string activation = ort::string_attribute(api, info, "activation");
  w.activation = optimize::sparse_matmul::activation_number(activation);
  if (w.activation < 0) throw ort::Error{nullptr, "activation '" + activation + "' has no CUDA kernel"};
  w.type = cuda::Type::f16;
  instance->inputs = ort::int_attribute(api, info, "num_inputs");
  const int64_t most = ort::int_attribute(api, info, "most_values");
  if (most < 0 || most > kTile * kTile)
    throw ort::Error{nullptr, "most_values must be between 0 (not known) and " + std::to_string(kTile * kTile) +
                                  ", got " + std::to_string(most)};
  w.most_values = static_cast<int32_t>(most);
  if (cuda::is_int8(w.layout) && instance->inputs < 6)
    throw ort::Error{nullptr, "int8 values need a bias and a scale per column: expected 6 or 7 inputs, got " +
                                  std::to_string(instance->inputs)};
  return instance;
}

Tensor input(const OrtApi* api, OrtKernelContext* context, size_t index, const char* name, int type, int64_t size) {
  Tensor tensor = ort::input(api, context, index, name);
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
  void* y = ort::output_for(api, context, x, w.K, w.N);
  w.bitmap = static_cast<const uint8_t*>(input(api, context, 1, "bitmap", ort::kInt8, tiles * kBitmapBytes).data);
  const bool int8 = cuda::is_int8(w.layout);
  w.values = input(api, context, 2, "values", int8 ? ort::kInt8 : ort::kFloat16, -1).data;
  w.offsets = static_cast<const int32_t*>(input(api, context, 3, "offsets", ort::kInt32, tiles + 1).data);
  if (instance.inputs > 4) w.bias = input(api, context, 4, "bias", ort::kFloat16, w.N).data;
  if (int8) w.scale = static_cast<const float*>(input(api, context, 5, "scale", ort::kFloat, w.N).data);
  if (int8 && instance.inputs > 6)
    w.x_scale = static_cast<const float*>(input(api, context, 6, "x_scale", ort::kFloat, 1).data);
  void* stream = nullptr;
  ort::check(ort::call<OrtStatus*>(api, ort::KernelContext_GetGPUComputeStream,
                                   static_cast<const OrtKernelContext*>(context), &stream));
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const int64_t tokens = x.size() / w.K;
  const optimize::sparse_matmul::StreamMemory::Lease memory(optimize::sparse_matmul::StreamMemory::of(on), on,
                                                            cuda::workspace_bytes(w, tokens),
                                                            static_cast<size_t>((w.N + kTile - 1) / kTile));
  check(memory.error());
  w.arrivals = memory.arrivals;
  check(cuda::run(w, x.data, tokens, y, memory.scratch, on));
}

struct Op {
  using Instance = ::Instance;
  static constexpr const char *kName = "SparseMatMul", *kProvider = "CUDAExecutionProvider";
  // x bitmap values offsets bias scale x_scale
  static constexpr int kInputTypes[] = {ort::kFloat16, ort::kInt8,  ort::kUndefined, ort::kInt32,
                                        ort::kFloat16, ort::kFloat, ort::kFloat};
  static constexpr size_t kRequiredInputs = 4;
  static constexpr int kOutputType = ort::kFloat16;

  static auto make(const OrtApi* api, const OrtKernelInfo* info) { return ::make(api, info); }
  static void compute(const Instance& instance, OrtKernelContext* context) { ::compute(instance, context); }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                             const OrtApiBase* base) {
  return ort::register_op<Op>(options, base);
}
