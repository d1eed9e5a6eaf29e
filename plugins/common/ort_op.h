// A custom operator in ONNX Runtime: what its adapters for several devices share. It has one output of x's shape but for
// the last dimension, and attributes that are read when the kernel is made.
#pragma once

#include <exception>

#include "ort_tensor.h"

namespace ort {

// Runs body(); an error as ONNX Runtime's status, with the operator's name before its own text.
template <typename Body>
OrtStatus* guarded(const OrtApi* api, const char* name, int code, const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return to_status(api, {error.status, std::string(name) + ": " + error.text}, code);
  } catch (const std::exception& error) {
    return call<OrtStatus*>(api, CreateStatus, int{kFail}, error.what());
  }
}

inline void check_declaration(int64_t of_model, int64_t own) {
  if (of_model != own)
    throw Error{nullptr, "the model was made for another declaration of the operator (" + std::to_string(of_model) +
                             ") than this library (" + std::to_string(own) +
                             "); rebuild the library, or make the model again, with the same version"};
}

inline Tensor input(const OrtApi* api, OrtKernelContext* context, size_t index, const char* name) {
  const OrtValue* value = nullptr;
  check(call<OrtStatus*>(api, KernelContext_GetInput, static_cast<const OrtKernelContext*>(context), index, &value));
  if (value == nullptr) throw Error{nullptr, std::string("input '") + name + "' is missing"};
  return read_tensor(api, value);
}

// Memory of the output: x's shape, whose last dimension must be K, with N in its place.
inline void* output_for(const OrtApi* api, OrtKernelContext* context, const Tensor& x, int64_t K, int64_t N) {
  if (x.shape.empty() || x.shape.back() != K)
    throw Error{nullptr, "the last dimension of x is " + std::to_string(x.shape.empty() ? 0 : x.shape.back()) +
                             ", expected K = " + std::to_string(K)};
  std::vector<int64_t> shape = x.shape;
  shape.back() = N;
  OrtValue* output = nullptr;
  check(call<OrtStatus*>(api, KernelContext_GetOutput, context, size_t{0}, static_cast<const int64_t*>(shape.data()),
                         shape.size(), &output));
  void* data = nullptr;
  check(call<OrtStatus*>(api, GetTensorMutableData, output, &data));
  return data;
}

// An operator of the domain "optimize". Kind has
//   kName, kProvider (null = CPU), kInputTypes [inputs], kRequiredInputs, kOutputType
//   Instance                       the kernel's state, with a member `api`
//   make(api, info)                a std::unique_ptr<Instance>
//   compute(instance, context)
template <typename Kind>
OrtCustomOp declare() {
  using Instance = typename Kind::Instance;
  OrtCustomOp op{};
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return Kind::kName; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return Kind::kProvider; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) -> int { return Kind::kInputTypes[index]; };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return std::size(Kind::kInputTypes); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return Kind::kOutputType; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
    return index < Kind::kRequiredInputs ? kRequired : kOptional;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return kRequired; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
  op.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, Kind::kName, kInvalidGraph, [&] { *kernel = Kind::make(api, info).release(); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Instance& instance = *static_cast<Instance*>(kernel);
    return guarded(instance.api, Kind::kName, kInvalidArgument, [&] { Kind::compute(instance, context); });
  };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 2147483647; };
  return op;
}

// The body of RegisterCustomOps, which SessionOptions.register_custom_ops_library calls.
template <typename Kind>
OrtStatus* register_op(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (!api) return nullptr;  // no status can be made without the interface
  static const OrtCustomOp op = declare<Kind>();
  OrtCustomOpDomain* domain = nullptr;  // owned by the session options' domain list for the life of the process
  if (OrtStatus* status = call<OrtStatus*>(api, CreateCustomOpDomain, "optimize", &domain)) return status;
  if (OrtStatus* status = call<OrtStatus*>(api, CustomOpDomain_Add, domain, &op)) return status;
  return call<OrtStatus*>(api, AddCustomOpDomain, options, domain);
}

}  // namespace ort
