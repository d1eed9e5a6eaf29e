// What TensorRT looks for in a plugin library: setLoggerFinder and getCreators, and nothing else is exported.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>

#include "plugin.h"

#define OPTIMIZE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Where ILoggerFinder::findLogger and ILogger::log stand in their tables of virtual functions: first up to TensorRT 10,
// after the four of IVersionedInterface from TensorRT 11 and TensorRT for RTX 1.7 on. This library may have been compiled
// with the headers of one and loaded by the other, so it calls them by their place, which the version of the library that
// the finder comes from tells. A finder from elsewhere was compiled with the same headers; of versions that were not looked
// at, nothing is called, and messages go to stderr.
constexpr int kFirst = 0, kAfterVersions = 4, kUnknown = -1;
constexpr int kOfHeaders = NV_TENSORRT_MAJOR >= 11 ? kAfterVersions : kFirst;

std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};
std::atomic<int> place{kUnknown};

void** functions_of(void* object) { return *static_cast<void***>(object); }

int place_in(nvinfer1::ILoggerFinder* given) {
  Dl_info info{};
  if (!dladdr(functions_of(given), &info) || info.dli_fname == nullptr) return kOfHeaders;
  void* const library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  void* const function = library ? dlsym(library, "getInferLibVersion") : nullptr;
  const int32_t version = function ? reinterpret_cast<int32_t (*)()>(function)() : 0;
  if (library) dlclose(library);
  if (version == 0) return kOfHeaders;
  if (version >= 110000) return kAfterVersions;         // 11.0.0
  if (version >= 100000) return kFirst;                 // 10.0.0
  return version >= 10700 ? kAfterVersions : kUnknown;  // RTX 1.7.0
}

bool log(const char* text) {
  nvinfer1::ILoggerFinder* const found = finder.load();
  const int at = place.load();
  if (found == nullptr || at == kUnknown) return false;
  void* const logger = reinterpret_cast<void* (*)(void*)>(functions_of(found)[at])(found);
  if (logger == nullptr) return false;
  constexpr int32_t kError = static_cast<int32_t>(nvinfer1::ILogger::Severity::kERROR);
  reinterpret_cast<void (*)(void*, int32_t, const char*)>(functions_of(logger)[at])(logger, kError, text);
  return true;
}

}  // namespace

namespace optimize::sparse_matmul::tensorrt {

void log_error(const std::string& text) noexcept {
  if (!log(text.c_str())) std::fprintf(stderr, "%s\n", text.c_str());
}

}  // namespace optimize::sparse_matmul::tensorrt

OPTIMIZE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* given) {
  place = given == nullptr ? kUnknown : place_in(given);
  finder = given;
}

OPTIMIZE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static optimize::sparse_matmul::tensorrt::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
