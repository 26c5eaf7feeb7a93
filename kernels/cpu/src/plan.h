// A pass of a layer at one input size: phases with their packing, tiles and lists.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "geometry.h"
#include "lists.h"
#include "microkernel.h"

namespace sfx {

enum PassKind { FPROP = 0, DGRAD = 1, WGRAD = 2, PIXELS = 3 };  // PIXELS: fprop with lanes over pixels

int64_t partial_budget();  // bytes of weight gradients that are summed at a time on this processor

struct Tiling {
  int64_t rows, cols, batch;       // a tile: output rows x output columns x blocks of images
  int64_t strip_rows, strip_cols;  // tiles to a strip, the unit that is packed
  int64_t chunk, block;            // live input channels to a chunk, output channels to a block
};

struct PhasePlan {
  AxisMap y, x;
  Packing pack_y, pack_x;
  Tiling tiling;
  const Microkernel* kernel;
  Lists lists;
  int64_t cell_bytes, row_bytes, channel_bytes, tail_bytes;  // one packed position, row, channel; zeros at the end
  int64_t strips_y, strips_x, batches;

  int64_t tile_bytes() const { return int64_t(kernel->rows) * kernel->vectors * LANES * 4; }
  int64_t strips() const { return strips_y * strips_x * batches; }
  bool one_tile() const { return tiling.strip_rows * tiling.strip_cols == 1; }
  int64_t packed_bytes(int64_t channels) const { return channels * channel_bytes + tail_bytes; }
};

struct PassPlan {
  PassKind kind;
  int64_t in_channels, out_channels, in_h, in_w, out_h, out_w, blocks;
  int threads;
  double build_ms;
  std::vector<PhasePlan> phases;
};

// Output size of the layer for an input of `size` along axis `a`.
int64_t out_size(const ConvShape& shape, int a, int64_t size);

// The pass at inputs of `h` x `w` (the layer's input, for every kind) and `blocks` blocks of images.
std::shared_ptr<const PassPlan> make_pass(const Pattern& pattern, PassKind kind, int64_t h, int64_t w, int64_t blocks,
                                          int threads, const Tiling* wanted);

struct Layer {
  Pattern pattern;
  std::mutex mutex;
  std::vector<std::shared_ptr<const PassPlan>> passes;
  std::unique_ptr<Tiling> wanted[4];
  std::vector<uint32_t> channels_last;  // as Pattern::column, of weights stored [out, R, S, in / groups]; made when asked

  // Where each entry lies in its output channel's row of the dense weight.
  const uint32_t* columns(bool last);
  std::shared_ptr<const PassPlan> pass(PassKind kind, int64_t h, int64_t w, int64_t blocks, int threads);
};

}  // namespace sfx
