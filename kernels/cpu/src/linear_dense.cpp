// Dense products of linear layers. Of one factor tiles are read, of the other a panel is packed at a time: the tile's
// values are broadcast, lanes are columns of the panel, and the sums of a tile stay in registers from the first product to
// the last and are masked, or given a bias and clamped, as they are written.
#include <omp.h>

#include <utility>

#include "dense_wgrad.h"
#include "microkernel.h"
#include "plan.h"
#include "runtime.h"
#include "transpose.h"

namespace sfx {
namespace {

constexpr int PANEL_VECTORS = 2, PANEL = PANEL_VECTORS * LANES;
constexpr int MAX_OUTPUTS = REGISTERS == 32 ? 12 : 6;            // rows of a tile
constexpr int64_t FARTHEST = 512;                                // floats between a tile's rows; farther ones share L1's sets
constexpr int64_t ITEMS = 4;                                     // of work for each thread, about
constexpr int64_t PANELS_BUDGET = 512 << 10;                     // bytes of panels that a thread packs together

// One factor of a product, summed over `k`: element (k, i) lies at k * pitch + i, or, if `turned`, at i * pitch + k.
struct Factor {
  const float* data;
  int64_t pitch;
  bool turned = false;
  const float* at(int64_t i) const { return data + (turned ? i * pitch : i); }
};

// sums[output][PANEL] = tile * panel, summed over `depth`: panel [depth][PANEL], tile a factor's.
using TileKernel = void (*)(const float* panel, const float* tile, int64_t pitch, int64_t depth, float* sums);

template <int OUTPUTS, int VECTORS, bool TURNED>
void tile_kernel(const float* panel, const float* tile, int64_t pitch, int64_t depth, float* sums) {
  vf sum[OUTPUTS][VECTORS] = {};
  for (int64_t k = 0; k < depth; ++k, panel += PANEL, tile += TURNED ? 1 : pitch) {
    vf in[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) in[v] = load(panel + v * LANES);
#pragma GCC unroll 12
    for (int o = 0; o < OUTPUTS; ++o) {
      const vf value = splat(tile[TURNED ? o * pitch : o]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[o][v] += value * in[v];
    }
  }
#pragma GCC unroll 12
  for (int o = 0; o < OUTPUTS; ++o)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(sums + o * PANEL + v * LANES, sum[o][v]);
}

template <int VECTORS, bool TURNED, int... O>
TileKernel find_tile(int64_t outputs, std::integer_sequence<int, O...>) {
  static constexpr TileKernel TABLE[] = {tile_kernel<O + 1, VECTORS, TURNED>...};
  return TABLE[outputs - 1];
}
template <bool TURNED>
TileKernel find_tile(int64_t outputs, int64_t inputs) {
  constexpr std::make_integer_sequence<int, MAX_OUTPUTS> sizes;
  return inputs <= LANES ? find_tile<1, TURNED>(outputs, sizes) : find_tile<PANEL_VECTORS, TURNED>(outputs, sizes);
}

// Packs elements [first, first + width) of each k, zero up to PANEL.
void pack_panel(const Factor& f, int64_t first, int64_t width, int64_t depth, float* out) {
  const float* from = f.at(first);
  if (width < PANEL) std::memset(out, 0, depth * PANEL * 4);
  if (!f.turned) {
    const bool whole = width == PANEL;
    for (int64_t k = 0; k < depth; ++k, from += f.pitch, out += PANEL)
      whole ? std::memcpy(out, from, PANEL * 4) : std::memcpy(out, from, width * 4);  // a size that is known is no call
    return;
  }
  for (int64_t v = 0; v < width; v += LANES, from += LANES * f.pitch) {
    const int64_t n = std::min<int64_t>(LANES, width - v);
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
      vf r[LANES];
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) r[i] = i < n ? load(from + i * f.pitch + k) : vf{};
      transpose(r);
#pragma GCC unroll 16
      for (int64_t i = 0; i < LANES; ++i) store(out + (k + i) * PANEL + v, r[i]);
    }
    for (; k < depth; ++k)
      for (int64_t i = 0; i < n; ++i) out[k * PANEL + v + i] = from[i * f.pitch + k];
  }
}

// Both products call write(sums, row, rows, column, columns) for each tile of the sums over `depth` of a's element times
// b's, for all `rows` elements of a and all `columns` of b; sums are [rows][PANEL]. Threads take equal parts, the same at
// each call: a thread finds in its cache what it, or the optimizer on its core, had before.

// A thread has some columns. `a` is turned.
template <class Write>
void product_by_columns(const Factor& a, const Factor& b, int64_t depth, int64_t rows, int64_t columns, int threads,
                        const Write& write) {
  if (!rows || !columns) return;
  const int64_t panels = ceil_div(columns, PANEL), tiles = ceil_div(rows, MAX_OUTPUTS), most = ceil_div(rows, tiles);
  const int64_t parts = std::clamp<int64_t>(ceil_div(ITEMS * threads, panels), 1, tiles), held = depth * PANEL;
  float* const memory = reinterpret_cast<float*>(scratch(0, held * threads * 4));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t item = 0; item < panels * parts; ++item) {
    alignas(64) float sums[MAX_OUTPUTS * PANEL];
    float* const packed = memory + omp_get_thread_num() * held;
    const int64_t part = item % parts, first = item / parts * PANEL, width = std::min<int64_t>(PANEL, columns - first);
    pack_panel(b, first, width, depth, packed);
    for (int64_t t = part * tiles / parts; t < (part + 1) * tiles / parts; ++t) {
      const int64_t n = std::min(most, rows - t * most);
      find_tile<true>(n, width)(packed, a.at(t * most), a.pitch, depth, sums);
      write(sums, t * most, n, first, width);
    }
  }
}

// A thread has some rows, and packs all of b for itself: handing panels from core to core takes longer.
template <class Write>
void product_by_rows(const Factor& a, const Factor& b, int64_t depth, int64_t rows, int64_t columns, int threads,
                     const Write& write) {
  if (!rows || !columns) return;
  const int64_t panels = ceil_div(columns, PANEL), held = depth * PANEL;
  const int64_t together = std::clamp<int64_t>(PANELS_BUDGET / (held * 4 + 1), 1, panels);
  const bool packs = a.pitch > FARTHEST;
  float* const memory = reinterpret_cast<float*>(scratch(0, together * held * threads * 4));
  float* const tiled = packs ? reinterpret_cast<float*>(scratch(1, depth * rows * 4)) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) float sums[MAX_OUTPUTS * PANEL];
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t r0 = rows * thread / team, r1 = rows * (thread + 1) / team;
    const int64_t most = ceil_div(r1 - r0, std::max<int64_t>(1, ceil_div(r1 - r0, MAX_OUTPUTS)));
    float* const packed = memory + thread * together * held;
    for (int64_t r = r0; r < r1 && packs; r += most)
      for (int64_t k = 0, n = std::min(most, r1 - r); k < depth; ++k)
        std::copy_n(a.at(r) + k * a.pitch, n, tiled + r * depth + k * n);
    for (int64_t p0 = 0; p0 < panels && r0 < r1; p0 += together) {
      const int64_t p1 = std::min(panels, p0 + together);
      for (int64_t p = p0; p < p1; ++p)
        pack_panel(b, p * PANEL, std::min<int64_t>(PANEL, columns - p * PANEL), depth, packed + (p - p0) * held);
      for (int64_t r = r0; r < r1; r += most) {
        const int64_t n = std::min(most, r1 - r);
        const float* const tile = packs ? tiled + r * depth : a.at(r);
        for (int64_t p = p0; p < p1; ++p) {
          const int64_t first = p * PANEL, width = std::min<int64_t>(PANEL, columns - first);
          write.ahead(r, n, first);
          find_tile<false>(n, width)(packed + (p - p0) * held, tile, packs ? n : a.pitch, depth, sums);
          write(sums, r, n, first, width);
        }
      }
    }
    fence();
  }
}

// Sums as a masked gradient [rows][pitch], of a large matrix past the caches: see linear_dense_wgrad.
struct MaskedWriter {
  int64_t pitch;
  const uint8_t* mask;
  float *masked, *dense;
  bool past_caches;
  void ahead(int64_t row, int64_t rows, int64_t column) const {  // the product hides the way from memory
    for (int64_t at = row * pitch + column; at < (row + rows) * pitch; at += pitch) {
      __builtin_prefetch(mask + at);
      for (int64_t i = 0; i < PANEL && !past_caches; i += LANES) {
        __builtin_prefetch(masked + at + i, 1);
        if (dense) __builtin_prefetch(dense + at + i, 1);
      }
    }
  }
  void operator()(const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    past_caches ? write<true>(sums, row, rows, column, columns) : write<false>(sums, row, rows, column, columns);
  }
  template <bool PAST>
  void write(const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const auto put = [](float* to, vf v) SFX_LAMBDA { PAST ? stream(to, v) : store(to, v); };
    for (int64_t r = row; r < row + rows; ++r, sums += PANEL) {
      const int64_t at = r * pitch + column;
      int64_t i = 0;
      for (; i + LANES <= columns; i += LANES) {
        const vf sum = load(sums + i);
        if (dense) put(dense + at + i, sum);
        put(masked + at + i, keep(sum, mask + at + i));
      }
      for (; i < columns; ++i) {
        if (dense) dense[at + i] = sums[i];
        masked[at + i] = mask[at + i] ? sums[i] : 0.0f;
      }
    }
  }
};

// Sums as a layer's output [rows][pitch], plus bias [pitch] where there is one, then a ReLU.
struct OutputWriter {
  int64_t pitch;
  const float* bias;
  bool clamps;
  float* out;
  void operator()(const float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t r = row; r < row + rows; ++r, sums += PANEL) {
      float* const to = out + r * pitch + column;
      int64_t i = 0;
      for (; i + LANES <= columns; i += LANES) {
        const vf sum = bias ? load(sums + i) + load(bias + column + i) : load(sums + i);
        store(to + i, clamps ? relu(sum) : sum);
      }
      for (; i < columns; ++i) {
        const float sum = bias ? sums[i] + bias[column + i] : sums[i];
        to[i] = clamps && sum < 0.0f ? 0.0f : sum;
      }
    }
  }
};

}  // namespace

void linear_dense_wgrad(const float* grad, const float* x, int64_t rows, int64_t outs, int64_t ins, const uint8_t* mask,
                        float* masked, float* dense, int threads) {
  const bool past_caches = outs * ins * 4 >= STREAMED_GRAD && ins % PANEL == 0 && uintptr_t(masked) % 64 == 0 &&
                           uintptr_t(dense) % 64 == 0;
  product_by_rows({grad, outs}, {x, ins}, rows, outs, ins, threads, MaskedWriter{ins, mask, masked, dense, past_caches});
}

void linear_dense_fprop(const float* x, const float* weight, int64_t rows, int64_t outs, int64_t ins, const float* bias,
                        bool relu, float* out, int threads) {
  product_by_columns({x, ins, true}, {weight, ins, true}, ins, rows, outs, threads, OutputWriter{outs, bias, relu, out});
}

void linear_dense_dgrad(const float* grad, const float* weight, int64_t rows, int64_t outs, int64_t ins, float* out,
                        int threads) {
  product_by_columns({grad, outs, true}, {weight, ins}, outs, rows, ins, threads, OutputWriter{ins, nullptr, false, out});
}

}  // namespace sfx
