// Device memory that products on one stream share: scratch, and the zeros of Weight::arrivals.
//
// What runs on a stream runs in order, so one piece for each stream is enough, and no product has to ask the driver for
// memory: ONNX Runtime synchronizes after every run, when a pool of cudaMallocAsync gives everything back. The kernels of
// a product must follow each other, so a lease holds a lock while they are enqueued.
//
// Pieces are never given back, since a captured graph may hold their addresses; they at least double, so that at most
// as much again is lost.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace optimize::sparse_matmul {

class StreamMemory {
 public:
  // The memory of a stream of the current device, which lives as long as the process.
  static StreamMemory& of(cudaStream_t stream) {
    static std::mutex mutex;
    static auto* all = new std::map<std::pair<int, cudaStream_t>, StreamMemory>;  // outlives the driver's own end
    int device = 0;
    cudaGetDevice(&device);
    const std::lock_guard<std::mutex> lock(mutex);
    return (*all)[{device, stream}];
  }

  // Held while the kernels of one product are enqueued.
  class Lease {
   public:
    Lease(StreamMemory& memory, cudaStream_t stream, size_t scratch_bytes, size_t arrivals)
        : lock_(memory.mutex_), stream_(stream) {
      cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
      error_ = cudaStreamIsCapturing(stream, &capturing);
      if (error_ != cudaSuccess) return;
      const bool may_grow = capturing == cudaStreamCaptureStatusNone;
      if (scratch_bytes <= memory.scratch_bytes_ || may_grow) {
        error_ = grow(&memory.scratch_, &memory.scratch_bytes_, scratch_bytes);
        scratch = memory.scratch_;
      } else {  // memory of the captured graph's own
        error_ = cudaMallocAsync(&own_, scratch_bytes, stream);
        scratch = own_;
      }
      if (error_ != cudaSuccess) return;
      const size_t bytes = arrivals * sizeof(uint32_t), before = memory.arrivals_bytes_;
      if (bytes > before && !may_grow) return;  // without them there is one more kernel
      error_ = grow(&memory.arrivals_, &memory.arrivals_bytes_, bytes);
      if (error_ == cudaSuccess && memory.arrivals_bytes_ > before)
        error_ = cudaMemsetAsync(memory.arrivals_, 0, memory.arrivals_bytes_, stream);
      this->arrivals = static_cast<uint32_t*>(memory.arrivals_);
    }
    ~Lease() {
      if (own_ != nullptr) cudaFreeAsync(own_, stream_);
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    cudaError_t error() const { return error_; }

    void* scratch = nullptr;
    uint32_t* arrivals = nullptr;  // null where a captured graph would need new ones

   private:
    static cudaError_t grow(void** piece, size_t* size, size_t bytes) {
      if (bytes <= *size) return cudaSuccess;
      const size_t wanted = std::max(bytes, 2 * *size);
      void* made = nullptr;
      const cudaError_t error = cudaMalloc(&made, wanted);
      if (error != cudaSuccess) return error;
      *piece = made;
      *size = wanted;
      return cudaSuccess;
    }

    std::lock_guard<std::mutex> lock_;
    cudaStream_t stream_;
    cudaError_t error_ = cudaSuccess;
    void* own_ = nullptr;
  };

 private:
  std::mutex mutex_;
  void *scratch_ = nullptr, *arrivals_ = nullptr;
  size_t scratch_bytes_ = 0, arrivals_bytes_ = 0;
};

}  // namespace optimize::sparse_matmul
