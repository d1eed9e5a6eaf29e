#include "f32_forms.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <tuple>

namespace optimize::sparse_matmul {
namespace {

struct Entry {
  int64_t k;
  float value;
};

// Calls body(n, k, value) for every stored weight of a tile, n in the strip and k in W.
template <typename Body>
void for_each(const Weight& w, int64_t tile, Body body) {
  const float* value = static_cast<const float*>(w.values) + w.offsets[tile];
  const int64_t first = tile % w.tiles_k() * kTile;
  for (int64_t k = 0; k < kTile; ++k) {
    uint64_t word;
    std::memcpy(&word, w.bitmap + tile * kBitmapBytes + k * 8, 8);
    for (; word; word &= word - 1) body(static_cast<int64_t>(__builtin_ctzll(word)), first + k, *value++);
  }
}

using Columns = std::array<std::vector<Entry>, kTile>;

struct Pair {
  int64_t a, b;  // columns in the strip
  std::vector<Entry> both_a, both_b, single_a, single_b;

  Pair(const Columns& columns, int64_t first, int64_t second)
      : a(first), b(second) {
    auto i = columns[first].begin(), j = columns[second].begin();
    const auto i_end = columns[first].end(), j_end = columns[second].end();
    while (i != i_end || j != j_end) {
      if (j == j_end || (i != i_end && i->k < j->k))
        single_a.push_back(*i++);
      else if (i == i_end || j->k < i->k)
        single_b.push_back(*j++);
      else
        both_a.push_back(*i++), both_b.push_back(*j++);
    }
  }
  size_t singles() const { return std::max(single_a.size(), single_b.size()); }
};

void write(const Pair& pair, int64_t first, int64_t stride, StripPairs& out) {
  const auto code = [&](int64_t c) { out.codes.push_back(static_cast<uint16_t>(c)); };
  const auto place = [&](int64_t index) { code(index * stride * static_cast<int64_t>(sizeof(float))); };
  place(pair.a), place(pair.b);
  code(static_cast<int64_t>(pair.both_a.size())), code(static_cast<int64_t>(pair.singles()));
  for (size_t i = 0; i < pair.both_a.size(); ++i) {
    place(pair.both_a[i].k - first);
    out.values.push_back(pair.both_a[i].value);
    out.values.push_back(pair.both_b[i].value);
  }
  const Entry filler{first, 0.0f};
  for (size_t i = 0; i < pair.singles(); ++i)
    for (const auto* list : {&pair.single_a, &pair.single_b}) {
      const Entry& e = i < list->size() ? (*list)[i] : filler;
      place(e.k - first);
      out.values.push_back(e.value);
    }
}

}  // namespace

StripPairs make_pairs(const Weight& w, int64_t strip, PairShape shape) {
  StripPairs out;
  const int64_t tiles_k = w.tiles_k(), step = shape.block / kTile;
  for (int64_t kt = 0; kt < tiles_k; kt += step) {
    Columns columns;
    for (int64_t t = kt; t < std::min(kt + step, tiles_k); ++t)
      for_each(w, strip * tiles_k + t,
               [&](int64_t n, int64_t k, float v) { columns[static_cast<size_t>(n)].push_back({k, v}); });
    // Columns of similar length make pairs with little filling, and pairs in order of length loops whose ends
    // the processor predicts.
    std::array<int64_t, kTile> order;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return columns[i].size() < columns[j].size(); });
    std::vector<Pair> pairs;
    for (size_t i = 0; i < order.size(); i += 2)
      if (!columns[order[i + 1]].empty()) pairs.emplace_back(columns, order[i], order[i + 1]);
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& p, const Pair& q) {
      return std::make_tuple(p.both_a.size(), p.singles()) < std::make_tuple(q.both_a.size(), q.singles());
    });
    out.code_begin.push_back(static_cast<int64_t>(out.codes.size()));
    out.value_begin.push_back(static_cast<int64_t>(out.values.size()));
    out.codes.push_back(static_cast<uint16_t>(pairs.size()));
    for (const Pair& pair : pairs) write(pair, kt * kTile, shape.stride, out);
  }
  out.codes.shrink_to_fit();
  out.values.shrink_to_fit();
  return out;
}

OwnedSlices make_slices(const Weight& w, int64_t lanes) {
  OwnedSlices out;
  out.steps.push_back(0);
  const int64_t tiles_k = w.tiles_k();
  for (int64_t begin = 0; begin < w.N; begin += kWindow) {
    std::array<std::vector<Entry>, kWindow> columns;
    for (int64_t strip = begin / kTile; strip < std::min((begin + kWindow) / kTile, w.tiles_n()); ++strip)
      for (int64_t kt = 0; kt < tiles_k; ++kt)
        for_each(w, strip * tiles_k + kt, [&](int64_t n, int64_t k, float v) {
          columns[static_cast<size_t>(strip * kTile - begin + n)].push_back({k, v});
        });
    std::vector<size_t> order(static_cast<size_t>((std::min(kWindow, w.N - begin) + lanes - 1) / lanes * lanes));
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t i, size_t j) { return columns[i].size() > columns[j].size(); });
    for (size_t i = 0; i < order.size(); i += static_cast<size_t>(lanes)) {
      const size_t steps = columns[order[i]].size();
      for (size_t s = 0; s < steps; ++s)
        for (size_t lane = i; lane < i + static_cast<size_t>(lanes); ++lane) {
          const auto& column = columns[order[lane]];
          const Entry e = s < column.size() ? column[s] : Entry{0, 0.0f};
          out.rows.push_back(static_cast<uint16_t>(e.k));
          out.values.push_back(e.value);
        }
      out.steps.push_back(out.steps.back() + static_cast<int64_t>(steps));
      for (size_t lane = i; lane < i + static_cast<size_t>(lanes); ++lane)
        out.columns.push_back(static_cast<uint8_t>(order[lane]));
    }
  }
  out.rows.shrink_to_fit();
  out.values.shrink_to_fit();
  return out;
}

}  // namespace optimize::sparse_matmul
