// Loops over strips, tiles, blocks and chunks, for any storage of activations.
#pragma once
#include <omp.h>

#include <algorithm>
#include <vector>

#include "io.h"
#include "plan.h"
#include "runtime.h"

namespace sfx {

// out[n] = value of each entry in list order, from `values` in Pattern order.
inline void permute(const Lists& lists, const float* values, float* out, int threads) {
  const int64_t n = lists.entries();
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > FORK_ENTRIES) schedule(static)
  for (int64_t k = 0; k < n; ++k) out[k] = values[lists.source[k]];
}

inline TileAt strip_at(const PhasePlan& p, int64_t strip) {
  const int64_t x = strip % p.strips_x, y = strip / p.strips_x % p.strips_y, b = strip / (p.strips_x * p.strips_y);
  return {y * p.tiling.strip_rows * p.tiling.rows, x * p.tiling.strip_cols * p.tiling.cols, b * p.tiling.batch};
}

// The k-th tile of a strip, and where its input starts in the strip's packing.
inline TileAt tile_at(const PhasePlan& p, TileAt strip, int64_t k) {
  const int64_t y = k / p.tiling.strip_cols, x = k % p.tiling.strip_cols;
  return {strip.y + y * p.tiling.rows, strip.x + x * p.tiling.cols, strip.batch};
}
inline int64_t tile_offset(const PhasePlan& p, int64_t k) {
  const int64_t y = k / p.tiling.strip_cols, x = k % p.tiling.strip_cols;
  return y * p.tiling.rows * p.row_bytes + x * p.tiling.cols * p.cell_bytes;
}

// fprop, and dgrad with the roles exchanged: every output of the pass is written once.
template <class In, class Out>
void run_gather(const PassPlan& pass, const In& in, const Out& out, const float* values, Epilogue epilogue,
                int threads) {
  int64_t items = 0, entries = 0, packed = 0, sums = 0;
  std::vector<int64_t> first_item, first_value;
  for (const PhasePlan& p : pass.phases) {
    first_item.push_back(items);
    first_value.push_back(entries);
    items += p.strips() * p.lists.blocks;
    entries += p.lists.entries();
    const int64_t channels = p.one_tile() ? p.lists.chunk : int64_t(p.lists.live.size());
    packed = std::max(packed, align64(p.packed_bytes(channels)));
    sums = std::max(sums, align64(p.lists.block * p.tile_bytes()));
  }
  float* value = reinterpret_cast<float*>(scratch(0, entries * 4 + 64));
  for (size_t i = 0; i < pass.phases.size(); ++i)
    permute(pass.phases[i].lists, values, value + first_value[i], threads);
  char* memory = scratch(1, (packed + sums) * threads + 64);
  const int64_t turn = std::clamp<int64_t>(items / (8 * threads), 1, 16);

#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, turn)
  for (int64_t item = 0; item < items; ++item) {
    const size_t phase = std::upper_bound(first_item.begin(), first_item.end(), item) - first_item.begin() - 1;
    const PhasePlan& p = pass.phases[phase];
    const Lists& lists = p.lists;
    const int64_t block = (item - first_item[phase]) % lists.blocks;
    const TileAt strip = strip_at(p, (item - first_item[phase]) / lists.blocks);
    char* x = memory + omp_get_thread_num() * (packed + sums);
    char* acc = x + packed;
    int64_t table[MAX_TILE];
    const int64_t c0 = block * lists.block, width = std::min(lists.block, lists.outputs - c0);
    const int64_t live = int64_t(lists.live.size()), last = first_item[phase] + p.strips() * lists.blocks - 1;
    const TileAt next_strip = strip_at(p, (std::min(item + 1, last) - first_item[phase]) / lists.blocks);
    // The first phase leaves the input in L3 for the others, where fetching ahead costs more than it saves.
    const bool fetches = phase == 0, moves = fetches && (item + 1) % turn && item < last;
    Ahead ahead;
    if (!p.one_tile()) {
      in.pack(x, lists.live.data(), live, p, strip);
      if (moves && block == lists.blocks - 1) ahead = in.ahead(lists.live.data(), live, p, next_strip);
      const Cell* cells = lists.cells.data() + block * lists.chunks;
      ahead.start(int64_t(cells[lists.chunks - 1].record[GROUPS] - cells[0].record[0]) * p.tiling.strip_rows *
                  p.tiling.strip_cols);
    }
    for (int64_t k = 0; k < p.tiling.strip_rows * p.tiling.strip_cols; ++k) {
      const TileAt tile = tile_at(p, strip, k);
      if (tile.y >= p.y.count || tile.x >= p.x.count) continue;
      const char* base = x + tile_offset(p, k);
      Sink sink;
      const bool direct = out.sink(&sink, table, c0, p, tile, epilogue);
      for (int64_t c = 0; c < lists.chunks; ++c) {
        const Cell& cell = lists.cells[block * lists.chunks + c];
        if (cell.records() == 0) continue;
        const char* from = base;
        if (p.one_tile()) {
          const int64_t first = c * lists.chunk, next = (c + 1) % lists.chunks * lists.chunk;
          in.pack(x, lists.live.data() + first, std::min(lists.chunk, live - first), p, strip);
          ahead = fetches && (next || moves) ? in.ahead(lists.live.data() + next, std::min(lists.chunk, live - next),
                                                        p, next ? strip : next_strip)
                                             : Ahead();
          ahead.start(cell.records());
        } else {
          from += c * lists.chunk * p.channel_bytes;
        }
        for (int g = 0; g < GROUPS; ++g)
          p.kernel->fma(from, p.row_bytes, lists.records.data() + cell.record[g], lists.runs_at(cell.record[g]),
                        cell.record[g + 1] - cell.record[g], lists.offset.data() + cell.entry[g],
                        value + first_value[phase] + cell.entry[g], acc, g == WHOLE || g == OPENING,
                        direct && (g == WHOLE || g == CLOSING) ? &sink : nullptr, ahead);
      }
      if (direct) {
        if (sink.past_caches) fence();
      } else {
        out.unpack(acc, c0, width, p, tile, epilogue);
      }
    }
  }
}

// out[entry] = that of its slot, for the entries of cells [c0, c1) of a block.
inline void take_entries(const PhasePlan& p, const Cell* cells, int64_t c0, int64_t c1, const float* partial,
                         float* out) {
  const int64_t group = p.kernel->group;
  for (uint32_t r = cells[c0].record[0]; r < cells[c1 - 1].record[GROUPS]; ++r) {
    const uint32_t count = p.lists.records[r].count;
    for (uint32_t i = 0; i < count; ++i) out[i] = partial[i];
    out += count;
    partial += ceil_div(count, group) * group;
  }
}

// With more chunks than this the gradient of the output is packed: it is read again for each, and channels that lie a
// multiple of 4 KiB apart evict each other.
constexpr int64_t IN_PLACE_CHUNKS = 8;

// Gradient of existing weights, in Pattern order, summed over splits in a fixed order: the result depends on the
// number of threads only.
template <class In, class Grad>
void run_dot(const PassPlan& pass, const In& in, const Grad& grad, float* values, int threads) {
  const PhasePlan& p = pass.phases[0];
  const Lists& lists = p.lists;
  struct Unit {
    int64_t block, chunk0, chunk1;
  };
  const int64_t entries = lists.entries(), strips = p.strips();
  // As many units as threads share evenly, of about equal sizes; one where strips can be shared instead.
  const int64_t least = std::max<int64_t>(1, ceil_div(lists.slots() * 4, partial_budget()));
  const int64_t wanted = least == 1 && strips > 1 ? 1 : ceil_div(least, threads) * threads;
  std::vector<Unit> units;
  int64_t most = 0;
  for (int64_t b = 0; b < lists.blocks; ++b) {
    const Cell* cells = lists.cells.data() + b * lists.chunks;
    const int64_t e0 = cells[0].entry[0], n = cells[lists.chunks - 1].entry[GROUPS] - e0;
    const int64_t parts = std::max<int64_t>(1, (n * wanted + entries / 2) / std::max<int64_t>(1, entries));
    int64_t c0 = 0, before = 0;
    for (int64_t c = 0; c < lists.chunks; ++c) {
      const int64_t size = cells[c].entry[GROUPS] - e0 - before;
      if (size == 0 || (c + 1 < lists.chunks && (before + size) * parts < n * (before * parts / n + 1))) continue;
      units.push_back({b, c0, c + 1});
      most = std::max(most, cells[c].slot + cells[c].slots - cells[c0].slot);
      before += size;
      c0 = c + 1;
    }
  }
  const int64_t n_units = int64_t(units.size());
  // Each split starts by waiting for memory: more of them than threads would cost more than they balance.
  const int64_t splits = std::clamp<int64_t>(n_units >= 4 * threads ? 1 : threads, 1, strips);
  const int64_t channels = p.one_tile() ? lists.chunk : int64_t(lists.live.size());
  const int64_t packed = align64(p.packed_bytes(channels)), held = align64(lists.block * p.tile_bytes());
  const int64_t each = packed + held + align64((most + LANES) * 4);
  float* result = reinterpret_cast<float*>(scratch(0, splits * entries * 4 + 64));
  char* memory = scratch(1, each * threads + 64);

#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t item = 0; item < n_units * splits; ++item) {
    const Unit unit = units[item / splits];
    const int64_t split = item % splits;
    char* x = memory + omp_get_thread_num() * each;
    char* g = x + packed;
    float* partial = reinterpret_cast<float*>(g + held);
    const Cell* cells = lists.cells.data() + unit.block * lists.chunks;
    const int64_t slot = cells[unit.chunk0].slot, n = cells[unit.chunk1 - 1].slot + cells[unit.chunk1 - 1].slots - slot;
    const int64_t c0 = unit.block * lists.block, width = std::min(lists.block, lists.outputs - c0);
    std::memset(partial, 0, (n + LANES) * 4);
    const int64_t last = strips * (split + 1) / splits - 1, tiles = p.tiling.strip_rows * p.tiling.strip_cols;
    for (int64_t s = strips * split / splits; s <= last; ++s) {
      const TileAt strip = strip_at(p, s), next_strip = strip_at(p, std::min(s + 1, last));
      const int64_t live = int64_t(lists.live.size()), first = unit.chunk0 * lists.chunk;
      const int64_t records = cells[unit.chunk1 - 1].record[GROUPS] - cells[unit.chunk0].record[0];
      Fetches fetches;
      if (!p.one_tile()) {
        const int64_t n_live = std::min(unit.chunk1 * lists.chunk, live) - first;
        in.pack(x, lists.live.data() + first, n_live, p, strip);
        if (s < last) fetches.input = in.ahead(lists.live.data() + first, n_live, p, next_strip);
        fetches.input.start(records * tiles);
      }
      for (int64_t k = 0; k < tiles; ++k) {
        const TileAt tile = tile_at(p, strip, k);
        if (tile.y >= p.y.count || tile.x >= p.x.count) continue;
        int64_t channel_pitch = p.tile_bytes(), row_pitch = p.tiling.cols * p.cell_bytes;
        const char* held_g = nullptr;
        if (unit.chunk1 - unit.chunk0 <= IN_PLACE_CHUNKS) held_g = grad.tile_in_place(c0, p, tile, &channel_pitch, &row_pitch);
        if (!held_g) {
          grad.pack_tile(g, c0, width, p, tile);
          held_g = g;
        }
        fetches.grad = grad.ahead_tile(c0, width, p, k + 1 < tiles ? tile_at(p, strip, k + 1) : next_strip);
        fetches.grad.start(records);
        const char* base = x + tile_offset(p, k);
        for (int64_t c = unit.chunk0; c < unit.chunk1; ++c) {
          const Cell& cell = cells[c];
          if (cell.entry[GROUPS] == cell.entry[0]) continue;
          const char* from = base;
          if (p.one_tile()) {
            const bool wraps = c + 1 == unit.chunk1;
            const int64_t at = c * lists.chunk, next = wraps ? first : at + lists.chunk;
            in.pack(x, lists.live.data() + at, std::min(lists.chunk, live - at), p, strip);
            fetches.input = !wraps || s < last ? in.ahead(lists.live.data() + next, std::min(lists.chunk, live - next),
                                                          p, wraps ? next_strip : strip)
                                               : Ahead();
            fetches.input.start(cell.records());
          } else {
            from += (c - unit.chunk0) * lists.chunk * p.channel_bytes;
          }
          p.kernel->dot(from, p.row_bytes, lists.records.data() + cell.record[0], lists.runs_at(cell.record[0]),
                        cell.records(), lists.offset.data() + cell.entry[0], held_g, channel_pitch, row_pitch,
                        partial + (cell.slot - slot), fetches);
        }
      }
    }
    take_entries(p, cells, unit.chunk0, unit.chunk1, partial, result + split * entries + cells[unit.chunk0].entry[0]);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1 && entries > FORK_ENTRIES) schedule(static)
  for (int64_t k = 0; k < entries; ++k) {
    float total = 0;
    for (int64_t s = 0; s < splits; ++s) total += result[s * entries + k];
    values[lists.source[k]] = total;
  }
}

}  // namespace sfx
