// Outer products with lanes over output channels: the output's gradient is transposed a tile at a time, values of the
// input are broadcast, and a panel of sums stays in registers for the whole tile.
#include "dense_wgrad.h"

#include <utility>

#include "microkernel.h"
#include "outer_products.h"
#include "transpose.h"

namespace sfx {
namespace {

constexpr int MOST_INPUTS = REGISTERS == 32 ? 12 : 6;  // input channels of a panel of sums
constexpr int64_t CELL = BLOCK * PANEL;                // floats of a position's gradient in a panel

// sums[input][output] += x * grad over the walk: x [..][inputs][16], grad [..][16][PANEL].
using OuterKernel = void (*)(const char* x, const char* grad, const Walk& walk, float* sums);

template <int INPUTS, int VECTORS>
void outer_kernel(const char* x, const char* grad, const Walk& walk, float* sums) {
  const int64_t step = walk.x_column / 4;
  vf sum[INPUTS][VECTORS] = {};
  for (int64_t b = 0; b < walk.blocks; ++b)
    for (int64_t r = 0; r < walk.rows; ++r) {
      const float* xp = reinterpret_cast<const float*>(x + b * walk.x_block + r * walk.x_row);
      const float* gp = reinterpret_cast<const float*>(grad + b * walk.g_block + r * walk.g_row);
      for (int64_t k = 0; k < walk.columns; ++k, xp += step, gp += CELL)
#pragma GCC unroll 4
        for (int i = 0; i < BLOCK; ++i) {
          vf g[VECTORS];
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) g[v] = load(gp + i * PANEL + v * LANES);
#pragma GCC unroll 12
          for (int c = 0; c < INPUTS; ++c) {
            const vf value = splat(xp[c * BLOCK + i]);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v) sum[c][v] += value * g[v];
          }
        }
    }
#pragma GCC unroll 12
  for (int c = 0; c < INPUTS; ++c)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* to = sums + c * PANEL + v * LANES;
      store(to, load(to) + sum[c][v]);
    }
}

template <int VECTORS, int... I>
OuterKernel find_outer(int64_t inputs, std::integer_sequence<int, I...>) {
  static constexpr OuterKernel TABLE[] = {outer_kernel<I + 1, VECTORS>...};
  return TABLE[inputs - 1];
}
OuterKernel find_outer(int64_t inputs, int64_t outputs) {
  constexpr std::make_integer_sequence<int, MOST_INPUTS> sizes;
  return outputs <= LANES ? find_outer<1>(inputs, sizes) : find_outer<PANEL_VECTORS>(inputs, sizes);
}

// Of `n` output channels from `grad` on, whose rows of `columns` positions lie `channel` floats apart:
// [columns][16][PANEL], zero for the channels up to a multiple of LANES.
void pack_grad(const float* grad, int64_t channel, int64_t n, int64_t columns, float* out) {
  for (int64_t k0 = 0; k0 < n; k0 += LANES)
    for (int64_t x = 0; x < columns; ++x)
      for (int v = 0; v < VECS; ++v) {
        vf m[LANES];
        for (int i = 0; i < LANES; ++i)
          m[i] = k0 + i < n ? load(grad + (k0 + i) * channel + x * BLOCK + v * LANES) : vf{};
        transpose(m);
        for (int i = 0; i < LANES; ++i) store(out + x * CELL + (v * LANES + i) * PANEL + k0, m[i]);
      }
}

// [columns][n][16] of `n` input channels, whose rows lie `channel` floats apart.
void pack_rows(const float* x, int64_t channel, int64_t n, int64_t columns, float* out) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t k = 0; k < columns; ++k)
      for (int v = 0; v < VECS; ++v)
        store(out + (k * n + c) * BLOCK + v * LANES, load(x + c * channel + k * BLOCK + v * LANES));
}

// Vectors of the processor.
struct Vectors {
  struct Thread {
    Thread() {}
  };
  static constexpr int64_t DEPTH = 1, MAX_INPUTS = MOST_INPUTS, INPUT_STEP = 1, GRAD_CELL = CELL * 4;
  static int64_t input_cell(int64_t n) { return n * BLOCK * 4; }
  static void pack_grad(const float* from, int64_t channel, int64_t, bool, int64_t n, int64_t positions, char* out) {
    sfx::pack_grad(from, channel, n, positions, reinterpret_cast<float*>(out));
  }
  static void pack_input(const float* from, int64_t channel, int64_t, bool, int64_t n, int64_t positions, char* out) {
    pack_rows(from, channel, n, positions, reinterpret_cast<float*>(out));
  }
  static void multiply(int64_t inputs, int64_t outputs, const char* x, const char* grad, const Walk& walk, float* sums) {
    find_outer(inputs, outputs)(x, grad, walk, sums);
  }
};

}  // namespace

void dense_wgrad(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                 bool channels_last, float* out, int threads) {
  const int64_t panels = shape.taps() < 4 ? 8 : 2;  // packing the input costs more the fewer taps read it
  outer_products<Vectors>(shape, grad, x, blocks, h, w, panels, channels_last, out, threads);
}

}  // namespace sfx
