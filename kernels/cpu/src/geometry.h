// Where a convolution reads and writes: taps, phases, and how a strip of input is packed.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace sfx {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct ConvShape {
  int64_t out, in;  // channels of the layer; weight is [out, in / groups, R, S]
  int64_t kernel[2], stride[2], pad[2], dilation[2];
  int64_t groups;
  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// One axis of a phase: output i (of `count`) is position first + i * out_step of the full output and reads input
// i * in_step + displacement for each of its taps.
struct AxisMap {
  int64_t first, count, out_step, in_step, in_size;
  std::vector<int64_t> tap, displacement;  // index along the kernel's axis, and what it reads
};

// Phases of one axis. fprop has one; dgrad has one per residue of the stride.
std::vector<AxisMap> fprop_axis(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t in_size,
                                int64_t out_size);
std::vector<AxisMap> dgrad_axis(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t in_size,
                                int64_t out_size);

// The output that a tap misses because it would read outside the input.
enum Clip : uint8_t { NO_OUTPUT = 0, FIRST_OUTPUT = 1, LAST_OUTPUT = 2 };
constexpr int CLIPS = 3;

// Packing of one axis for a strip of `outputs` outputs. Input coordinates of the same residue modulo in_step lie next
// to each other, so a tap reads `outputs` consecutive packed positions. Where a strip spans the axis, the zeros after
// its last position double as the zeros before the next one's first: `pitch` is then less than `source.size()`.
struct Packing {
  std::vector<int64_t> source;     // input coordinate of each packed position for the strip at output 0
  std::vector<int64_t> tap_start;  // by kernel index: packed position that output 0 reads, -1 if not in this phase
  int64_t pitch = 0;
  std::vector<uint8_t> clip;       // by kernel index, of a clipped packing only
  bool clips() const { return std::count(clip.begin(), clip.end(), NO_OUTPUT) < int64_t(clip.size()); }
};

Packing pack_axis(const AxisMap& axis, int64_t kernel, int64_t outputs);

// Packing of a whole axis without the zeros around it: a tap that has its first output outside the input starts at the
// second. False where some tap has more than one output outside.
bool pack_clipped(const AxisMap& axis, int64_t kernel, Packing* packing);

}  // namespace sfx
