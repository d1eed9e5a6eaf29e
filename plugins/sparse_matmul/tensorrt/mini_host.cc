// What TensorRT does with the plugin library, without TensorRT: loads it, makes a plugin from fields, asks the build and
// runtime interfaces, makes a second plugin from what the first one serializes, and, where there is a GPU, runs it against
// sums in double precision. Prints what it did; exits with 1 at the first difference.
//
//   mini_host liboptimize_tensorrt.so <declaration>
#include <NvInferRuntime.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "mini_host: %s\n", text.c_str());
  std::exit(1);
}
void expect(bool right, const char* what) {
  if (!right) fail(what);
  std::printf("ok: %s\n", what);
}

class Logger final : public ILogger {
 public:
  void log(Severity, const char* text) noexcept override { last = text; }
  std::string last;
};
Logger logger;

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
};
Finder finder;

struct Fields {
  int64_t K, N, num_inputs, most_values, declaration;
  std::string layout, activation;
  std::vector<PluginField> list;
  PluginFieldCollection collection{};

  PluginFieldCollection const* get() {
    const auto number = [](const char* name, const int64_t& v) { return PluginField(name, &v, PluginFieldType::kINT64, 1); };
    const auto text = [](const char* name, const std::string& v) {
      return PluginField(name, v.data(), PluginFieldType::kCHAR, static_cast<int32_t>(v.size()));
    };
    list = {number("K", K),           number("N", N),
            text("layout", layout),   text("activation", activation),
            number("num_inputs", num_inputs), number("most_values", most_values),
            number("declaration", declaration)};
    collection = {static_cast<int32_t>(list.size()), list.data()};
    return &collection;
  }
};

Dims dims(std::initializer_list<int64_t> sizes) {
  Dims d{};
  d.nbDims = static_cast<int32_t>(sizes.size());
  int32_t i = 0;
  for (const int64_t size : sizes) d.d[i++] = size;
  return d;
}

PluginTensorDesc describe(std::initializer_list<int64_t> sizes, DataType type) {
  PluginTensorDesc d{};
  d.dims = dims(sizes);
  d.type = type;
  d.format = TensorFormat::kLINEAR;
  d.scale = 1.0f;
  return d;
}

// The position of (k, n) in a tile of layout mma16 (cuda/decode.cu).
int64_t mma16_place(int64_t k, int64_t n) {
  const int64_t nb = n / 16, h = n / 8 % 2, g = n % 8, t = k / 16, kb = k % 16 / 4, e = k % 4;
  return ((((nb * 4 + kb) * 2 + h) * 8 + g) * 4 + t) * 4 + e;
}

// A weight in layout mma16 (cuda/decode.cu): 64 x 64 tiles, values of a tile from multiples of 8 on.
struct Packed {
  std::vector<uint8_t> bitmap;
  std::vector<__half> values;
  std::vector<int32_t> offsets{0};
};
Packed pack(const std::vector<float>& w, int64_t K, int64_t N) {
  Packed p;
  for (int64_t n0 = 0; n0 < N; n0 += 64)
    for (int64_t k0 = 0; k0 < K; k0 += 64) {
      std::vector<float> tile(4096, 0.0f);
      for (int64_t k = 0; k < 64; ++k)
        for (int64_t n = 0; n < 64; ++n)
          if (k0 + k < K && n0 + n < N) tile[static_cast<size_t>(mma16_place(k, n))] = w[(k0 + k) * N + n0 + n];
      for (size_t i = 0; i < 4096; i += 8) {
        uint8_t byte = 0;
        for (size_t b = 0; b < 8; ++b)
          if (tile[i + b] != 0) byte |= static_cast<uint8_t>(1u << b), p.values.push_back(__float2half(tile[i + b]));
        p.bitmap.push_back(byte);
      }
      while (p.values.size() % 8) p.values.push_back(__float2half(0.0f));
      p.offsets.push_back(static_cast<int32_t>(p.values.size()));
    }
  if (p.values.empty()) p.values.resize(8, __float2half(0.0f));
  return p;
}

template <typename T>
T* to_device(const std::vector<T>& host) {
  void* device = nullptr;
  if (cudaMalloc(&device, host.size() * sizeof(T) + 16) != cudaSuccess) fail("cudaMalloc");
  if (cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice) != cudaSuccess) fail("cudaMemcpy");
  return static_cast<T*>(device);
}

void run_on_gpu(IPluginV3OneBuild* build, IPluginV3OneRuntime* runtime, int64_t K, int64_t N, int64_t M) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> w(static_cast<size_t>(K * N));
  for (float& v : w) v = random() % 10 < 7 ? 0.0f : __half2float(__float2half(normal(random)));
  std::vector<__half> x(static_cast<size_t>(M * K)), bias(static_cast<size_t>(N)), y(static_cast<size_t>(M * N));
  for (__half& v : x) v = __float2half(normal(random));
  for (__half& v : bias) v = __float2half(normal(random));
  const Packed p = pack(w, K, N);
  const int64_t tiles = static_cast<int64_t>(p.offsets.size()) - 1;
  const PluginTensorDesc in[] = {describe({M, K}, DataType::kHALF), describe({tiles, 512}, DataType::kINT8),
                                 describe({static_cast<int64_t>(p.values.size())}, DataType::kHALF),
                                 describe({tiles + 1}, DataType::kINT32), describe({N}, DataType::kHALF)};
  const PluginTensorDesc out[] = {describe({M, N}, DataType::kHALF)};
  DynamicPluginTensorDesc dynamic[5]{};
  for (int i = 0; i < 5; ++i) dynamic[i].desc = in[i], dynamic[i].min = dynamic[i].max = dynamic[i].opt = in[i].dims;
  void* workspace = nullptr;
  if (cudaMalloc(&workspace, build->getWorkspaceSize(dynamic, 5, nullptr, 1) + 256) != cudaSuccess) fail("cudaMalloc");
  __half* const dy = to_device(y);
  cudaMemset(dy, 0xff, y.size() * sizeof(__half));  // NaN: whatever is not written shows
  const void* inputs[] = {to_device(x), to_device(p.bitmap), to_device(p.values), to_device(p.offsets), to_device(bias)};
  void* outputs[] = {dy};
  if (runtime->onShapeChange(in, 5, out, 1) != 0) fail("onShapeChange: " + logger.last);
  if (runtime->enqueue(in, out, inputs, outputs, workspace, nullptr) != 0) fail("enqueue: " + logger.last);
  if (cudaDeviceSynchronize() != cudaSuccess) fail("the kernel failed");
  cudaMemcpy(y.data(), dy, y.size() * sizeof(__half), cudaMemcpyDeviceToHost);
  double worst = 0;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = __half2float(bias[n]), size = std::fabs(sum);
      for (int64_t k = 0; k < K; ++k) {
        const double product = double{__half2float(x[m * K + k])} * w[k * N + n];
        sum += product, size += std::fabs(product);
      }
      // The result is rounded to 11 bits; sums are rounded to 24, at most K times.
      const double bound = std::fabs(sum) * 0x1p-11 + size * static_cast<double>(K) * 0x1p-24 + 1e-6;
      const double error = std::fabs(__half2float(y[m * N + n]) - sum);
      if (!(error <= bound)) fail("y[" + std::to_string(m) + ", " + std::to_string(n) + "] is off by " + std::to_string(error));
      worst = std::fmax(worst, error / bound);
    }
  std::printf("ok: enqueue [%ld, %ld] x [%ld, %ld], worst error %.2f of the bound\n", static_cast<long>(M),
              static_cast<long>(K), static_cast<long>(K), static_cast<long>(N), worst);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) fail("usage: mini_host liboptimize_tensorrt.so <declaration>");
  void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) fail(dlerror());
  const auto set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  const auto get_creators =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  expect(set_finder && get_creators, "exports setLoggerFinder and getCreators");
  set_finder(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = get_creators(count);
  expect(count == 1, "one creator");
  auto* const creator = static_cast<IPluginCreatorV3One*>(creators[0]);
  expect(std::string(creator->getPluginName()) == "SparseMatMul" &&
             std::string(creator->getPluginNamespace()) == "optimize" &&
             std::string(creator->getPluginVersion()) == "1",
         "named optimize::SparseMatMul, version 1");
  expect(creator->getFieldNames()->nbFields == 7, "seven fields");

  const int64_t declaration = std::strtoll(argv[2], nullptr, 10);
  Fields good{200, 130, 5, 4096, declaration, "mma16", "none", {}, {}};
  IPluginV3* const plugin = creator->createPlugin("layer", good.get(), TensorRTPhase::kBUILD);
  if (plugin == nullptr) fail("no plugin: " + logger.last);
  const auto refused = [&](Fields fields, const char* text) {
    expect(creator->createPlugin("bad", fields.get(), TensorRTPhase::kBUILD) == nullptr &&
               logger.last.find(text) != std::string::npos,
           text);
  };
  refused({200, 130, 5, 0, declaration + 1, "mma16", "none", {}, {}}, "rebuild the plugin library");
  refused({0, 130, 5, 0, declaration, "mma16", "none", {}, {}}, "K and N must be positive");
  refused({200, 130, 5, 0, declaration, "n64k1", "none", {}, {}}, "layout 'n64k1' has no CUDA kernel");
  refused({200, 130, 5, 0, declaration, "mma16", "softmax", {}, {}}, "there is no activation 'softmax'");
  refused({200, 130, 5, 5000, declaration, "mma16", "none", {}, {}}, "most_values must be between 0");
  refused({200, 130, 9, 0, declaration, "mma16", "none", {}, {}}, "expected 4 or 5 inputs");
  refused({200, 130, 5, 0, declaration, "mma8", "none", {}, {}}, "expected 6 or 7 inputs");

  auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
  auto* const runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  expect(plugin->getCapabilityInterface(PluginCapabilityType::kCORE) && build && runtime, "all three interfaces");
  expect(build->getNbOutputs() == 1, "one output");

  DynamicPluginTensorDesc in[6]{};
  const PluginTensorDesc each[] = {describe({-1, 7, 200}, DataType::kHALF), describe({12, 512}, DataType::kINT8),
                                   describe({999}, DataType::kHALF),        describe({13}, DataType::kINT32),
                                   describe({130}, DataType::kHALF),        describe({-1, 7, 130}, DataType::kHALF)};
  for (int i = 0; i < 6; ++i) in[i].desc = each[i], in[i].min = in[i].max = in[i].opt = each[i].dims;
  in[0].max.d[0] = 4;
  bool all = true;
  for (int i = 0; i < 6; ++i) all = all && build->supportsFormatCombination(i, in, 5, 1);
  expect(all, "takes float16");
  in[0].desc.type = DataType::kFLOAT;
  expect(!build->supportsFormatCombination(0, in, 5, 1), "refuses float32");
  in[0].desc.type = DataType::kHALF;
  in[1].desc.type = DataType::kINT32;
  expect(!build->supportsFormatCombination(1, in, 5, 1), "refuses a bitmap of int32");
  in[1].desc.type = DataType::kINT8;
  expect(build->configurePlugin(in, 5, in + 5, 1) == 0, "configures");
  in[3].desc.dims.d[0] = 12;
  expect(build->configurePlugin(in, 5, in + 5, 1) != 0 && logger.last.find("input 3 has the shape [12]") != std::string::npos,
         "refuses offsets of the wrong length and says so");
  in[3].desc.dims.d[0] = 13;
  DataType type{};
  const DataType types[] = {DataType::kHALF, DataType::kINT8, DataType::kHALF, DataType::kINT32, DataType::kHALF};
  expect(build->getOutputDataTypes(&type, 1, types, 5) == 0 && type == DataType::kHALF, "y has the type of x");

  PluginFieldCollection const* stored = runtime->getFieldsToSerialize();
  expect(stored != nullptr && stored->nbFields == 7, "serializes seven fields");
  std::unique_ptr<IPluginV3> again(creator->createPlugin("layer", stored, TensorRTPhase::kRUNTIME));
  expect(again != nullptr, "a plugin comes back from them");
  std::unique_ptr<IPluginV3> copy(again->clone());
  expect(copy != nullptr, "clones");
  auto* const copied = static_cast<IPluginV3OneRuntime*>(copy->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
  PluginFieldCollection const* once_more = copied->getFieldsToSerialize();
  bool same = once_more->nbFields == 7;
  for (int i = 0; same && i < 6; ++i) {
    const PluginField &a = stored->fields[i], &b = once_more->fields[i];
    same = std::strcmp(a.name, b.name) == 0 && a.type == b.type && a.length == b.length &&
           std::memcmp(a.data, b.data, static_cast<size_t>(a.length) * (a.type == PluginFieldType::kINT64 ? 8 : 1)) == 0;
  }
  expect(same, "the round trip keeps every field");

  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no GPU: enqueue was not run\n");
    return 0;
  }
  for (const int64_t M : {1, 7, 16, 33}) run_on_gpu(build, runtime, 200, 130, M);
  return 0;
}
