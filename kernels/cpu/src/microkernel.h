// The two inner loops. A tile is G rows of X native vectors; every list entry touches all of them.
#pragma once
#include "geometry.h"
#include "runtime.h"
#include "simd.h"

namespace sfx {

constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int MAX_TILE = REGISTERS == 32 ? 28 : 12;  // native vectors

struct Record {       // one output channel's run of entries in a chunk
  uint32_t channel;   // within the block of output channels
  uint32_t count;     // entries
};

// Lines that the next packing will read, fetched a few at a time between the records of this one: packing would
// otherwise wait for memory, a channel's rows being far apart. They go to L2; on Zen 5, where that
// was measured to be faster, to L1.
struct Ahead {
  const char* base = nullptr;          // `rows` runs of `lines` cache lines for each of `channels`
  const uint32_t* channel = nullptr;   // their numbers; null: 0, 1, 2, ...
  int64_t channels = 0, channel_bytes = 0, rows = 0, row_bytes = 0, lines = 0;
  int64_t per_record = 0;

  Ahead() = default;
  Ahead(const char* first, const uint32_t* of, int64_t n, int64_t pitch, int64_t runs, int64_t run_pitch, int64_t run)
      : base(first), channel(of), channels(n), channel_bytes(pitch), rows(runs), row_bytes(run_pitch), lines(run) {}

  int64_t total() const { return channels * rows * lines; }
  // Spreads the lines over `records` calls of step().
  void start(int64_t records) {
    channel_at_ = row_at_ = 0;
    to_l1_ = processor() == Processor::ZEN_5;
    per_record = total() ? total() / (records + 1) + 1 : 0;
    if (per_record) open();
  }
  SFX_INLINE void step() {
    for (int64_t k = 0; k < per_record; ++k) {
      to_l1_ ? __builtin_prefetch(line_, 0, 3) : __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      if (!--left_) next();
    }
  }

 private:
  void open() {
    line_ = base + (channel ? int64_t(channel[channel_at_]) : channel_at_) * channel_bytes + row_at_ * row_bytes;
    left_ = lines;
  }
  __attribute__((noinline)) void next() {
    if (++row_at_ == rows) {
      row_at_ = 0;
      if (++channel_at_ == channels) channel_at_ = 0, per_record = 0;
    }
    open();
  }
  const char* line_ = nullptr;
  bool to_l1_ = false;
  int64_t left_ = 0, channel_at_ = 0, row_at_ = 0;
};

// What the weight gradient fetches ahead: the next input to pack, and the next tile of the output's gradient.
struct Fetches {
  Ahead input, grad;
  SFX_INLINE void step() {
    input.step();
    grad.step();
  }
};

// A clipped tile spans its axes and its packing has no zeros around it: entries whose tap has the first or the last row
// or column of outputs outside the input touch only the others. A record's entries are then sorted by class, which is
// clip of the rows * CLIPS + clip of the columns, and `runs` says how many each class has.
constexpr int CLASSES = CLIPS * CLIPS;
struct Runs {
  uint32_t of[CLASSES];
};

// Where the last record of each output channel puts its sums: a tile of fp32 outputs.
struct Sink {
  char* out;              // the tile of channel 0 of the block
  int64_t channel_bytes;
  const int64_t* at;      // [vectors of a tile]: bytes from the start of the channel's tile
  const float* bias;      // from channel 0 of the block on, or null
  const char* residual;   // what is added, laid out as the outputs, or null
  bool relu, past_caches;
};

// acc[channel] (+)= value * x[offset + row * pitch] over a chunk's records.
// `acc` is [channel][G * X] contiguous. With `first` the sums start at zero instead of at `acc`; with a sink they go
// there.
using FmaKernel = void (*)(const char* x, int64_t pitch, const Record* records, const Runs* runs, int64_t n,
                           const uint32_t* offset, const float* value, char* acc, bool first, const Sink* sink,
                           Ahead& ahead);

// partial[slot] += sum over the tile and its lanes of g[channel] * x[offset], where each record's entries have slots in
// their order, rounded up to a microkernel's `group`; up to LANES - 1 floats after the last slot are read and written back
// unchanged.
using DotKernel = void (*)(const char* x, int64_t pitch, const Record* records, const Runs* runs, int64_t n,
                           const uint32_t* offset, const char* g, int64_t g_channel, int64_t g_row, float* partial,
                           Fetches& fetches);

struct Microkernel {
  int rows, vectors;
  int column;  // vectors of one column of a clipped tile, else 0
  int group;   // a record's slots are a multiple of this
  FmaKernel fma;
  DotKernel dot;
};

// All compiled tile shapes, and the one with exactly these rows and native vectors (null if not compiled).
const Microkernel* microkernels(int* count);
const Microkernel* find_microkernel(int64_t rows, int64_t vectors, int64_t column = 0);

}  // namespace sfx
