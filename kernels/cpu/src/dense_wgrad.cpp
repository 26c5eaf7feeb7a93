// Outer products with lanes over output channels: the output's gradient is transposed a tile at a time, values of the
// input are broadcast, and a panel of sums stays in registers for the whole tile.
#include "dense_wgrad.h"

#include <omp.h>

#include <utility>

#include "microkernel.h"
#include "plan.h"
#include "runtime.h"
#include "transpose.h"

namespace sfx {
namespace {

constexpr int PANEL_VECTORS = 2, PANEL = PANEL_VECTORS * LANES;  // output channels
constexpr int MAX_INPUTS = REGISTERS == 32 ? 12 : 6;             // input channels of a panel of sums
constexpr int64_t PANEL_POSITIONS = 128;  // panels of a unit times positions of a tile, about: 256 KB of packed gradient
constexpr int64_t ITEMS = 8;           // of work for each thread, about
constexpr int64_t SUMS_BUDGET = 64 << 20;
constexpr int64_t GRAD_CELL = BLOCK * PANEL;  // floats of a position's gradient in a panel
constexpr int64_t SUMS = MAX_INPUTS * PANEL;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

struct Range {
  int64_t first, end;
  int64_t size() const { return end - first; }
};
// The outputs of `within` for which a tap reads inside the input.
Range reading(const ConvShape& s, int axis, int64_t tap, int64_t size, Range within) {
  const int64_t shift = s.pad[axis] - tap * s.dilation[axis];  // output o reads o * stride - shift
  const int64_t first = shift > 0 ? ceil_div(shift, s.stride[axis]) : 0;
  const int64_t end = size + shift > 0 ? ceil_div(size + shift, s.stride[axis]) : 0;
  return {std::max(within.first, first), std::min(within.end, end)};
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

// [columns][n][16] of `n` input channels.
void pack_row(const float* x, int64_t channel, int64_t n, int64_t columns, float* out) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t k = 0; k < columns; ++k)
      for (int v = 0; v < VECS; ++v)
        store(out + (k * n + c) * BLOCK + v * LANES, load(x + c * channel + k * BLOCK + v * LANES));
}

}  // namespace

void dense_wgrad(const ConvShape& s, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                 bool channels_last, float* out, int threads) {
  const int64_t out_h = out_size(s, 0, h), out_w = out_size(s, 1, w), taps = s.taps();
  const int64_t ins = s.in / s.groups, outs = s.out / s.groups;
  const int64_t input_panels = ceil_div(ins, MAX_INPUTS), inputs = ceil_div(ins, input_panels);
  // Panels of a unit share a packed input, which costs more the fewer taps read it; the more positions a tile has, the
  // less often sums are read.
  const int64_t unit_panels = taps < 4 ? 8 : 2, unit_outs = unit_panels * PANEL;
  const int64_t group_units = ceil_div(outs, unit_outs), units = s.groups * group_units;
  int64_t rows = 0, tile_blocks = 0, row_tiles = 0, tiles = 0;
  for (int64_t positions = PANEL_POSITIONS / unit_panels; positions && tiles * units < 2 * threads; positions /= 2) {
    rows = std::clamp<int64_t>(positions / out_w, 1, out_h);
    tile_blocks = std::clamp<int64_t>(positions / (out_h * out_w), 1, blocks);
    row_tiles = ceil_div(out_h, rows);
    tiles = row_tiles * ceil_div(blocks, tile_blocks);
  }
  const int64_t unit_sums = input_panels * taps * unit_panels * SUMS;
  const int64_t splits = std::clamp<int64_t>(
      std::min(ceil_div(ITEMS * threads, units), SUMS_BUDGET / (4 * units * unit_sums)), 1, tiles);
  const int64_t panel_grad = tile_blocks * rows * out_w * GRAD_CELL;
  const int64_t most_rows = std::min(h, (rows - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1);
  const int64_t held_x = tile_blocks * most_rows * w * inputs * BLOCK, held = unit_panels * panel_grad + held_x;
  float* all_sums = reinterpret_cast<float*>(scratch(0, units * splits * unit_sums * 4));
  float* memory = reinterpret_cast<float*>(scratch(1, held * threads * 4));

#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t item = 0; item < units * splits; ++item) {
    const int64_t unit = item / splits, split = item % splits, group = unit / group_units;
    const int64_t k0 = unit % group_units * unit_outs, k_end = std::min(outs, k0 + unit_outs);
    float* const sums = all_sums + item * unit_sums;
    float* const packed_g = memory + omp_get_thread_num() * held;
    float* const packed_x = packed_g + unit_panels * panel_grad;
    std::memset(sums, 0, unit_sums * 4);
    for (int64_t tile = tiles * split / splits; tile < tiles * (split + 1) / splits; ++tile) {
      const int64_t b0 = tile / row_tiles * tile_blocks, n_blocks = std::min(tile_blocks, blocks - b0);
      const int64_t y0 = tile % row_tiles * rows;
      const Range y{y0, std::min(out_h, y0 + rows)}, columns{0, out_w};
      for (int64_t k = k0; k < k_end; k += PANEL)
        for (int64_t b = 0; b < n_blocks; ++b) {
          const float* from = grad + (((b0 + b) * s.out + group * outs + k) * out_h + y.first) * out_w * BLOCK;
          pack_grad(from, out_h * out_w * BLOCK, std::min<int64_t>(PANEL, k_end - k), y.size() * out_w,
                    packed_g + (k - k0) / PANEL * panel_grad + b * y.size() * out_w * GRAD_CELL);
        }
      const int64_t top = std::clamp<int64_t>(y.first * s.stride[0] - s.pad[0], 0, h);
      const int64_t bottom =
          std::clamp((y.end - 1) * s.stride[0] - s.pad[0] + (s.kernel[0] - 1) * s.dilation[0] + 1, top, h);
      for (int64_t c0 = 0; c0 < ins; c0 += inputs) {
        const int64_t n = std::min(inputs, ins - c0), cell = n * BLOCK;
        for (int64_t b = 0; b < n_blocks; ++b) {
          const float* from = x + (((b0 + b) * s.in + group * ins + c0) * h + top) * w * BLOCK;
          pack_row(from, h * w * BLOCK, n, (bottom - top) * w, packed_x + b * (bottom - top) * w * cell);
        }
        float* panel = sums + c0 / inputs * taps * unit_panels * SUMS;
        for (int64_t r = 0; r < s.kernel[0]; ++r)
          for (int64_t q = 0; q < s.kernel[1]; ++q, panel += unit_panels * SUMS) {
            const Range ys = reading(s, 0, r, h, y), xs = reading(s, 1, q, w, columns);
            if (ys.size() <= 0 || xs.size() <= 0) continue;
            const int64_t from_y = ys.first * s.stride[0] + r * s.dilation[0] - s.pad[0] - top;
            const int64_t from_x = xs.first * s.stride[1] + q * s.dilation[1] - s.pad[1];
            const Walk walk{n_blocks, ys.size(), xs.size(), (bottom - top) * w * cell, s.stride[0] * w * cell,
                            s.stride[1] * cell, y.size() * out_w * GRAD_CELL, out_w * GRAD_CELL};
            for (int64_t k = k0; k < k_end; k += PANEL)
              find_outer(n, k_end - k)(
                  packed_x + (from_y * w + from_x) * cell,
                  packed_g + (k - k0) / PANEL * panel_grad + ((ys.first - y.first) * out_w + xs.first) * GRAD_CELL, walk,
                  panel + (k - k0) / PANEL * SUMS);
          }
      }
    }
  }

  const int64_t input_pitch = channels_last ? 1 : taps, tap_pitch = channels_last ? ins : 1;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t unit = 0; unit < units; ++unit)
    for (int64_t c = 0; c < ins; ++c) {
      const int64_t k0 = unit % group_units * unit_outs, k_end = std::min(outs, k0 + unit_outs);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* from = all_sums + unit * splits * unit_sums + c % inputs * PANEL +
                            (c / inputs * taps + tap) * unit_panels * SUMS;
        float* to = out + (unit / group_units * outs + k0) * ins * taps + c * input_pitch + tap * tap_pitch;
        for (int64_t k = k0; k < k_end; k += LANES) {
          const int64_t lane = (k - k0) / PANEL * SUMS + (k - k0) % PANEL;
          vf total{};
          for (int64_t split = 0; split < splits; ++split) total += load(from + split * unit_sums + lane);
          for (int64_t i = 0; i < std::min<int64_t>(LANES, k_end - k); ++i) to[(k - k0 + i) * ins * taps] = total[i];
        }
      }
    }
}

}  // namespace sfx
