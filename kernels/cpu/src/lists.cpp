#include "lists.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace sfx {
namespace {

// Calls visit(entry, output, input, tap) for every entry, with channels numbered over all groups.
template <class Visit>
void each_entry(const Pattern& p, bool transposed, Visit visit) {
  const int64_t taps = p.shape.taps();
  const int64_t per_group = p.shape.in / p.shape.groups, outs = p.shape.out / p.shape.groups;
  std::vector<uint32_t> channel_of(p.row_size()), tap_of(p.row_size());
  for (int64_t c = 0; c < p.row_size(); ++c) {
    channel_of[c] = uint32_t(c / taps);
    tap_of[c] = uint32_t(c % taps);
  }
  for (int64_t o = 0; o < p.shape.out; ++o) {
    const uint32_t base = uint32_t(o / outs * per_group);
    for (uint32_t e = p.row[o]; e < p.row[o + 1]; ++e) {
      const uint32_t i = base + channel_of[p.column[e]];
      if (transposed)
        visit(e, i, uint32_t(o), tap_of[p.column[e]]);
      else
        visit(e, uint32_t(o), i, tap_of[p.column[e]]);
    }
  }
}

}  // namespace

Pattern make_pattern(const ConvShape& shape, const uint8_t* mask) {
  Pattern p;
  p.shape = shape;
  const int64_t size = p.row_size();
  if (size * shape.out > int64_t(UINT32_MAX)) throw std::length_error("weight has more than 2^32 elements");
  p.row.resize(shape.out + 1);
  p.column.resize(std::count_if(mask, mask + size * shape.out, [](uint8_t m) { return m != 0; }) + 1);
  int64_t n = 0;
  for (int64_t o = 0; o < shape.out; ++o) {
    const uint8_t* m = mask + o * size;
    const auto take = [&](int64_t c) {  // without a branch, which random masks would mispredict
      p.column[n] = uint32_t(c);
      n += m[c] != 0;
    };
    int64_t c = 0;
    for (; c + 8 <= size; c += 8) {
      uint64_t word;
      std::memcpy(&word, m + c, 8);
      if (!word) continue;
      for (int64_t k = c; k < c + 8; ++k) take(k);
    }
    for (; c < size; ++c) take(c);
    p.row[o + 1] = uint32_t(n);
  }
  p.column.resize(n);
  return p;
}

std::vector<uint32_t> live_inputs(const Pattern& pattern, bool transposed, const std::vector<int64_t>& tap_offset,
                                  int64_t* entries) {
  const int64_t inputs = transposed ? pattern.shape.out : pattern.shape.in;
  std::vector<uint8_t> seen(inputs, 0);
  int64_t n = 0;
  each_entry(pattern, transposed, [&](uint32_t, uint32_t, uint32_t in, uint32_t tap) {
    if (tap_offset[tap] < 0) return;
    seen[in] = 1;
    ++n;
  });
  std::vector<uint32_t> live;
  for (int64_t c = 0; c < inputs; ++c)
    if (seen[c]) live.push_back(uint32_t(c));
  if (entries) *entries = n;
  return live;
}

Lists make_lists(const Pattern& pattern, bool transposed, const std::vector<int64_t>& tap_offset,
                 const std::vector<uint8_t>& tap_class, int64_t channel_bytes, int64_t chunk, int64_t block,
                 int64_t slots) {
  Lists l;
  int64_t entries = 0;
  l.outputs = transposed ? pattern.shape.in : pattern.shape.out;
  l.live = live_inputs(pattern, transposed, tap_offset, &entries);
  const int64_t live = int64_t(l.live.size());
  l.block = std::max<int64_t>(1, std::min(block, l.outputs));
  l.blocks = (l.outputs + l.block - 1) / l.block;
  l.chunk = std::max<int64_t>(1, std::min(chunk, live));
  l.chunks = std::max<int64_t>(1, (live + l.chunk - 1) / l.chunk);

  std::vector<uint32_t> chunk_of(transposed ? pattern.shape.out : pattern.shape.in), place(chunk_of.size());
  for (int64_t k = 0; k < live; ++k) {
    chunk_of[l.live[k]] = uint32_t(k / l.chunk);
    place[l.live[k]] = uint32_t(k % l.chunk * channel_bytes);
  }
  const int64_t classes = tap_class.empty() ? 1 : CLASSES;
  // Entries of each (output, chunk, class), then where that run continues.
  std::vector<uint32_t> next(l.outputs * l.chunks * classes, 0);
  const auto run_of = [&](uint32_t out, uint32_t in, uint32_t tap) -> uint32_t& {
    return next[(int64_t(out) * l.chunks + chunk_of[in]) * classes + (classes > 1 ? tap_class[tap] : 0)];
  };
  each_entry(pattern, transposed, [&](uint32_t, uint32_t out, uint32_t in, uint32_t tap) {
    if (tap_offset[tap] >= 0) ++run_of(out, in, tap);
  });

  l.cells.resize(l.blocks * l.chunks);
  std::vector<int64_t> first(l.block), last(l.block);  // chunks of each output's first and last record
  std::vector<uint32_t> order, count(l.block);
  uint32_t entry = 0;
  int64_t slot = 0;
  for (int64_t b = 0; b < l.blocks; ++b) {
    const int64_t o0 = b * l.block, width = std::min(l.block, l.outputs - o0);
    const auto run = [&](int64_t q, int64_t c) { return next.data() + ((o0 + q) * l.chunks + c) * classes; };
    const auto filled = [&](int64_t q, int64_t c) {
      return std::any_of(run(q, c), run(q, c) + classes, [](uint32_t n) { return n > 0; });
    };
    for (int64_t q = 0; q < width; ++q) {
      for (first[q] = 0; first[q] < l.chunks && !filled(q, first[q]);) ++first[q];
      if (first[q] == l.chunks) first[q] = 0;
      for (last[q] = l.chunks - 1; last[q] > first[q] && !filled(q, last[q]);) --last[q];
    }
    for (int64_t c = 0; c < l.chunks; ++c) {
      const auto group = [&](uint32_t q) {
        return first[q] == c ? (last[q] == c ? WHOLE : OPENING) : last[q] == c ? CLOSING : INNER;
      };
      order.clear();
      for (uint32_t q = 0; q < width; ++q) {
        count[q] = std::accumulate(run(q, c), run(q, c) + classes, uint32_t(0));
        if (count[q] || first[q] == c) order.push_back(q);
      }
      std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t z) {
        return group(a) != group(z) ? group(a) < group(z) : count[a] > count[z];
      });
      Cell& cell = l.cells[b * l.chunks + c];
      cell.slot = slot;
      for (uint32_t q : order) slot += (count[q] + slots - 1) / slots * slots;
      cell.slots = slot - cell.slot;
      auto q = order.begin();
      for (int g = 0; g <= GROUPS; ++g) {
        cell.record[g] = uint32_t(l.records.size());
        cell.entry[g] = entry;
        for (; g < GROUPS && q != order.end() && group(*q) == g; ++q) {
          l.records.push_back({*q, count[*q]});
          if (classes > 1) std::copy_n(run(*q, c), CLASSES, l.runs.emplace_back().of);
          for (uint32_t* n = run(*q, c); n < run(*q, c) + classes; ++n) entry += std::exchange(*n, entry);
        }
      }
    }
  }

  l.offset.resize(entries);
  l.source.resize(entries);
  each_entry(pattern, transposed, [&](uint32_t e, uint32_t out, uint32_t in, uint32_t tap) {
    if (tap_offset[tap] < 0) return;
    const uint32_t at = run_of(out, in, tap)++;
    l.offset[at] = place[in] + uint32_t(tap_offset[tap]);
    l.source[at] = e;
  });
  return l;
}

}  // namespace sfx
