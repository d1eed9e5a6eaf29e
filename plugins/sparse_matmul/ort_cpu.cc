// SparseMatMul in ONNX Runtime on the CPU. Knows no mathematics.
#include <memory>

#include "../common/ort_op.h"
#include "cpu/kernels.h"
#include "declaration.h"

using namespace optimize::sparse_matmul;
using ort::Tensor;

namespace {

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
  const int32_t number = activation_number(name);
  if (number < 0) throw ort::Error{nullptr, "unknown activation '" + name + "'"};
  return static_cast<Activation>(number);
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
  ort::check_declaration(ort::int_attribute(api, info, "declaration"), OPTIMIZE_SPARSE_MATMUL_DECLARATION);
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
  const Tensor x = ort::input(api, context, 0, "x");
  void* y = ort::output_for(api, context, x, w.K, w.N);
  Pool pool{api, context};
  instance.kernel->run(static_cast<const float*>(x.data), x.size() / w.K, static_cast<float*>(y),
                       Parallel{&pool, run_in_pool});
}

struct Op {
  using Instance = ::Instance;
  static constexpr const char *kName = "SparseMatMul", *kProvider = nullptr;
  // x bitmap values offsets bias scale x_scale
  static constexpr int kInputTypes[] = {ort::kFloat, ort::kInt8,  ort::kUndefined, ort::kInt32,
                                        ort::kFloat, ort::kFloat, ort::kFloat};
  static constexpr size_t kRequiredInputs = 4;
  static constexpr int kOutputType = ort::kFloat;

  static auto make(const OrtApi* api, const OrtKernelInfo* info) { return ::make(api, info); }
  static void compute(const Instance& instance, OrtKernelContext* context) { ::compute(instance, context); }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                             const OrtApiBase* base) {
  return ort::register_op<Op>(options, base);
}
