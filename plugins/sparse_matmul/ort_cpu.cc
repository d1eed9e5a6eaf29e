// SparseMatMul in ONNX Runtime on the CPU. Knows no mathematics.
#include <exception>
#include <memory>

#include "../common/ort_tensor.h"
#include "cpu/kernels.h"
#include "declaration.h"

using namespace optimize::sparse_matmul;
using ort::Tensor;

namespace {

constexpr size_t kInputs = 7;  // x bitmap values offsets bias scale x_scale

struct Instance {
  const OrtApi* api;
  Weight weight;
  std::unique_ptr<Kernel> kernel;
};

Layout layout_of(const std::string& name) {
  if (name == "n64k1") return Layout::n64k1;
  if (name == "n16k4") return Layout::n16k4;
  throw ort::Error{nullptr, "layout '" + name + "' is none of the CPU's (n64k1, n16k4): lower the model for ort-cpu"};
}

Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (int32_t i = 0; i < 5; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  throw ort::Error{nullptr, "unknown activation '" + name + "'"};
}

void expect(const Tensor& tensor, const char* name, int type, int64_t size) {
  if (tensor.type != type)
    throw ort::Error{nullptr, std::string("input '") + name + "' has element type " + std::to_string(tensor.type) +
                                  ", expected " + std::to_string(type) + " (numbers of ONNX)"};
  if (size >= 0 && tensor.size() != size)
    throw ort::Error{nullptr, std::string("input '") + name + "' has " + std::to_string(tensor.size()) +
                                  " elements, expected " + std::to_string(size)};
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
  Weight& w = instance->weight;
  w.K = ort::int_attribute(api, info, "K");
  w.N = ort::int_attribute(api, info, "N");
  w.layout = layout_of(ort::string_attribute(api, info, "layout"));
  w.activation = activation_of(ort::string_attribute(api, info, "activation"));
  const bool int8 = w.layout == Layout::n16k4;
  // ONNX Runtime does not say at this point how many inputs there are.
  const int64_t count = ort::int_attribute(api, info, "num_inputs");
  const Tensor bitmap = ort::constant_input(api, info, 1, "bitmap");
  const Tensor values = ort::constant_input(api, info, 2, "values");
  const Tensor offsets = ort::constant_input(api, info, 3, "offsets");
  expect(bitmap, "bitmap", ort::kInt8, -1);
  expect(values, "values", int8 ? ort::kInt8 : ort::kFloat, -1);
  expect(offsets, "offsets", ort::kInt32, -1);
  w.bitmap = static_cast<const uint8_t*>(bitmap.data);
  w.values = values.data;
  w.num_values = values.size();
  w.offsets = static_cast<const int32_t*>(offsets.data);
  const auto floats = [&](size_t index, const char* name, int64_t size) -> const float* {
    if (static_cast<int64_t>(index) >= count) return nullptr;
    const Tensor tensor = ort::constant_input(api, info, index, name);
    expect(tensor, name, ort::kFloat, size);
    return static_cast<const float*>(tensor.data);
  };
  w.bias = floats(4, "bias", w.N);
  if (int8) {
    w.scale = floats(5, "scale", w.N);
    w.x_scale = floats(6, "x_scale", 1);
  }
  if (const std::string reason = validate(w, bitmap.size(), offsets.size()); !reason.empty())
    throw ort::Error{nullptr, "the stored weight is damaged: " + reason};
  instance->kernel = make_kernel(w, best_isa());
  return instance;
}

OrtStatus* create(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
  try {
    *kernel = make(api, info).release();
    return nullptr;
  } catch (const ort::Error& error) {
    return ort::to_status(api, {error.status, "SparseMatMul: " + error.text}, ort::kInvalidGraph);
  } catch (const std::exception& error) {
    return ort::call<OrtStatus*>(api, ort::CreateStatus, int{ort::kFail}, error.what());
  }
}

struct Pool {
  const OrtApi* api;
  OrtKernelContext* context;
};

void run_in_pool(void* state, size_t count, void (*body)(void*, size_t), void* user) {
  if (count == 1) return body(user, 0);
  const Pool& pool = *static_cast<Pool*>(state);
  OrtStatus* status =
      ort::call<OrtStatus*>(pool.api, ort::KernelContext_ParallelFor, static_cast<const OrtKernelContext*>(pool.context),
                            body, count, size_t{0}, user);
  if (!status) return;
  ort::call<void>(pool.api, ort::ReleaseStatus, status);
  for (size_t i = 0; i < count; ++i) body(user, i);
}

void compute(const Instance& instance, OrtKernelContext* context) {
  const OrtApi* api = instance.api;
  const Weight& w = instance.weight;
  const OrtValue* value = nullptr;
  ort::check(ort::call<OrtStatus*>(api, ort::KernelContext_GetInput, static_cast<const OrtKernelContext*>(context),
                                   size_t{0}, &value));
  const Tensor x = ort::read_tensor(api, value);
  if (x.shape.empty() || x.shape.back() != w.K)
    throw ort::Error{nullptr, "SparseMatMul: the last dimension of x is " +
                                  std::to_string(x.shape.empty() ? 0 : x.shape.back()) + ", expected K = " +
                                  std::to_string(w.K)};
  std::vector<int64_t> shape = x.shape;
  shape.back() = w.N;
  OrtValue* output = nullptr;
  ort::check(ort::call<OrtStatus*>(api, ort::KernelContext_GetOutput, context, size_t{0},
                                   static_cast<const int64_t*>(shape.data()), shape.size(), &output));
  void* y = nullptr;
  ort::check(ort::call<OrtStatus*>(api, ort::GetTensorMutableData, output, &y));
  Pool pool{api, context};
  instance.kernel->run(static_cast<const float*>(x.data), x.size() / w.K, static_cast<float*>(y),
                       Parallel{&pool, run_in_pool});
}

OrtStatus* run(void* kernel, OrtKernelContext* context) {
  const Instance& instance = *static_cast<Instance*>(kernel);
  try {
    compute(instance, context);
    return nullptr;
  } catch (const ort::Error& error) {
    return ort::to_status(instance.api, error, ort::kInvalidArgument);
  } catch (const std::exception& error) {
    return ort::call<OrtStatus*>(instance.api, ort::CreateStatus, int{ort::kFail}, error.what());
  }
}

int input_type(const OrtCustomOp*, size_t index) {
  constexpr int kTypes[kInputs] = {ort::kFloat, ort::kInt8,  ort::kUndefined, ort::kInt32,
                                   ort::kFloat, ort::kFloat, ort::kFloat};
  return kTypes[index];
}

OrtCustomOp declare() {
  OrtCustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return "SparseMatMul"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputType = input_type;
  op.GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ort::kFloat; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return index < 4 ? ort::kRequired : ort::kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ort::kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = run;
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 2147483647; };
  return op;
}

}  // namespace

// Called by SessionOptions.register_custom_ops_library.
extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                             const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ort::kApiVersion);
  if (!api) {  // no status can be made without the interface
    return nullptr;
  }
  static const OrtCustomOp op = declare();
  OrtCustomOpDomain* domain = nullptr;  // owned by the session options' domain list for the life of the process
  if (OrtStatus* status = ort::call<OrtStatus*>(api, ort::CreateCustomOpDomain, "optimize", &domain)) return status;
  if (OrtStatus* status = ort::call<OrtStatus*>(api, ort::CustomOpDomain_Add, domain, &op)) return status;
  return ort::call<OrtStatus*>(api, ort::AddCustomOpDomain, options, domain);
}
