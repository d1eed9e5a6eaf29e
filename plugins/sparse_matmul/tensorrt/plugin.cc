#include "plugin.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>
#include <utility>

#include "../declaration.h"
#include "../sparse_matmul.h"

namespace optimize::sparse_matmul::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

// Rows of x: all of its dimensions but the last. Unknown ones (-1) count as none.
int64_t tokens_of(const Dims& dims) {
  int64_t tokens = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) tokens *= std::max<int64_t>(dims.d[i], 0);
  return tokens;
}

std::string text_of(const Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + "]";
}

// TensorRT's ONNX parser hands on the lower 32 bits of an integer: enough to tell declarations apart, and all of any
// other attribute.
int64_t from_parser(int32_t value) {
  constexpr int64_t kWhole = OPTIMIZE_SPARSE_MATMUL_DECLARATION;
  return value == static_cast<int32_t>(kWhole & 0xffffffff) ? kWhole : value;
}

bool is(const Dims& dims, std::initializer_list<int64_t> wanted) {
  return dims.nbDims == static_cast<int32_t>(wanted.size()) &&
         std::equal(wanted.begin(), wanted.end(), dims.d, [](int64_t w, auto d) { return w < 0 || w == d; });
}

}  // namespace

cuda::Layout Attributes::cuda_layout() const { return *cuda::find_layout(layout); }

bool Attributes::int8() const { return cuda::is_int8(cuda_layout()); }

int32_t Attributes::activation_kind() const { return activation_number(activation); }

std::string check(const Attributes& a) {
  const auto number = [](int64_t v) { return std::to_string(v); };
  if (a.declaration != OPTIMIZE_SPARSE_MATMUL_DECLARATION)
    return "the model was made for declaration " + number(a.declaration) + " of SparseMatMul, this library for " +
           number(OPTIMIZE_SPARSE_MATMUL_DECLARATION) + "; rebuild the plugin library from the version that made the model";
  if (a.K <= 0 || a.N <= 0) return "K and N must be positive, got " + number(a.K) + " and " + number(a.N);
  if (cuda::find_layout(a.layout) == nullptr)
    return "layout '" + a.layout + "' has no CUDA kernel; those are mma16, mma8, sp16 and sp8";
  if (a.activation_kind() < 0)
    return "there is no activation '" + a.activation + "'";
  if (a.most_values < 0 || a.most_values > kTile * kTile)
    return "most_values must be between 0 (not known) and " + number(kTile * kTile) + ", got " + number(a.most_values);
  const int64_t most = a.int8() ? 7 : 5;  // int8: bias, scale and perhaps x_scale
  if (a.num_inputs > most || a.num_inputs < (a.int8() ? 6 : 4))
    return "expected " + number(most - 1) + " or " + number(most) + " inputs, got " + number(a.num_inputs);
  return {};
}

Plugin::Plugin(Attributes attributes) : attributes_(std::move(attributes)) {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  try {
    return new Plugin(attributes_);
  } catch (const std::exception& e) {
    log_error(e.what());
    return nullptr;
  }
}

cuda::Weight Plugin::weight(DataType type) const {
  cuda::Weight w{};
  w.K = attributes_.K, w.N = attributes_.N, w.layout = attributes_.cuda_layout();
  w.type = type == DataType::kBF16 ? cuda::Type::bf16 : cuda::Type::f16;
  w.activation = attributes_.activation_kind();
  w.most_values = static_cast<int32_t>(attributes_.most_values);
  return w;
}

std::string Plugin::check_shapes(nvinfer1::PluginTensorDesc const* in, int32_t inputs) const {
  const int64_t tiles = (attributes_.K + kTile - 1) / kTile * ((attributes_.N + kTile - 1) / kTile);
  const auto wrong = [&](int32_t i, const std::string& expected) {
    return "input " + std::to_string(i) + " has the shape " + text_of(in[i].dims) + ", expected " + expected;
  };
  const auto size = [](int64_t v) { return std::to_string(v); };
  if (inputs != attributes_.num_inputs)
    return "got " + size(inputs) + " inputs, num_inputs says " + size(attributes_.num_inputs);
  const Dims& x = in[0].dims;
  if (x.nbDims < 1 || x.d[x.nbDims - 1] != attributes_.K) return wrong(0, "[.., " + size(attributes_.K) + "]");
  if (!is(in[1].dims, {tiles, kBitmapBytes}))
    return wrong(1, "[" + size(tiles) + ", " + size(kBitmapBytes) + "]");
  if (!is(in[2].dims, {-1})) return wrong(2, "one dimension");
  if (!is(in[3].dims, {tiles + 1})) return wrong(3, "[" + size(tiles + 1) + "]");
  for (int32_t i = 4; i < inputs && i < 6; ++i)
    if (!is(in[i].dims, {attributes_.N})) return wrong(i, "[" + size(attributes_.N) + "]");
  if (inputs == 7 && !is(in[6].dims, {1})) return wrong(6, "[1]");
  return {};
}

int32_t Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                                nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
  try {
    std::vector<nvinfer1::PluginTensorDesc> described;
    for (int32_t i = 0; i < inputs; ++i) described.push_back(in[i].desc);
    const std::string reason = check_shapes(described.data(), inputs);
    if (reason.empty()) return 0;
    log_error("SparseMatMul: " + reason);
  } catch (const std::exception& e) {
    log_error(e.what());
  }
  return -1;
}

int32_t Plugin::getOutputDataTypes(DataType* types, int32_t outputs, DataType const* in,
                                   int32_t inputs) const noexcept {
  if (outputs != 1 || inputs < 1) return -1;
  types[0] = in[0];
  return 0;
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* in, int32_t inputs, nvinfer1::DimsExprs const*, int32_t,
                                nvinfer1::DimsExprs* out, int32_t outputs,
                                nvinfer1::IExprBuilder& builder) noexcept {
  if (outputs != 1 || inputs < 1 || in[0].nbDims < 1) return -1;
  out[0] = in[0];
  out[0].d[in[0].nbDims - 1] = builder.constant(attributes_.N);
  return out[0].d[in[0].nbDims - 1] == nullptr ? -1 : 0;
}

bool Plugin::supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* all, int32_t inputs,
                                       int32_t outputs) noexcept {
  if (inputs != attributes_.num_inputs || outputs != 1) return false;
  const nvinfer1::PluginTensorDesc& d = all[position].desc;
  if (d.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == 0) return d.type == DataType::kHALF || d.type == DataType::kBF16;
  if (position == 1) return d.type == DataType::kINT8;
  if (position == 3) return d.type == DataType::kINT32;
  if (position == 2 && attributes_.int8()) return d.type == DataType::kINT8;
  if (position < inputs && position >= 5) return d.type == DataType::kFLOAT;  // scales
  return d.type == all[0].desc.type;                                          // values, bias, y
}

size_t Plugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, int32_t inputs,
                                nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept {
  return inputs < 1 ? 0 : cuda::workspace_bytes(weight(in[0].desc.type), tokens_of(in[0].max));
}

int32_t Plugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t inputs, nvinfer1::PluginTensorDesc const*,
                              int32_t) noexcept {
  try {
    const std::string reason = check_shapes(in, inputs);
    if (reason.empty()) return 0;
    log_error("SparseMatMul: " + reason);
  } catch (const std::exception& e) {
    log_error(e.what());
  }
  return -1;
}

int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const* in, nvinfer1::PluginTensorDesc const*,
                        void const* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  cuda::Weight w = weight(in[0].type);
  w.bitmap = static_cast<const uint8_t*>(inputs[1]);
  w.values = inputs[2];
  w.offsets = static_cast<const int32_t*>(inputs[3]);
  const auto given = [&](int64_t i) { return attributes_.num_inputs > i ? inputs[i] : nullptr; };
  w.bias = given(4);
  w.scale = static_cast<const float*>(given(5));
  w.x_scale = static_cast<const float*>(given(6));
  const cudaError_t error = cuda::run(w, inputs[0], tokens_of(in[0].dims), outputs[0], workspace, stream);
  if (error == cudaSuccess) return 0;
  log_error(std::string("SparseMatMul: ") + cudaGetErrorString(error));
  return -1;
}

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
  const auto text = [](const char* name, const std::string& value) {
    return PluginField(name, value.data(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size()));
  };
  const auto number = [](const char* name, const int64_t& value) {
    return PluginField(name, &value, PluginFieldType::kINT64, 1);
  };
  try {
    fields_ = {number("K", attributes_.K),
               number("N", attributes_.N),
               text("layout", attributes_.layout),
               text("activation", attributes_.activation),
               number("num_inputs", attributes_.num_inputs),
               number("most_values", attributes_.most_values),
               number("declaration", attributes_.declaration)};
  } catch (const std::exception& e) {
    log_error(e.what());
    return nullptr;
  }
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  return &collection_;
}

Creator::Creator()
    : fields_{{"K", nullptr, PluginFieldType::kINT64, 1},          {"N", nullptr, PluginFieldType::kINT64, 1},
              {"layout", nullptr, PluginFieldType::kCHAR, 1},      {"activation", nullptr, PluginFieldType::kCHAR, 1},
              {"num_inputs", nullptr, PluginFieldType::kINT64, 1}, {"most_values", nullptr, PluginFieldType::kINT64, 1},
              {"declaration", nullptr, PluginFieldType::kINT64, 1}} {
  collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginV3* Creator::createPlugin(nvinfer1::AsciiChar const* name,
                                           nvinfer1::PluginFieldCollection const* fields,
                                           nvinfer1::TensorRTPhase) noexcept {
  try {
    Attributes a;
    const std::pair<const char*, int64_t*> numbers[] = {
        {"K", &a.K},
        {"N", &a.N},
        {"num_inputs", &a.num_inputs},
        {"most_values", &a.most_values},
        {"declaration", &a.declaration}};
    const std::pair<const char*, std::string*> texts[] = {{"layout", &a.layout}, {"activation", &a.activation}};
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      for (const auto& [key, value] : numbers) {
        if (std::strcmp(key, field.name) != 0 || field.data == nullptr || field.length != 1) continue;
        if (field.type == PluginFieldType::kINT64) *value = *static_cast<const int64_t*>(field.data);
        if (field.type == PluginFieldType::kINT32) *value = from_parser(*static_cast<const int32_t*>(field.data));
      }
      for (const auto& [key, value] : texts)
        if (std::strcmp(key, field.name) == 0 && field.data != nullptr && field.type == PluginFieldType::kCHAR) {
          // With or without a zero at the end.
          const char* begin = static_cast<const char*>(field.data);
          value->assign(begin, std::find(begin, begin + field.length, '\0'));
        }
    }
    const std::string reason = check(a);
    if (reason.empty()) return new Plugin(std::move(a));
    log_error(std::string("SparseMatMul '") + (name ? name : "") + "': " + reason);
  } catch (const std::exception& e) {
    log_error(e.what());
  }
  return nullptr;
}

}  // namespace optimize::sparse_matmul::tensorrt
