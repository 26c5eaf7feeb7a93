// Max pooling on blocked activations. Which tap of its window each output came from is kept in a byte.
#include <algorithm>
#include <cstring>
#include <limits>

#include "abi.h"
#include "io.h"
#include "runtime.h"

namespace sfx {
namespace {

typedef uint8_t Tap;
typedef Tap taps_of __attribute__((vector_size(LANES)));

struct Window {  // of one output: input positions that exist, as tap indices
  int64_t y0, x0, ky0, ky1, kx0, kx1;
};

SFX_INLINE Window window(const SfxPool& p, int64_t oy, int64_t ox) {
  const int64_t y = oy * p.stride[0] - p.pad[0], x = ox * p.stride[1] - p.pad[1];
  return {y, x, std::max<int64_t>(0, -y), std::min(p.kernel[0], p.in[0] - y), std::max<int64_t>(0, -x),
          std::min(p.kernel[1], p.in[1] - x)};
}

// Calls visit(offset, tap) for each input position of a window. K is the kernel's height and width, or 0 for any: a whole
// window's taps are then known to the compiler.
template <int K, class Visit>
SFX_INLINE void each_tap(const SfxPool& p, const Window& w, Visit visit) {
  const bool whole = w.ky1 - w.ky0 == K && w.kx1 - w.kx0 == K;
  if (K && whole) {
    const int64_t first = w.y0 * p.in[1] + w.x0;
#pragma GCC unroll 4
    for (int ky = 0; ky < K; ++ky)
#pragma GCC unroll 4
      for (int kx = 0; kx < K; ++kx) visit((first + ky * p.in[1] + kx) * BLOCK, int32_t(ky * K + kx));
    return;
  }
  for (int64_t ky = w.ky0; ky < w.ky1; ++ky)
    for (int64_t kx = w.kx0; kx < w.kx1; ++kx)
      visit(((w.y0 + ky) * p.in[1] + w.x0 + kx) * BLOCK, int32_t(ky * p.kernel[1] + kx));
}

template <int K, class T, bool ACTS>
void forward(const SfxPool& p, const Prepared<ACTS>& prepared, const LaneMask& mask, const T* x, T* y, Tap* taps) {
  for (int64_t oy = 0; oy < p.out[0]; ++oy)
    for (int64_t ox = 0; ox < p.out[1]; ++ox) {
      const Window w = window(p, oy, ox);
      const int64_t at = (oy * p.out[1] + ox) * BLOCK;
      for (int v = 0; v < VECS; ++v) {
        vf most = splat(-std::numeric_limits<float>::infinity());
        vi from = vi{} + int32_t(w.ky0 * p.kernel[1] + w.kx0);
        each_tap<K>(p, w, [&](int64_t k, int32_t tap) SFX_LAMBDA {
          const vf value = prepared(load_as_float(x + k + v * LANES));
          from = value > most ? vi{} + tap : from;
          most = value > most ? value : most;
          from = value != value ? vi{} + tap : from;  // NaN wins, as in torch
          most = value != value ? value : most;
        });
        store_from_float(y + at + v * LANES, ACTS ? mask.apply(most, v) : most);
        const taps_of bytes = __builtin_convertvector(from, taps_of);
        std::memcpy(taps + at + v * LANES, &bytes, LANES);
      }
    }
}

template <class T>
void backward(const SfxPool& p, const Writer<T>& write, const T* g, T* dx, const Tap* taps) {
  const bool once = p.pad[0] == 0 && p.pad[1] == 0 && p.kernel[0] == p.stride[0] && p.kernel[1] == p.stride[1];
  if (!once || p.out[0] * p.kernel[0] != p.in[0] || p.out[1] * p.kernel[1] != p.in[1])
    std::memset(static_cast<void*>(dx), 0, p.in[0] * p.in[1] * BLOCK * sizeof(T));
  for (int64_t oy = 0; oy < p.out[0]; ++oy)
    for (int64_t ox = 0; ox < p.out[1]; ++ox) {
      const Window w = window(p, oy, ox);
      const int64_t at = (oy * p.out[1] + ox) * BLOCK;
      for (int v = 0; v < VECS; ++v) {
        taps_of bytes;
        std::memcpy(&bytes, taps + at + v * LANES, LANES);
        const vi from = __builtin_convertvector(bytes, vi);
        const vf value = load_as_float(g + at + v * LANES);
        each_tap<0>(p, w, [&](int64_t k, int32_t tap) SFX_LAMBDA {
          T* to = dx + k + v * LANES;
          const vf part = from == tap ? value : vf{};
          once ? write(to, part) : store_from_float(to, load_as_float(to) + part);
        });
      }
    }
}

struct Planes {  // [blocks, channels, ...]
  int64_t images, channels;
  int64_t blocks() const { return (images + BLOCK - 1) / BLOCK; }
  int64_t count() const { return blocks() * channels; }
};

template <int K, class T, bool ACTS>
void pool_planes(const SfxPool& p, const Prologue& prologue, Planes planes, const T* x, T* y, Tap* taps, int threads) {
  const int64_t in = p.in[0] * p.in[1] * BLOCK, out = p.out[0] * p.out[1] * BLOCK;
  const LaneMask tail(planes.images % BLOCK ? planes.images % BLOCK : BLOCK), all(BLOCK);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t k = 0; k < planes.count(); ++k) {
    const LaneMask& mask = k / planes.channels + 1 == planes.blocks() ? tail : all;
    forward<K>(p, Prepared<ACTS>(prologue, k % planes.channels), mask, x + k * in, y + k * out, taps + k * out);
  }
}

template <int K, class T>
void run(int direction, const SfxPool& p, const Prologue& prologue, Planes planes, const void* from, void* to,
         Tap* taps, int threads) {
  T* target = static_cast<T*>(to);
  const T* source = static_cast<const T*>(from);
  if (!direction) {
    const auto pool = prologue.mean ? pool_planes<K, T, true> : pool_planes<K, T, false>;
    return pool(p, prologue, planes, source, target, taps, threads);
  }
  const int64_t in = p.in[0] * p.in[1] * BLOCK, out = p.out[0] * p.out[1] * BLOCK;
  const Writer<T> write(planes.count() * in);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t k = 0; k < planes.count(); ++k) {
    backward(p, write, source + k * out, target + k * in, taps + k * out);
    if (write.past_caches) fence();
  }
}

template <class T>
auto runner(const SfxPool& p) {
  const int64_t side = p.kernel[0] == p.kernel[1] ? p.kernel[0] : 0;
  return side == 2 ? run<2, T> : side == 3 ? run<3, T> : run<0, T>;
}

}  // namespace
}  // namespace sfx

extern "C" void sfx_max_pool(int direction, int dtype, const SfxPool* pool, const SfxPrologue* prologue, int64_t images,
                             int64_t channels, const void* from, void* to, uint8_t* taps, int threads) {
  using namespace sfx;
  (dtype ? runner<bf16>(*pool) : runner<float>(*pool))(direction, *pool, prologue_of(prologue), {images, channels}, from,
                                                       to, taps, team(threads));
}
