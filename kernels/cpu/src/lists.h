// From a mask to the lists that the kernels walk.
#pragma once
#include <cstdint>
#include <vector>

#include "geometry.h"
#include "microkernel.h"

namespace sfx {

// Existing weights of a layer in row-major order of [out, in / groups, R, S].
struct Pattern {
  ConvShape shape;
  std::vector<uint32_t> row;     // [out + 1]: first entry of each output channel
  std::vector<uint32_t> column;  // [nnz]: index within the output channel's row of the dense weight
  int64_t row_size() const { return shape.in / shape.groups * shape.taps(); }
  int64_t nnz() const { return int64_t(column.size()); }
};

Pattern make_pattern(const ConvShape& shape, const uint8_t* mask);

// What becomes of a record's sums: it is the first of its output channel in the block, the last, both or neither.
enum Group { WHOLE = 0, OPENING = 1, INNER = 2, CLOSING = 3, GROUPS = 4 };

struct Cell {  // a block of output channels x a chunk of input channels
  uint32_t record[GROUPS + 1], entry[GROUPS + 1];  // where each group starts
  int64_t slot, slots;                             // of a weight gradient's sums: the first, and how many
  int64_t records() const { return record[GROUPS] - record[0]; }
};

// Entries of one phase, grouped by (block of outputs, chunk of inputs, output). Within a group of a cell, outputs of
// equal count stand together, so that the inner loop's trip count is predictable. An output without entries has an
// empty record in its block's first cell.
struct Lists {
  int64_t outputs = 0, block = 0, blocks = 0;   // output channels, how many to a block
  int64_t chunk = 0, chunks = 0;                // live input channels to a chunk
  std::vector<uint32_t> live;                   // input channels that some entry reads
  std::vector<uint32_t> offset;                 // [entries]: bytes from the start of the chunk's packed channels
  std::vector<uint32_t> source;                 // [entries]: position in Pattern order
  std::vector<Record> records;
  std::vector<Runs> runs;                       // [records], if the tile is clipped
  std::vector<Cell> cells;                      // [blocks * chunks]
  int64_t entries() const { return int64_t(offset.size()); }
  int64_t slots() const { return cells.back().slot + cells.back().slots; }
  const Runs* runs_at(uint32_t record) const { return runs.empty() ? nullptr : runs.data() + record; }
};

// `tap_offset` [R * S]: byte offset of each tap inside a packed channel, -1 where the phase does not have it.
// `tap_class` [R * S]: the taps' classes if the tile is clipped, else empty.
// `transposed` exchanges the channels' roles (dgrad). Records have a multiple of `slots` slots.
Lists make_lists(const Pattern& pattern, bool transposed, const std::vector<int64_t>& tap_offset,
                 const std::vector<uint8_t>& tap_class, int64_t channel_bytes, int64_t chunk, int64_t block,
                 int64_t slots);

// Input channels that entries with an allowed tap read.
std::vector<uint32_t> live_inputs(const Pattern& pattern, bool transposed, const std::vector<int64_t>& tap_offset,
                                  int64_t* entries);

}  // namespace sfx
