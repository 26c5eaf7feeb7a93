// How dense weight gradients of convolutions are cut up and summed, whatever multiplies: sums[input][output] of a panel of
// input channels and one of output channels, over the positions of a tile.
#pragma once
#include <omp.h>

#include <algorithm>

#include "geometry.h"
#include "plan.h"
#include "runtime.h"
#include "transpose.h"

namespace sfx {

constexpr int PANEL_VECTORS = 2, PANEL = PANEL_VECTORS * LANES;  // output channels
constexpr int64_t PANEL_POSITIONS = 128;  // panels of a unit times positions of a tile, about: 256 KB of packed gradient
constexpr int64_t ITEMS = 8;              // of work for each thread, about
constexpr int64_t SUMS_BUDGET = 64 << 20;

struct Range {
  int64_t first, end;
  int64_t size() const { return end - first; }
};

// The outputs of `within` for which a tap reads inside the input.
inline Range reading(const ConvShape& s, int axis, int64_t tap, int64_t size, Range within) {
  const int64_t shift = s.pad[axis] - tap * s.dilation[axis];  // output o reads o * stride - shift
  const int64_t first = shift > 0 ? ceil_div(shift, s.stride[axis]) : 0;
  const int64_t end = size + shift > 0 ? ceil_div(size + shift, s.stride[axis]) : 0;
  return {std::max(within.first, first), std::min(within.end, end)};
}

// How the work is cut: a unit is some panels of output channels, whose sums over some tiles are an item of work. A tile
// is some rows of outputs of some blocks of images.
struct Cut {
  const ConvShape& s;
  int64_t blocks, h, w, out_h, out_w;
  int64_t ins, outs;                                  // channels of a group
  int64_t max_inputs, inputs, input_panels;           // input channels of a panel of sums
  int64_t unit_panels, group_units, units;
  int64_t rows, tile_blocks, row_tiles, tiles, splits;

  // Panels have `most` input channels, or less in steps of `step`. A unit's `panels` share a packed input; the more
  // positions a tile has, the less often sums are read.
  Cut(const ConvShape& shape, int64_t n_blocks, int64_t in_h, int64_t in_w, int64_t most, int64_t step, int64_t panels,
      int threads)
      : s(shape), blocks(n_blocks), h(in_h), w(in_w), out_h(out_size(s, 0, h)), out_w(out_size(s, 1, w)),
        ins(s.in / s.groups), outs(s.out / s.groups), max_inputs(most), unit_panels(panels),
        tiles(0) {
    inputs = ceil_div(ceil_div(ins, ceil_div(ins, max_inputs)), step) * step;
    input_panels = ceil_div(ins, inputs);
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
  // Floats of a panel's sums, [max_inputs][PANEL], and of a unit's, [input panels][taps][panels] of them.
  int64_t panel_sums() const { return max_inputs * PANEL; }
  int64_t unit_sums() const { return input_panels * s.taps() * unit_panels * panel_sums(); }
  // Rows of inputs that a tile reads, at most.
  int64_t input_rows() const {
    return std::min(h, (rows - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1);
  }
};

// Where a unit and a tile lie.
struct Place {
  int64_t group, block, blocks;  // blocks of images: the first, and how many
  Range k, y;                    // output channels in the group, rows of outputs
  int64_t panels;
  Range in_y;                    // rows of inputs

  Place(const Cut& cut, int64_t unit, int64_t tile)
      : group(unit / cut.group_units), block(tile / cut.row_tiles * cut.tile_blocks),
        blocks(std::min(cut.tile_blocks, cut.blocks - block)), k(cut.outputs(unit)) {
    const ConvShape& s = cut.s;
    const int64_t first = tile % cut.row_tiles * cut.rows, reach = (s.kernel[0] - 1) * s.dilation[0] + 1;
    y = {first, std::min(cut.out_h, first + cut.rows)};
    panels = ceil_div(k.size(), PANEL);
    in_y.first = std::clamp<int64_t>(y.first * s.stride[0] - s.pad[0], 0, cut.h);
    in_y.end = std::clamp((y.end - 1) * s.stride[0] - s.pad[0] + reach, in_y.first, cut.h);
  }
};

// Writes the gradient of LANES output channels from number `k0` of a unit on, from the sums of its items, which lie one
// after the other.
inline void write_outputs(const Cut& cut, int64_t unit, int64_t k0, const float* sums, bool channels_last, float* out) {
  const int64_t taps = cut.s.taps(), row = cut.ins * taps, n = std::min<int64_t>(LANES, cut.outputs(unit).size() - k0);
  const int64_t c_pitch = channels_last ? 1 : taps, tap_pitch = channels_last ? cut.ins : 1;
  float* const to = out + (unit / cut.group_units * cut.outs + cut.outputs(unit).first + k0) * row;
  sums += k0 / PANEL * cut.panel_sums() + k0 % PANEL;
  for (int64_t first = 0; first < cut.ins; first += cut.inputs)
    for (int64_t c0 = first; c0 < std::min(first + cut.inputs, cut.ins); c0 += LANES) {
      const int64_t width = std::min<int64_t>(LANES, std::min(first + cut.inputs, cut.ins) - c0);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* const from =
            sums + (first / cut.inputs * taps + tap) * cut.unit_panels * cut.panel_sums() + (c0 - first) * PANEL;
        vf total[LANES];
        for (int64_t c = 0; c < LANES; ++c) {
          total[c] = vf{};
          for (int64_t split = 0; c < width && split < cut.splits; ++split)
            total[c] += load(from + c * PANEL + split * cut.unit_sums());
        }
        transpose(total);
        for (int64_t lane = 0; lane < n; ++lane) {
          float* const at = to + lane * row + c0 * c_pitch + tap * tap_pitch;
          if (c_pitch == 1 && width == LANES)
            store(at, total[lane]);
          else
            for (int64_t c = 0; c < width; ++c) at[c * c_pitch] = total[lane][c];
        }
      }
    }
}

// Positions that a panel of sums runs over; pitches in bytes, of cells: what is packed of a position.
struct Walk {
  int64_t blocks, rows, columns;
  int64_t x_block, x_row, x_column, g_block, g_row;
};

// Bytes of what a thread packs: the gradient of a panel, and the input of one.
template <class Unit>
int64_t panel_grad(const Cut& cut) {
  return cut.tile_blocks * cut.rows * cut.out_w * Unit::GRAD_CELL;
}
template <class Unit>
int64_t panel_input(const Cut& cut) {
  return cut.tile_blocks * cut.input_rows() * cut.w * Unit::input_cell(cut.inputs);
}

// sums += those of a unit over one tile. `blocks` of images there are in all, of which a block of the cut has DEPTH.
template <class Unit>
void add_tile(const Cut& cut, int64_t blocks, const Place& at, const float* grad, const float* x, char* packed,
              float* sums) {
  const ConvShape& s = cut.s;
  const int64_t h = cut.h, w = cut.w, out_w = cut.out_w, plane = h * w * BLOCK, out_plane = cut.out_h * out_w * BLOCK;
  const int64_t g_block = at.y.size() * out_w * Unit::GRAD_CELL, g_panel = panel_grad<Unit>(cut);
  for (int64_t p = 0; p < at.panels; ++p)
    for (int64_t b = 0; b < at.blocks; ++b) {
      const int64_t first = at.k.first + p * PANEL, block = (at.block + b) * Unit::DEPTH;
      Unit::pack_grad(grad + (block * s.out + at.group * cut.outs + first) * out_plane + at.y.first * out_w * BLOCK,
                      out_plane, s.out * out_plane, block + 1 < blocks, std::min<int64_t>(PANEL, at.k.end - first),
                      at.y.size() * out_w, packed + p * g_panel + b * g_block);
    }
  char* const packed_x = packed + cut.unit_panels * g_panel;
  for (int64_t c0 = 0; c0 < cut.ins; c0 += cut.inputs) {
    const int64_t n = std::min(cut.inputs, cut.ins - c0), cell = Unit::input_cell(n);
    const int64_t x_block = at.in_y.size() * w * cell;
    for (int64_t b = 0; b < at.blocks; ++b) {
      const int64_t block = (at.block + b) * Unit::DEPTH;
      Unit::pack_input(x + (block * s.in + at.group * cut.ins + c0) * plane + at.in_y.first * w * BLOCK, plane,
                       s.in * plane, block + 1 < blocks, n, at.in_y.size() * w, packed_x + b * x_block);
    }
    for (int64_t r = 0; r < s.kernel[0]; ++r)
      for (int64_t q = 0; q < s.kernel[1]; ++q, sums += cut.unit_panels * cut.panel_sums()) {
        const Range ys = reading(s, 0, r, h, at.y), xs = reading(s, 1, q, w, {0, out_w});
        if (ys.size() <= 0 || xs.size() <= 0) continue;
        const int64_t from_y = ys.first * s.stride[0] + r * s.dilation[0] - s.pad[0] - at.in_y.first;
        const int64_t from_x = xs.first * s.stride[1] + q * s.dilation[1] - s.pad[1];
        const char* const g = packed + ((ys.first - at.y.first) * out_w + xs.first) * Unit::GRAD_CELL;
        const Walk walk{at.blocks, ys.size(), xs.size(), x_block, s.stride[0] * w * cell, s.stride[1] * cell,
                        g_block, out_w * Unit::GRAD_CELL};
        for (int64_t p = 0; p < at.panels; ++p)
          Unit::multiply(n, at.k.size() - p * PANEL, packed_x + (from_y * w + from_x) * cell, g + p * g_panel, walk,
                         sums + p * cut.panel_sums());
      }
  }
}

// The gradient of all weights by a Unit, which says how it packs and multiplies: DEPTH blocks of images at a time, at
// most MAX_INPUTS input channels in steps of INPUT_STEP. A thread holds a Unit::Thread meanwhile.
template <class Unit>
void outer_products(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                    int64_t panels, bool channels_last, float* out, int threads) {
  const Cut cut(shape, ceil_div(blocks, Unit::DEPTH), h, w, Unit::MAX_INPUTS, Unit::INPUT_STEP, panels, threads);
  const int64_t items = cut.units * cut.splits, unit_sums = cut.unit_sums();
  const int64_t held = align64(cut.unit_panels * panel_grad<Unit>(cut) + panel_input<Unit>(cut));
  float* const sums = reinterpret_cast<float*>(scratch(0, items * unit_sums * 4));
  char* const memory = scratch(1, held * threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    [[maybe_unused]] const typename Unit::Thread thread;
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) {
      const int64_t split = item % cut.splits;
      std::memset(sums + item * unit_sums, 0, unit_sums * 4);
      for (int64_t tile = cut.tiles * split / cut.splits; tile < cut.tiles * (split + 1) / cut.splits; ++tile)
        add_tile<Unit>(cut, blocks, Place(cut, item / cut.splits, tile), grad, x, memory + omp_get_thread_num() * held,
                       sums + item * unit_sums);
    }
  }
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t unit = 0; unit < cut.units; ++unit)
    for (int64_t k = 0; k < cut.unit_outs(); k += LANES)
      if (k < cut.outputs(unit).size())
        write_outputs(cut, unit, k, sums + unit * cut.splits * unit_sums, channels_last, out);
}

}  // namespace sfx
