// Memory of one thread that the calls in it share: `static thread_local Scratch`. It grows and stays.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace optimize::sparse_matmul {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `bytes` bytes, aligned to 64; what was in it is lost. Throws std::bad_alloc.
  void* bytes(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      const size_t rounded = (static_cast<size_t>(bytes) + 63) / 64 * 64;
      data_ = std::aligned_alloc(64, rounded);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = static_cast<int64_t>(rounded);
    }
    return data_;
  }
  float* floats(int64_t count) { return static_cast<float*>(bytes(count * static_cast<int64_t>(sizeof(float)))); }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace optimize::sparse_matmul
