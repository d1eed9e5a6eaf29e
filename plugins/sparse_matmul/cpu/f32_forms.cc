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

// Makes `list` as long as `size` by halving stored weights, of this list and of `others`, into two entries each. A
// filler of weight 0 would turn an infinite x into NaN; where nothing is stored, a dense product does so too.
void fill(std::vector<Entry>& list, std::vector<Entry>& others, size_t size) {
  const size_t own = list.size() + others.size();
  for (size_t i = 0; list.size() < size; ++i) {
    Entry half{0, 0.0f};
    if (own > 0) {
      Entry& whole = i % own < others.size() ? others[i % own] : list[i % own - others.size()];
      whole.value *= 0.5f;
      half = whole;
    }
    list.push_back(half);
  }
}

using Columns = std::array<std::vector<Entry>, kTile>;

struct Pair {
  int64_t a, b;  // columns in the strip
  std::vector<Entry> both_a, both_b, single_a, single_b;

  Pair(const Columns& columns, int64_t first, int64_t second) : a(first), b(second) {
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
    const size_t singles = std::max(single_a.size(), single_b.size());
    fill(single_a, both_a, singles);
    fill(single_b, both_b, singles);
  }
};

void write(const Pair& pair, int64_t first, TileShape shape, StripLists& out) {
  const auto code = [&](int64_t c) { out.codes.push_back(static_cast<uint16_t>(c)); };
  const auto place = [&](int64_t index) { code(shape.offset(index)); };
  const auto row = [&](const Entry& e) { place(std::max<int64_t>(e.k - first, 0)); };
  const auto value = [&](const Entry& e) {
    uint32_t bits;
    std::memcpy(&bits, &e.value, sizeof bits);
    out.values.push_back(bits);
  };
  place(pair.a), place(pair.b);
  code(static_cast<int64_t>(pair.both_a.size())), code(static_cast<int64_t>(pair.single_a.size()));
  for (size_t i = 0; i < pair.both_a.size(); ++i) {
    row(pair.both_a[i]);
    value(pair.both_a[i]), value(pair.both_b[i]);
  }
  for (size_t i = 0; i < pair.single_a.size(); ++i) {
    row(pair.single_a[i]), row(pair.single_b[i]);
    value(pair.single_a[i]), value(pair.single_b[i]);
  }
}

}  // namespace

StripLists make_pairs(const Weight& w, int64_t strip, TileShape shape) {
  StripLists out;
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
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t i, int64_t j) { return columns[i].size() < columns[j].size(); });
    std::vector<Pair> pairs;
    for (size_t i = 0; i < order.size(); i += 2)
      if (!columns[order[i + 1]].empty()) pairs.emplace_back(columns, order[i], order[i + 1]);
    std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& p, const Pair& q) {
      return std::make_tuple(p.both_a.size(), p.single_a.size()) < std::make_tuple(q.both_a.size(), q.single_a.size());
    });
    out.begin_block();
    out.codes.push_back(static_cast<uint16_t>(pairs.size()));
    for (const Pair& pair : pairs) write(pair, kt * kTile, shape, out);
  }
  return out;
}

OwnedSlices make_slices(const Weight& w, int64_t lanes) {
  OwnedSlices out;
  out.steps.push_back(0);
  for (int64_t strip = 0; strip < w.tiles_n(); ++strip) {
    Columns columns;
    for (int64_t kt = 0; kt < w.tiles_k(); ++kt)
      for_each(w, strip * w.tiles_k() + kt,
               [&](int64_t n, int64_t k, float v) { columns[static_cast<size_t>(n)].push_back({k, v}); });
    const int64_t used = std::min(kTile, w.N - strip * kTile);
    std::vector<size_t> order(static_cast<size_t>((used + lanes - 1) / lanes * lanes));
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t i, size_t j) { return columns[i].size() > columns[j].size(); });
    for (size_t i = 0; i < order.size(); i += static_cast<size_t>(lanes)) {
      const size_t steps = columns[order[i]].size();
      std::vector<Entry> none;
      for (size_t lane = i; lane < i + static_cast<size_t>(lanes); ++lane) fill(columns[order[lane]], none, steps);
      for (size_t s = 0; s < steps; ++s)
        for (size_t lane = i; lane < i + static_cast<size_t>(lanes); ++lane) {
          const Entry& e = columns[order[lane]][s];
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
