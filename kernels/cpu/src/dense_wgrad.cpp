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

// [columns][n][16] of `n` input channels, whose rows lie `channel` floats apart.
void pack_rows(const float* x, int64_t channel, int64_t n, int64_t columns, float* out) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t k = 0; k < columns; ++k)
      for (int v = 0; v < VECS; ++v)
        store(out + (k * n + c) * BLOCK + v * LANES, load(x + c * channel + k * BLOCK + v * LANES));
}

// How the work is cut: a unit is some panels of output channels, whose sums over some tiles are an item of work. A tile
// is some rows of outputs of some blocks of images.
struct Cut {
  const ConvShape& s;
  int64_t blocks, h, w, out_h, out_w;
  int64_t ins, outs;                                  // channels of a group
  int64_t inputs, input_panels;                       // input channels of a panel of sums
  int64_t unit_panels, group_units, units;
  int64_t rows, tile_blocks, row_tiles, tiles, splits;

  Cut(const ConvShape& shape, int64_t n_blocks, int64_t in_h, int64_t in_w, int threads)
      : s(shape), blocks(n_blocks), h(in_h), w(in_w), out_h(out_size(s, 0, h)), out_w(out_size(s, 1, w)),
        ins(s.in / s.groups), outs(s.out / s.groups), tiles(0) {
    input_panels = ceil_div(ins, MAX_INPUTS);
    inputs = ceil_div(ins, input_panels);
    // Panels of a unit share a packed input, which costs more the fewer taps read it; the more positions a tile has, the
    // less often sums are read.
    unit_panels = s.taps() < 4 ? 8 : 2;
    group_units = ceil_div(outs, unit_outs());
    units = s.groups * group_units;
    for (int64_t positions = PANEL_POSITIONS / unit_panels; positions && tiles * units < 2 * threads; positions /= 2) {
      rows = std::clamp<int64_t>(positions / out_w, 1, out_h);
      tile_blocks = std::clamp<int64_t>(positions / (out_h * out_w), 1, blocks);
      row_tiles = ceil_div(out_h, rows);
      tiles = row_tiles * ceil_div(blocks, tile_blocks);
    }
    const int64_t affordable = SUMS_BUDGET / (4 * units * unit_sums());
    splits = std::clamp<int64_t>(std::min(ceil_div(ITEMS * threads, units), affordable), 1, tiles);
  }

  int64_t unit_outs() const { return unit_panels * PANEL; }
  Range outputs(int64_t unit) const {  // of the unit, in its group
    const int64_t first = unit % group_units * unit_outs();
    return {first, std::min(outs, first + unit_outs())};
  }
  // Floats of a unit's sums, [input panels][taps][panels][MAX_INPUTS][PANEL], and of what a thread packs.
  int64_t unit_sums() const { return input_panels * s.taps() * unit_panels * SUMS; }
  int64_t panel_grad() const { return tile_blocks * rows * out_w * GRAD_CELL; }
  int64_t held() const {
    const int64_t most_rows = std::min(h, (rows - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1);
    return unit_panels * panel_grad() + tile_blocks * most_rows * w * inputs * BLOCK;
  }
};

// sums += those of a unit over one tile.
void add_tile(const Cut& cut, int64_t unit, int64_t tile, const float* grad, const float* x, float* packed, float* sums) {
  const ConvShape& s = cut.s;
  const int64_t group = unit / cut.group_units, h = cut.h, w = cut.w, out_w = cut.out_w;
  const int64_t b0 = tile / cut.row_tiles * cut.tile_blocks, blocks = std::min(cut.tile_blocks, cut.blocks - b0);
  const int64_t y0 = tile % cut.row_tiles * cut.rows;
  const Range k = cut.outputs(unit), y{y0, std::min(cut.out_h, y0 + cut.rows)}, columns{0, out_w};
  const int64_t panels = ceil_div(k.size(), PANEL), g_block = y.size() * out_w * GRAD_CELL;
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = k.first + p * PANEL, channel = (b0 + b) * s.out + group * cut.outs + first;
      pack_grad(grad + (channel * cut.out_h + y.first) * out_w * BLOCK, cut.out_h * out_w * BLOCK,
                std::min<int64_t>(PANEL, k.end - first), y.size() * out_w, packed + p * cut.panel_grad() + b * g_block);
    }
  float* const packed_x = packed + cut.unit_panels * cut.panel_grad();
  const int64_t reach = (s.kernel[0] - 1) * s.dilation[0] + 1;
  const int64_t top = std::clamp<int64_t>(y.first * s.stride[0] - s.pad[0], 0, h);
  const int64_t bottom = std::clamp((y.end - 1) * s.stride[0] - s.pad[0] + reach, top, h);
  for (int64_t c0 = 0; c0 < cut.ins; c0 += cut.inputs) {
    const int64_t n = std::min(cut.inputs, cut.ins - c0), cell = n * BLOCK, x_block = (bottom - top) * w * cell;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channel = (b0 + b) * s.in + group * cut.ins + c0;
      pack_rows(x + (channel * h + top) * w * BLOCK, h * w * BLOCK, n, (bottom - top) * w, packed_x + b * x_block);
    }
    for (int64_t r = 0; r < s.kernel[0]; ++r)
      for (int64_t q = 0; q < s.kernel[1]; ++q, sums += cut.unit_panels * SUMS) {
        const Range ys = reading(s, 0, r, h, y), xs = reading(s, 1, q, w, columns);
        if (ys.size() <= 0 || xs.size() <= 0) continue;
        const int64_t from_y = ys.first * s.stride[0] + r * s.dilation[0] - s.pad[0] - top;
        const int64_t from_x = xs.first * s.stride[1] + q * s.dilation[1] - s.pad[1];
        const float* const g = packed + ((ys.first - y.first) * out_w + xs.first) * GRAD_CELL;
        const Walk walk{blocks, ys.size(), xs.size(), x_block, s.stride[0] * w * cell, s.stride[1] * cell,
                        g_block, out_w * GRAD_CELL};
        for (int64_t p = 0; p < panels; ++p)
          find_outer(n, k.size() - p * PANEL)(packed_x + (from_y * w + from_x) * cell, g + p * cut.panel_grad(), walk,
                                              sums + p * SUMS);
      }
  }
}

// Writes input channel `c` of a unit from the sums of its items, which lie one after the other.
void write_channel(const Cut& cut, int64_t unit, int64_t c, const float* sums, bool channels_last, float* out) {
  const Range k = cut.outputs(unit);
  const int64_t taps = cut.s.taps(), row = cut.ins * taps;
  float* const to = out + (unit / cut.group_units * cut.outs + k.first) * row;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const float* const from =
        sums + (c / cut.inputs * taps + tap) * cut.unit_panels * SUMS + c % cut.inputs * PANEL;
    const int64_t column = channels_last ? tap * cut.ins + c : c * taps + tap;
    for (int64_t i = 0; i < k.size(); i += LANES) {
      vf total{};
      for (int64_t split = 0; split < cut.splits; ++split)
        total += load(from + split * cut.unit_sums() + i / PANEL * SUMS + i % PANEL);
      for (int64_t lane = 0; lane < std::min<int64_t>(LANES, k.size() - i); ++lane)
        to[(i + lane) * row + column] = total[lane];
    }
  }
}

}  // namespace

void dense_wgrad(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                 bool channels_last, float* out, int threads) {
  const Cut cut(shape, blocks, h, w, threads);
  const int64_t items = cut.units * cut.splits, unit_sums = cut.unit_sums(), held = cut.held();
  float* const sums = reinterpret_cast<float*>(scratch(0, items * unit_sums * 4));
  float* const memory = reinterpret_cast<float*>(scratch(1, held * threads * 4));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t split = item % cut.splits;
    std::memset(sums + item * unit_sums, 0, unit_sums * 4);
    for (int64_t tile = cut.tiles * split / cut.splits; tile < cut.tiles * (split + 1) / cut.splits; ++tile)
      add_tile(cut, item / cut.splits, tile, grad, x, memory + omp_get_thread_num() * held, sums + item * unit_sums);
  }
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t unit = 0; unit < cut.units; ++unit)
    for (int64_t c = 0; c < cut.ins; ++c)
      write_channel(cut, unit, c, sums + unit * cut.splits * unit_sums, channels_last, out);
}

}  // namespace sfx
