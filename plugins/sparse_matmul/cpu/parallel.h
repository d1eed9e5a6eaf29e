// Tasks as lambdas on a Parallel.
#pragma once

#include <atomic>
#include <new>

#include "../sparse_matmul.h"

namespace optimize::sparse_matmul {

// Calls body(i) for every i < count and returns when all are done. Throws std::bad_alloc if one of them did: no
// exception crosses the threads of the caller's pool.
template <typename Body>
void run_tasks(const Parallel& parallel, int64_t count, const Body& body) {
  struct Call {
    const Body& body;
    std::atomic<bool> failed{false};
  } call{body};
  if (count <= 0) return;
  parallel.run(
      parallel.state, static_cast<size_t>(count),
      [](void* user, size_t i) {
        Call& c = *static_cast<Call*>(user);
        try {
          c.body(static_cast<int64_t>(i));
        } catch (const std::bad_alloc&) {
          c.failed = true;
        }
      },
      &call);
  if (call.failed) throw std::bad_alloc();
}

}  // namespace optimize::sparse_matmul
