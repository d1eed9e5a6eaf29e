// What TensorRT looks for in a plugin library: setLoggerFinder and getCreators, and nothing else is exported.
#include <atomic>
#include <cstdio>

#include "plugin.h"

#define OPTIMIZE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
std::atomic<nvinfer1::ILoggerFinder*> finder{nullptr};
}

namespace optimize::sparse_matmul::tensorrt {

void log_error(const std::string& text) noexcept {
  nvinfer1::ILoggerFinder* const found = finder.load();
  nvinfer1::ILogger* const logger = found == nullptr ? nullptr : found->findLogger();
  if (logger != nullptr)
    logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
  else  // TensorRT for RTX 1.7 has none to give
    std::fprintf(stderr, "%s\n", text.c_str());
}

}  // namespace optimize::sparse_matmul::tensorrt

OPTIMIZE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* given) { finder = given; }

OPTIMIZE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static optimize::sparse_matmul::tensorrt::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}
