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
TileKernel find_tile(int64_t outputs, int64_t inputs, bool turned) {
  constexpr std::make_integer_sequence<int, MAX_OUTPUTS> sizes;
  if (turned) return inputs <= LANES ? find_tile<1, true>(outputs, sizes) : find_tile<PANEL_VECTORS, true>(outputs, sizes);
  return inputs <= LANES ? find_tile<1, false>(outputs, sizes) : find_tile<PANEL_VECTORS, false>(outputs, sizes);
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

// Calls body(i) for each of `width` elements of a row of a panel; most panels are whole.
template <class Body>
SFX_INLINE void each_column(int64_t width, Body body) {
  if (width == PANEL) {
#pragma omp simd
    for (int64_t i = 0; i < PANEL; ++i) body(i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) body(i);
  }
}

// Calls write(sums, row, rows, column, columns) for each tile of the sums over `depth` of a's element times b's, for all
// `rows` elements of a and all `columns` of b. write() may change the sums, [rows][PANEL].
template <class Write>
void product(const Factor& a, const Factor& b, int64_t depth, int64_t rows, int64_t columns, int threads,
             const Write& write) {
  if (!rows || !columns) return;
  const int64_t panels = ceil_div(columns, PANEL), tiles = ceil_div(rows, MAX_OUTPUTS), most = ceil_div(rows, tiles);
  const int64_t parts = std::clamp<int64_t>(ceil_div(ITEMS * threads, panels), 1, tiles);
  const int64_t held = depth * PANEL, tile = depth * most;
  const bool packs = !a.turned && a.pitch > FARTHEST;
  float* const memory = reinterpret_cast<float*>(scratch(0, held * threads * 4));
  float* const tiled = packs ? reinterpret_cast<float*>(scratch(1, tile * tiles * 4)) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (packs) {
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tiles; ++t)
        for (int64_t k = 0; k < depth; ++k)
          std::copy_n(a.data + k * a.pitch + t * most, std::min(most, rows - t * most), tiled + t * tile + k * most);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < panels * parts; ++item) {
      alignas(64) float sums[MAX_OUTPUTS * PANEL];
      float* const packed = memory + omp_get_thread_num() * held;
      const int64_t part = item % parts, first = item / parts * PANEL, width = std::min<int64_t>(PANEL, columns - first);
      pack_panel(b, first, width, depth, packed);
      for (int64_t t = part * tiles / parts; t < (part + 1) * tiles / parts; ++t) {
        const int64_t n = std::min(most, rows - t * most);
        write.ahead(t * most, n, first);
        const float* const from = packs ? tiled + t * tile : a.at(t * most);
        find_tile(n, width, a.turned)(packed, from, packs ? most : a.pitch, depth, sums);
        write(sums, t * most, n, first, width);
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
    for (int64_t k = row; k < row + rows; ++k) __builtin_prefetch(mask + k * pitch + column);
  }
  void operator()(float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    const auto streamed = [](const float* from, float* to) {
      for (int64_t i = 0; i < PANEL; i += LANES) stream(to + i, load(from + i));
    };
    for (int64_t r = row; r < row + rows; ++r, sums += PANEL) {
      const int64_t at = r * pitch + column;
      const uint8_t* const exists = mask + at;
      if (dense && past_caches)
        streamed(sums, dense + at);
      else if (dense)
        each_column(columns, [&](int64_t i) SFX_LAMBDA { dense[at + i] = sums[i]; });
      float* const to = past_caches ? sums : masked + at;
      each_column(columns, [&](int64_t i) SFX_LAMBDA { to[i] = exists[i] ? sums[i] : 0.0f; });
      if (past_caches) streamed(sums, masked + at);
    }
  }
};

// Sums as a layer's output [rows][pitch], plus bias [pitch] where there is one, then a ReLU.
struct OutputWriter {
  int64_t pitch;
  const float* bias;
  bool clamps;
  float* out;
  void ahead(int64_t, int64_t, int64_t) const {}
  void operator()(float* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t r = row; r < row + rows; ++r, sums += PANEL) {
      float* const to = out + r * pitch + column;
      if (bias) each_column(columns, [&](int64_t i) SFX_LAMBDA { sums[i] += bias[column + i]; });
      if (clamps) each_column(columns, [&](int64_t i) SFX_LAMBDA { sums[i] = sums[i] < 0.0f ? 0.0f : sums[i]; });
      each_column(columns, [&](int64_t i) SFX_LAMBDA { to[i] = sums[i]; });
    }
  }
};

}  // namespace

void linear_dense_wgrad(const float* grad, const float* x, int64_t rows, int64_t outs, int64_t ins, const uint8_t* mask,
                        float* masked, float* dense, int threads) {
  const bool past_caches = outs * ins * 4 >= STREAMED_GRAD && ins % PANEL == 0 && uintptr_t(masked) % 64 == 0 &&
                           uintptr_t(dense) % 64 == 0;
  product({grad, outs}, {x, ins}, rows, outs, ins, threads, MaskedWriter{ins, mask, masked, dense, past_caches});
}

void linear_dense_fprop(const float* x, const float* weight, int64_t rows, int64_t outs, int64_t ins, const float* bias,
                        bool relu, float* out, int threads) {
  product({x, ins, true}, {weight, ins, true}, ins, rows, outs, threads, OutputWriter{outs, bias, relu, out});
}

void linear_dense_dgrad(const float* grad, const float* weight, int64_t rows, int64_t outs, int64_t ins, float* out,
                        int threads) {
  product({grad, outs, true}, {weight, ins}, outs, rows, ins, threads, OutputWriter{ins, nullptr, false, out});
}

}  // namespace sfx
