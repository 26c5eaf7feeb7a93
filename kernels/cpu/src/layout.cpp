// Activations between NCHW or channels_last and blocks of images.
#include <algorithm>

#include "abi.h"
#include "runtime.h"
#include "simd.h"
#include "transpose.h"

namespace sfx {
namespace {

// Rows of 16 images, each a run of `length` elements `row` apart, to lines `line` apart, and back.
struct Run {
  int64_t images, length, row, line;
};

template <class T>
void to_lines(const T* from, T* to, const Run& r) {
  for (int v = 0; v < VECS; ++v) {
    const int64_t n = std::clamp<int64_t>(r.images - v * LANES, 0, LANES);
    const T* source = from + v * LANES * r.row;
    int64_t k = 0;
    for (; k + LANES <= r.length; k += LANES) {
      vf m[LANES];
      for (int i = 0; i < LANES; ++i) m[i] = i < n ? load_as_float(source + i * r.row + k) : vf{};
      transpose(m);
      for (int i = 0; i < LANES; ++i) store_from_float(to + (k + i) * r.line + v * LANES, m[i]);
    }
    for (; k < r.length; ++k)
      for (int i = 0; i < LANES; ++i) to[k * r.line + v * LANES + i] = i < n ? source[i * r.row + k] : T{};
  }
}

template <class T>
void from_lines(const T* from, T* to, const Run& r) {
  for (int v = 0; v < VECS; ++v) {
    const int64_t n = std::clamp<int64_t>(r.images - v * LANES, 0, LANES);
    T* target = to + v * LANES * r.row;
    int64_t k = 0;
    for (; k + LANES <= r.length; k += LANES) {
      vf m[LANES];
      for (int i = 0; i < LANES; ++i) m[i] = load_as_float(from + (k + i) * r.line + v * LANES);
      transpose(m);
      for (int i = 0; i < n; ++i) store_from_float(target + i * r.row + k, m[i]);
    }
    for (; k < r.length; ++k)
      for (int i = 0; i < n; ++i) target[i * r.row + k] = from[k * r.line + v * LANES + i];
  }
}

template <class T>
void convert(bool to_blocked, const T* from, T* to, int64_t images, int64_t channels, int64_t pixels,
             bool channels_last, int threads) {
  const int64_t blocks = (images + BLOCK - 1) / BLOCK;
  const int64_t inner = channels_last ? pixels : channels, length = channels_last ? channels : pixels;
#pragma omp parallel for collapse(2) num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t k = 0; k < inner; ++k) {
      const Run run{images - b * BLOCK, length, channels * pixels, channels_last ? pixels * BLOCK : BLOCK};
      const int64_t plain = b * BLOCK * channels * pixels + k * length;
      const int64_t blocked = (b * channels * pixels + k * (channels_last ? 1 : pixels)) * BLOCK;
      if (to_blocked)
        to_lines(from + plain, to + blocked, run);
      else
        from_lines(from + blocked, to + plain, run);
    }
}

}  // namespace
}  // namespace sfx

extern "C" void sfx_convert(int to_blocked, int dtype, const void* from, void* to, int64_t images, int64_t channels,
                            int64_t pixels, int channels_last, int threads) {
  using namespace sfx;
  if (dtype)
    convert(to_blocked, static_cast<const bf16*>(from), static_cast<bf16*>(to), images, channels, pixels,
            channels_last, team(threads));
  else
    convert(to_blocked, static_cast<const float*>(from), static_cast<float*>(to), images, channels, pixels,
            channels_last, team(threads));
}
