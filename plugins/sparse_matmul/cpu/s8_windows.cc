#include "s8_windows.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "parallel.h"
#include "scratch.h"

namespace optimize::sparse_matmul {
namespace {

constexpr int64_t kColumns = 16, kGroups = kTile / kColumns;
constexpr int64_t kWindow = 2 * kWindowStep;
constexpr int64_t kMostStrips = 4;    // of a task
constexpr int64_t kMostWindows = 18;  // of a block: with the codes of 26 tokens they stay in the first cache

struct Entry {
  int64_t k;
  int8_t value;
};

// The stored weights of the 16 columns of a group, each column in order of k.
using Columns = std::array<std::vector<Entry>, kColumns>;

std::array<Columns, kGroups> groups_of(const Weight& w, int64_t strip) {
  std::array<Columns, kGroups> groups;
  for (int64_t kt = 0; kt < w.tiles_k(); ++kt) {
    const int64_t tile = strip * w.tiles_k() + kt;
    const int8_t* value = static_cast<const int8_t*>(w.values) + w.offsets[tile];
    for (int64_t i = 0; i < kTile; ++i) {  // a word is 16 columns by 4 rows
      uint64_t word;
      std::memcpy(&word, w.bitmap + tile * kBitmapBytes + i * 8, sizeof word);
      for (; word; word &= word - 1) {
        const int64_t bit = __builtin_ctzll(word), k = kt * kTile + i / kGroups * 4 + bit % 4;
        groups[static_cast<size_t>(i % kGroups)][static_cast<size_t>(bit / 4)].push_back({k, *value++});
      }
    }
  }
  return groups;
}

// Steps of one group: each begins at the first weight that is left, so that windows only move on.
void schedule(const Columns& columns, int64_t block, WindowLists& out, std::vector<int64_t>& blocks) {
  std::array<size_t, kColumns> next{};
  for (;;) {
    int64_t first = INT64_MAX;
    for (size_t c = 0; c < kColumns; ++c)
      if (next[c] < columns[c].size()) first = std::min(first, columns[c][next[c]].k);
    if (first == INT64_MAX) return;
    const int64_t window = first / kWindowStep, begin = window * kWindowStep;
    WindowStep step{};
    for (size_t c = 0; c < kColumns; ++c)
      for (size_t i = 0; i < 4 && next[c] < columns[c].size() && columns[c][next[c]].k < begin + kWindow; ++i) {
        const Entry& entry = columns[c][next[c]++];
        step.rows[c * 4 + i] = static_cast<uint8_t>(entry.k - begin);
        step.weights[c * 4 + i] = entry.value;
      }
    out.steps.push_back(step);
    out.places.push_back(static_cast<uint16_t>(window % block));
    blocks.push_back(window / block);
  }
}

}  // namespace

WindowLists make_windows(const Weight& w, int64_t strip, int64_t block) {
  // In the order in which they are run: all groups of a block of rows, then the next block.
  const std::array<Columns, kGroups> columns = groups_of(w, strip);
  std::array<WindowLists, kGroups> groups;
  std::array<std::vector<int64_t>, kGroups> blocks;
  for (size_t g = 0; g < kGroups; ++g) schedule(columns[g], block, groups[g], blocks[g]);
  WindowLists out;
  std::array<size_t, kGroups> next{};
  for (int64_t b = 0; b * block * kWindowStep < w.K; ++b)
    for (size_t g = 0; g < kGroups; ++g) {
      out.begin.push_back(static_cast<int64_t>(out.steps.size()));
      for (; next[g] < blocks[g].size() && blocks[g][next[g]] == b; ++next[g]) {
        out.steps.push_back(groups[g].steps[next[g]]);
        out.places.push_back(groups[g].places[next[g]]);
      }
    }
  out.begin.push_back(static_cast<int64_t>(out.steps.size()));
  out.steps.shrink_to_fit();
  out.places.shrink_to_fit();
  return out;
}

Windows::Windows(const Weight& weight, const S8Dense& set, const int32_t* column_sums)
    : w_(weight), set_(set), column_sums_(column_sums), windows_((weight.K + kWindowStep - 1) / kWindowStep) {
  const int64_t blocks = std::max<int64_t>(1, (windows_ + kMostWindows - 1) / kMostWindows);
  block_ = std::max<int64_t>(1, (windows_ + blocks - 1) / blocks);
  blocks_ = std::max<int64_t>(1, (windows_ + block_ - 1) / block_);
}

// In chunks of tokens whose codes stay in the second cache, as far as the lists are worth reading for them.
void Windows::run(const float* x, int64_t M, float* y, const Parallel& parallel) const {
  std::call_once(once_, [&] {
    std::vector<WindowLists> made(static_cast<size_t>(w_.tiles_n()));
    run_tasks(parallel, w_.tiles_n(), [&](int64_t s) { made[static_cast<size_t>(s)] = make_windows(w_, s, block_); });
    lists_ = std::move(made);
  });
  constexpr int64_t kChunkCodes = int64_t{1} << 18, kLeastTiles = 5;
  const int64_t most = std::max(kLeastTiles, kChunkCodes / (w_.K * kWindowTokens)) * kWindowTokens;
  const int64_t chunks = (M + most - 1) / most;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = M * c / chunks, end = M * (c + 1) / chunks;
    run_chunk(x + first * w_.K, end - first, y + first * w_.N, parallel);
  }
}

void Windows::run_chunk(const float* x, int64_t M, float* y, const Parallel& parallel) const {
  static thread_local Scratch window_memory, step_memory;
  uint8_t* codes = static_cast<uint8_t*>(window_memory.bytes(M * windows_ * kWindow));
  float* steps = step_memory.floats(M);
  const Chunk chunk{M, (M + kWindowTokens - 1) / kWindowTokens, codes, steps, y};
  run_tasks(parallel, chunk.tiles, [&](int64_t tile) {
    static thread_local Scratch row_memory;
    int8_t* row = static_cast<int8_t*>(row_memory.bytes(w_.tiles_k() * kTile));
    const int64_t first = chunk.first(tile), tokens = chunk.first(tile + 1) - first;
    for (int64_t m = 0; m < tokens; ++m) {
      steps[first + m] = set_.quantize(x + (first + m) * w_.K, w_.K, w_.x_scale, row);
      set_.spread(row, windows_, tokens, codes + (first * windows_ + m) * kWindow);
    }
  });

  // A task applies the lists of some strips to some tiles of tokens: codes are read once for all of its strips.
  constexpr int64_t kTasks = 24;
  const int64_t strips = w_.tiles_n();
  const int64_t shared = std::max<int64_t>(1, std::min(kMostStrips, strips * chunk.tiles / kTasks));
  const int64_t groups = (strips + shared - 1) / shared, pieces = std::min(chunk.tiles, (kTasks + groups - 1) / groups);
  run_tasks(parallel, groups * pieces, [&](int64_t i) {
    const int64_t group = i / pieces, piece = i % pieces;
    run_strips(chunk, strips * group / groups, strips * (group + 1) / groups, chunk.tiles * piece / pieces,
               chunk.tiles * (piece + 1) / pieces);
  });
}

void Windows::run_strips(const Chunk& chunk, int64_t strip, int64_t strips_end, int64_t tile, int64_t tiles_end) const {
  alignas(64) int32_t sums[kMostStrips * kWindowTokens * kTile];
  for (int64_t t = tile; t < tiles_end; ++t) {
    const int64_t first = chunk.first(t), tokens = chunk.first(t + 1) - first;
    for (int64_t b = 0; b < blocks_; ++b) {
      const uint8_t* codes = chunk.codes + (first * windows_ + b * block_ * tokens) * kWindow;
      for (int64_t s = strip; s < strips_end; ++s) {
        int32_t* sum = sums + (s - strip) * kWindowTokens * kTile;
        const WindowLists& lists = lists_[static_cast<size_t>(s)];
        const int64_t* begin = lists.begin.data() + b * kGroups;
        for (int64_t g = 0; g < kGroups; ++g)
          set_.window_sums(lists.steps.data() + begin[g], lists.places.data() + begin[g], begin[g + 1] - begin[g], codes,
                           tokens, b == 0, sum + g * kColumns);
        if (b == blocks_ - 1)
          set_.finish(w_, s, column_sums_ + s * kTile, sum, chunk.steps + first, tokens, chunk.y + first * w_.N);
      }
    }
  }
}

}  // namespace optimize::sparse_matmul
