// Outer products with lanes over output channels: the output's gradient is transposed a tile at a time, values of the
// input are broadcast, and a panel of sums stays in registers for the whole tile.
#include "dense_wgrad.h"

#include <utility>

#include "microkernel.h"
#include "outer_products.h"
#include "transpose.h"

namespace sfx {
namespace {

constexpr int MAX_INPUTS = REGISTERS == 32 ? 12 : 6;  // input channels of a panel of sums
constexpr int64_t GRAD_CELL = BLOCK * PANEL;          // floats of a position's gradient in a panel

// Positions that a panel of sums runs over; pitches in floats.
struct Walk {
  int64_t blocks, rows, columns;
  int64_t x_block, x_row, x_column, g_block, g_row;
};
// sums[input][output] += x * grad over the walk: x [..][inputs][16], grad [..][16][PANEL].
using OuterKernel = void (*)(const float* x, const float* grad, const Walk& walk, float* sums);

template <int INPUTS, int VECTORS>
void outer_kernel(const float* x, const float* grad, const Walk& walk, float* sums) {
  vf sum[INPUTS][VECTORS] = {};
  for (int64_t b = 0; b < walk.blocks; ++b)
    for (int64_t r = 0; r < walk.rows; ++r) {
      const float* xp = x + b * walk.x_block + r * walk.x_row;
      const float* gp = grad + b * walk.g_block + r * walk.g_row;
      for (int64_t k = 0; k < walk.columns; ++k, xp += walk.x_column, gp += GRAD_CELL)
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
  constexpr std::make_integer_sequence<int, MAX_INPUTS> sizes;
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
        for (int i = 0; i < LANES; ++i) store(out + x * GRAD_CELL + (v * LANES + i) * PANEL + k0, m[i]);
      }
}

// [columns][n][16] of `n` input channels, whose rows lie `channel` floats apart.
void pack_rows(const float* x, int64_t channel, int64_t n, int64_t columns, float* out) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t k = 0; k < columns; ++k)
      for (int v = 0; v < VECS; ++v)
        store(out + (k * n + c) * BLOCK + v * LANES, load(x + c * channel + k * BLOCK + v * LANES));
}

// Floats of what a thread packs: the gradient of a panel, and the input of one.
int64_t panel_grad(const Cut& cut) { return cut.tile_blocks * cut.rows * cut.out_w * GRAD_CELL; }
int64_t panel_input(const Cut& cut) { return cut.tile_blocks * cut.input_rows() * cut.w * cut.inputs * BLOCK; }

// sums += those of a unit over one tile.
void add_tile(const Cut& cut, const Place& at, const float* grad, const float* x, float* packed, float* sums) {
  const ConvShape& s = cut.s;
  const int64_t h = cut.h, w = cut.w, out_w = cut.out_w, g_block = at.y.size() * out_w * GRAD_CELL;
  for (int64_t p = 0; p < at.panels; ++p)
    for (int64_t b = 0; b < at.blocks; ++b) {
      const int64_t first = at.k.first + p * PANEL, channel = (at.block + b) * s.out + at.group * cut.outs + first;
      pack_grad(grad + (channel * cut.out_h + at.y.first) * out_w * BLOCK, cut.out_h * out_w * BLOCK,
                std::min<int64_t>(PANEL, at.k.end - first), at.y.size() * out_w,
                packed + p * panel_grad(cut) + b * g_block);
    }
  float* const packed_x = packed + cut.unit_panels * panel_grad(cut);
  for (int64_t c0 = 0; c0 < cut.ins; c0 += cut.inputs) {
    const int64_t n = std::min(cut.inputs, cut.ins - c0), cell = n * BLOCK, x_block = at.in_y.size() * w * cell;
    for (int64_t b = 0; b < at.blocks; ++b) {
      const int64_t channel = (at.block + b) * s.in + at.group * cut.ins + c0;
      pack_rows(x + (channel * h + at.in_y.first) * w * BLOCK, h * w * BLOCK, n, at.in_y.size() * w,
                packed_x + b * x_block);
    }
    for (int64_t r = 0; r < s.kernel[0]; ++r)
      for (int64_t q = 0; q < s.kernel[1]; ++q, sums += cut.unit_panels * cut.panel_sums()) {
        const Range ys = reading(s, 0, r, h, at.y), xs = reading(s, 1, q, w, {0, out_w});
        if (ys.size() <= 0 || xs.size() <= 0) continue;
        const int64_t from_y = ys.first * s.stride[0] + r * s.dilation[0] - s.pad[0] - at.in_y.first;
        const int64_t from_x = xs.first * s.stride[1] + q * s.dilation[1] - s.pad[1];
        const float* const g = packed + ((ys.first - at.y.first) * out_w + xs.first) * GRAD_CELL;
        const Walk walk{at.blocks, ys.size(), xs.size(), x_block, s.stride[0] * w * cell, s.stride[1] * cell,
                        g_block, out_w * GRAD_CELL};
        for (int64_t p = 0; p < at.panels; ++p)
          find_outer(n, at.k.size() - p * PANEL)(packed_x + (from_y * w + from_x) * cell, g + p * panel_grad(cut), walk,
                                                 sums + p * cut.panel_sums());
      }
  }
}

struct NoState {
  NoState() {}
};

}  // namespace

void dense_wgrad(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                 bool channels_last, float* out, int threads) {
  const int64_t panels = shape.taps() < 4 ? 8 : 2;  // packing the input costs more the fewer taps read it
  const Cut cut(shape, blocks, h, w, MAX_INPUTS, 1, panels, threads);
  const int64_t held = (cut.unit_panels * panel_grad(cut) + panel_input(cut)) * 4;
  sum_tiles<NoState>(cut, held, channels_last, out, threads, [&](const Place& at, char* packed, float* sums) {
    add_tile(cut, at, grad, x, reinterpret_cast<float*>(packed), sums);
  });
}

}  // namespace sfx
