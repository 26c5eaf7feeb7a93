// Outer products with lanes over input features: the output's gradient is packed by tiles of features and a panel of the
// input at a time, values of the gradient are broadcast, and the sums of a tile stay in registers over all rows and are
// masked as they are written.
#include <omp.h>

#include <utility>

#include "dense_wgrad.h"
#include "microkernel.h"
#include "plan.h"
#include "runtime.h"

namespace sfx {
namespace {

constexpr int PANEL_VECTORS = 2, PANEL = PANEL_VECTORS * LANES;  // input features
constexpr int MAX_OUTPUTS = REGISTERS == 32 ? 12 : 6;            // output features of a tile
constexpr int64_t ITEMS = 4;                                     // of work for each thread, about

// sums[output][PANEL] = grad * x, summed over `rows`: x [rows][PANEL], grad [rows][outputs].
using TileKernel = void (*)(const float* x, const float* grad, int64_t rows, float* sums);

template <int OUTPUTS, int VECTORS>
void tile_kernel(const float* x, const float* grad, int64_t rows, float* sums) {
  vf sum[OUTPUTS][VECTORS] = {};
  for (int64_t r = 0; r < rows; ++r, x += PANEL, grad += OUTPUTS) {
    vf in[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) in[v] = load(x + v * LANES);
#pragma GCC unroll 12
    for (int o = 0; o < OUTPUTS; ++o) {
      const vf value = splat(grad[o]);
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[o][v] += value * in[v];
    }
  }
#pragma GCC unroll 12
  for (int o = 0; o < OUTPUTS; ++o)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) store(sums + o * PANEL + v * LANES, sum[o][v]);
}

template <int VECTORS, int... O>
TileKernel find_tile(int64_t outputs, std::integer_sequence<int, O...>) {
  static constexpr TileKernel TABLE[] = {tile_kernel<O + 1, VECTORS>...};
  return TABLE[outputs - 1];
}
TileKernel find_tile(int64_t outputs, int64_t inputs) {
  constexpr std::make_integer_sequence<int, MAX_OUTPUTS> sizes;
  return inputs <= LANES ? find_tile<1>(outputs, sizes) : find_tile<PANEL_VECTORS>(outputs, sizes);
}

void pack_panel(const float* x, int64_t pitch, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r, x += pitch, out += PANEL) {
    if (width == PANEL) {
      for (int v = 0; v < PANEL_VECTORS; ++v) store(out + v * LANES, load(x + v * LANES));
    } else {
      std::memset(out, 0, PANEL * 4);
      std::memcpy(out, x, width * 4);
    }
  }
}

// [rows][width] from rows `pitch` floats apart.
void pack_tile(const float* grad, int64_t pitch, int64_t rows, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r, grad += pitch, out += width) std::copy_n(grad, width, out);
}

// Writes sums [outputs][PANEL] to rows `pitch` floats apart, of a large matrix past the caches; the sums may change.
void write_tile(float* sums, int64_t outputs, int64_t width, int64_t pitch, const uint8_t* mask, float* masked,
                float* dense, bool past_caches) {
  const auto streamed = [](const float* from, float* to) {
    for (int64_t i = 0; i < PANEL; i += LANES) stream(to + i, load(from + i));
  };
  for (int64_t o = 0; o < outputs; ++o, sums += PANEL) {
    const uint8_t* const exists = mask + o * pitch;
    if (dense && past_caches)
      streamed(sums, dense + o * pitch);
    else if (dense)
      std::memcpy(dense + o * pitch, sums, width * 4);
    float* const to = past_caches ? sums : masked + o * pitch;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) to[i] = exists[i] ? sums[i] : 0.0f;
    if (past_caches) streamed(sums, masked + o * pitch);
  }
}

}  // namespace

void linear_dense_wgrad(const float* grad, const float* x, int64_t rows, int64_t outs, int64_t ins, const uint8_t* mask,
                        float* masked, float* dense, int threads) {
  const int64_t panels = ceil_div(ins, PANEL), tiles = ceil_div(outs, MAX_OUTPUTS), outputs = ceil_div(outs, tiles);
  const int64_t parts = std::clamp<int64_t>(ceil_div(ITEMS * threads, panels), 1, tiles);
  const int64_t held = rows * PANEL;
  const bool past_caches = outs * ins * 4 >= STREAMED_GRAD && ins % PANEL == 0 && uintptr_t(masked) % 64 == 0 &&
                           uintptr_t(dense) % 64 == 0;
  float* const memory = reinterpret_cast<float*>(scratch(0, held * threads * 4));
  float* const tiled = reinterpret_cast<float*>(scratch(1, rows * outs * 4));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t o = 0; o < outs; o += outputs)
      pack_tile(grad + o, outs, rows, std::min(outputs, outs - o), tiled + o * rows);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < panels * parts; ++item) {
      alignas(64) float sums[MAX_OUTPUTS * PANEL];
      float* const packed = memory + omp_get_thread_num() * held;
      const int64_t part = item % parts, first = item / parts * PANEL, width = std::min<int64_t>(PANEL, ins - first);
      const int64_t end = std::min(outs, (part + 1) * tiles / parts * outputs);
      pack_panel(x + first, ins, rows, width, packed);
      for (int64_t o = part * tiles / parts * outputs; o < end; o += outputs) {
        const int64_t n = std::min(outputs, end - o), at = o * ins + first;
        for (int64_t k = 0; k < n; ++k) __builtin_prefetch(mask + at + k * ins);  // the product hides the way from memory
        find_tile(n, width)(packed, tiled + o * rows, rows, sums);
        write_tile(sums, n, width, ins, mask + at, masked + at, dense ? dense + at : nullptr, past_caches);
      }
    }
    if (past_caches) fence();
  }
}

}  // namespace sfx
