// SparseMatMul as a TensorRT plugin (IPluginV3): y = activation(x W + bias), W stored sparse.
//
// Inputs and attributes are those of the operator (optimizer/custom_ops/declaration.py): x, bitmap int8 [T, 512], values,
// offsets int32 [T + 1], perhaps bias, and for int8 values float scale [N] and perhaps x_scale [1]. The stored weight comes
// as inputs, so that a plan holds it once. x, bias and y have one 16-bit type, and values that are not int8 too.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../cuda/kernels.h"

namespace optimize::sparse_matmul::tensorrt {

constexpr char kName[] = "SparseMatMul";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "optimize";

// The operator's attributes.
struct Attributes {
  int64_t K = 0, N = 0;
  std::string layout, activation;
  int64_t num_inputs = 0, most_values = 0, declaration = 0;

  cuda::Layout cuda_layout() const;  // of a checked one
  bool int8() const;
  int32_t activation_kind() const;
};

// Empty if a plugin can be made, else a sentence that says what was found and what was expected.
std::string check(const Attributes& attributes);

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit Plugin(Attributes attributes);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return kName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* types, int32_t outputs, nvinfer1::DataType const* in,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t outputs, nvinfer1::IExprBuilder&) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* all, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return 1; }
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                          nvinfer1::DynamicPluginTensorDesc const* out, int32_t outputs) const noexcept override;

  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const* out,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  std::string check_shapes(nvinfer1::PluginTensorDesc const* in, int32_t inputs) const;
  cuda::Weight weight(nvinfer1::DataType type) const;

  Attributes attributes_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator();
  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override { return kName; }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Says an error through TensorRT's logger, or on stderr where the library was given none.
void log_error(const std::string& text) noexcept;

}  // namespace optimize::sparse_matmul::tensorrt
