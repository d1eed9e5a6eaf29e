// Reading attributes, constant inputs and tensors through ort_abi.h.
#pragma once

#include <string>
#include <vector>

#include "ort_abi.h"

namespace ort {

// A failed call; `status` is ONNX Runtime's own, or null where `text` says what is wrong.
struct Error {
  OrtStatus* status;
  std::string text;
};

inline OrtStatus* to_status(const OrtApi* api, const Error& error, int code) {
  return error.status ? error.status : call<OrtStatus*>(api, CreateStatus, code, error.text.c_str());
}

inline void check(OrtStatus* status) {
  if (status) throw Error{status, {}};
}

struct Tensor {
  const void* data = nullptr;
  int type = kUndefined;
  std::vector<int64_t> shape;

  int64_t size() const {
    int64_t product = 1;
    for (int64_t d : shape) product *= d;
    return product;
  }
};

inline Tensor read_tensor(const OrtApi* api, const OrtValue* value) {
  Tensor tensor;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(call<OrtStatus*>(api, GetTensorTypeAndShape, value, &info));
  size_t rank = 0;
  OrtStatus* status = call<OrtStatus*>(api, GetTensorElementType, static_cast<const OrtTensorTypeAndShapeInfo*>(info),
                                       &tensor.type);
  if (!status)
    status = call<OrtStatus*>(api, GetDimensionsCount, static_cast<const OrtTensorTypeAndShapeInfo*>(info), &rank);
  if (!status) {
    tensor.shape.resize(rank);
    status = call<OrtStatus*>(api, GetDimensions, static_cast<const OrtTensorTypeAndShapeInfo*>(info),
                              tensor.shape.data(), rank);
  }
  call<void>(api, ReleaseTensorTypeAndShapeInfo, info);
  check(status);
  void* data = nullptr;
  check(call<OrtStatus*>(api, GetTensorMutableData, const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

inline int64_t int_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  check(call<OrtStatus*>(api, KernelInfoGetAttribute_int64, info, name, &value));
  return value;
}

inline std::string string_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  size_t size = 0;  // with the zero at the end
  if (OrtStatus* status =
          call<OrtStatus*>(api, KernelInfoGetAttribute_string, info, name, static_cast<char*>(nullptr), &size)) {
    if (size == 0) throw Error{status, {}};
    call<void>(api, ReleaseStatus, status);
  }
  std::string text(size, '\0');
  check(call<OrtStatus*>(api, KernelInfoGetAttribute_string, info, name, text.data(), &size));
  text.resize(size ? size - 1 : 0);
  return text;
}

// The constant input `index`.
inline Tensor constant_input(const OrtApi* api, const OrtKernelInfo* info, size_t index, const char* name) {
  int constant = 0;
  const OrtValue* value = nullptr;
  check(call<OrtStatus*>(api, KernelInfoGetConstantInput_tensor, info, index, &constant, &value));
  if (!constant || !value) throw Error{nullptr, std::string("input '") + name + "' must be an initializer"};
  return read_tensor(api, value);
}

}  // namespace ort
