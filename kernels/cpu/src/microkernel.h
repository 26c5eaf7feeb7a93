// The two inner loops. A tile is G rows of X native vectors; every list entry touches all of them.
#pragma once
#include "simd.h"

namespace sfx {

struct Record {       // one output channel's run of entries in a chunk
  uint32_t channel;   // within the block of output channels
  uint32_t count;     // entries
};

// acc[channel] (+)= value * x[offset + row * pitch] over a chunk's records.
// `acc` is [channel][G * X] contiguous. With `first` the sums start at zero instead of at `acc`.
using FmaKernel = void (*)(const char* x, int64_t pitch, const Record* records, int64_t n, const uint32_t* offset,
                           const float* value, char* acc, bool first);

// partial[entry] += sum over the tile and its lanes of g[channel] * x[offset]; up to LANES - 1 floats after the last
// entry are read and written back unchanged.
using DotKernel = void (*)(const char* x, int64_t pitch, const Record* records, int64_t n, const uint32_t* offset,
                           const char* g, int64_t g_channel, int64_t g_row, float* partial);

struct Microkernel {
  int rows, vectors;
  FmaKernel fma;
  DotKernel dot;
};

// All compiled tile shapes, and the one with exactly these rows and native vectors (null if not compiled).
const Microkernel* microkernels(int* count);
const Microkernel* find_microkernel(int rows, int vectors);

}  // namespace sfx
