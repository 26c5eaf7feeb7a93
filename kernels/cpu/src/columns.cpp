// The input of a convolution spread out so that its dense weight gradient is a matrix product.
#include "abi.h"
#include "runtime.h"
#include "simd.h"

extern "C" void sfx_columns(const SfxColumns* arguments, const float* x, float* out, int threads) {
  using namespace sfx;
  const SfxColumns a = *arguments;
  const int64_t taps = a.kernel[0] * a.kernel[1], row = a.out_w * BLOCK;
#pragma omp parallel for collapse(2) num_threads(team(threads)) if (threads > 1) schedule(static)
  for (int64_t c = 0; c < a.n; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t dy = tap / a.kernel[1] * a.dilation[0] - a.pad[0];
      const int64_t dx = tap % a.kernel[1] * a.dilation[1] - a.pad[1];
      float* to = out + (c * taps + tap) * a.blocks * a.rows * row;
      for (int64_t b = 0; b < a.blocks; ++b)
        for (int64_t y = a.row; y < a.row + a.rows; ++y) {
          const int64_t from_y = y * a.stride[0] + dy;
          if (from_y < 0 || from_y >= a.h) {
            std::memset(to, 0, row * 4);
            to += row;
            continue;
          }
          const float* line = x + (((a.block + b) * a.channels + a.channel + c) * a.h + from_y) * a.w * BLOCK;
          for (int64_t k = 0; k < a.out_w; ++k, to += BLOCK) {
            const int64_t from_x = k * a.stride[1] + dx;
            for (int v = 0; v < VECS; ++v)
              store(to + v * LANES, from_x < 0 || from_x >= a.w ? vf{} : load(line + from_x * BLOCK + v * LANES));
          }
        }
    }
}
