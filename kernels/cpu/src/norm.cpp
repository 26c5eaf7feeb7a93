// BatchNorm, an optional residual and an optional ReLU on blocked activations, a channel at a time, so that every pass
// after the first reads from L2 what fits there. Partial sums are kept in double.
#include <algorithm>
#include <cmath>

#include "abi.h"
#include "io.h"
#include "runtime.h"

namespace sfx {
namespace {

constexpr int64_t FLUSH = 128;  // lines summed in fp32 before they join the double; they stay in L1

struct Channel {  // one channel of [blocks, channels, pixels, 16]
  int64_t images, channels, pixels, index;
  int64_t blocks() const { return (images + BLOCK - 1) / BLOCK; }
  int64_t at(int64_t block) const { return (block * channels + index) * pixels * BLOCK; }
  double count() const { return double(images) * double(pixels); }
};

// Calls visit(first, lines, mask, lanes) for runs of at most FLUSH lines of `lanes` existing lanes each.
template <class Visit>
void each_run(const Channel& c, Visit visit) {
  const int64_t rest = c.images % BLOCK ? c.images % BLOCK : BLOCK;
  const LaneMask tail(rest), all(BLOCK);
  for (int64_t b = 0; b < c.blocks(); ++b) {
    const bool last = b + 1 == c.blocks();
    for (int64_t p = 0; p < c.pixels; p += FLUSH)
      visit(c.at(b) + p * BLOCK, std::min(FLUSH, c.pixels - p), last ? tail : all, last ? rest : BLOCK);
  }
}

// Sums over a run's existing lanes of what visit(offset, terms) says of every native vector.
template <int N, class Visit>
void sum_run(int64_t first, int64_t lines, const LaneMask& mask, double (&total)[N], Visit visit) {
  vf sums[N][VECS] = {};
  for (int64_t p = 0; p < lines; ++p)
    for (int v = 0; v < VECS; ++v) {
      vf term[N];
      visit(first + p * BLOCK + v * LANES, term);
      for (int n = 0; n < N; ++n) sums[n][v] += term[n];
    }
  for (int n = 0; n < N; ++n)
    for (int v = 0; v < VECS; ++v) {
      const vf kept = mask.apply(sums[n][v], v);
      for (int i = 0; i < LANES; ++i) total[n] += kept[i];
    }
}

// Mean and sum of squared deviations in one pass over memory; runs are joined as in Chan, Golub and LeVeque 1983,
// "Algorithms for computing the sample variance". Deviations are taken from the mean of the runs before, and a run is
// only read again, from L1, where that lies farther from its own mean than its values do: little cancels.
template <class T>
void moments(const T* x, const Channel& c, double* mean, double* squares) {
  double n = 0;
  *mean = *squares = 0;
  each_run(c, [&](int64_t first, int64_t lines, const LaneMask& mask, int64_t lanes) {
    const double count = double(lines) * double(lanes);
    float near;
    double off, square;  // of the run from `near`: mean, and sum of squares
    const auto from = [&](double center) {
      near = float(center);
      double sums[2] = {0, 0};
      sum_run(first, lines, mask, sums, [&, held = splat(near)](int64_t k, vf* t) {
        t[0] = load_as_float(x + k) - held;
        t[1] = t[0] * t[0];
      });
      off = sums[0] / count;
      square = sums[1];
    };
    from(*mean);
    if (n == 0 || off * off * count > 0.5 * square) from(near + off);
    const double apart = near + off - *mean, total = n + count;
    *mean += apart * count / total;
    *squares += std::max(0.0, square - count * off * off) + apart * apart * n * count / total;
    n = total;
  });
}

// From the last block to the first: of a channel that was just read and does not fit L2, that is what is left there.
template <class Visit>
void each(const Channel& c, Visit visit) {
  const LaneMask tail(c.images % BLOCK ? c.images % BLOCK : BLOCK), all(BLOCK);
  for (int64_t b = c.blocks() - 1; b >= 0; --b) {
    const LaneMask& mask = b + 1 == c.blocks() ? tail : all;
    for (int64_t p = 0; p < c.pixels; ++p)
      for (int v = 0; v < VECS; ++v) visit(c.at(b) + p * BLOCK + v * LANES, mask, v);
  }
}

struct Affine {
  vf mean, scale, shift;
  Affine(float m, float rstd, float weight, float bias)
      : mean(splat(m)), scale(splat(rstd * weight)), shift(splat(bias)) {}
  SFX_INLINE vf operator()(vf x) const { return (x - mean) * scale + shift; }
};

// Past the caches on the Xeons alone: on Zen that was found to be no faster.
template <class T>
Writer<T> writer(const Channel& c) {
  Writer<T> write(c.blocks() * c.channels * c.pixels * BLOCK);
  write.past_caches &= processor() == Processor::SAPPHIRE_RAPIDS;
  return write;
}

// Moves a running statistic towards a batch's.
void track(float* running, float batch, double factor) {
  *running = float(*running + factor * (double(batch) - *running));
}

template <class T>
void forward(const SfxNorm& a, Channel c) {
  const T* x = static_cast<const T*>(a.x);
  const T* residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.y);
  if (a.training) {
    double mean, squares;
    moments(x, c, &mean, &squares);
    const double var = squares / c.count();
    a.mean[c.index] = float(mean);
    a.var[c.index] = float(var);
    a.rstd[c.index] = float(1.0 / std::sqrt(var + a.eps));
    if (a.running_mean) {
      track(a.running_mean + c.index, a.mean[c.index], a.factor);
      track(a.running_var + c.index, a.var[c.index] * float(c.count() / (c.count() - 1)), a.factor);
    }
  } else if (a.running_mean) {
    a.mean[c.index] = a.running_mean[c.index];
    a.var[c.index] = a.running_var[c.index];
    a.rstd[c.index] = float(1.0 / std::sqrt(double(a.var[c.index]) + a.eps));
  }
  if (a.scale) {
    a.scale[c.index] = a.weight ? a.rstd[c.index] * a.weight[c.index] : a.rstd[c.index];
    a.shift[c.index] = a.bias ? a.bias[c.index] : 0.0f;
  }
  if (!y) return;
  const Affine affine(a.mean[c.index], a.rstd[c.index], a.weight ? a.weight[c.index] : 1.0f,
                      a.bias ? a.bias[c.index] : 0.0f);
  const Writer<T> write = writer<T>(c);
  each(c, [&](int64_t k, const LaneMask& mask, int v) {
    vf value = affine(load_as_float(x + k));
    if (residual) value += load_as_float(residual + k);
    if (a.relu) value = relu(value);
    write(y + k, mask.apply(value, v));
  });
  if (write.past_caches) fence();
}

template <class T>
void backward(const SfxNorm& a, Channel c) {
  const T* x = static_cast<const T*>(a.x);
  const T* y = static_cast<const T*>(a.y);
  const T* g = static_cast<const T*>(a.grad);
  const T* g2 = static_cast<const T*>(a.grad2);
  const T* skip = static_cast<const T*>(a.skip);
  T* dx = static_cast<T*>(a.dx);
  T* dr = static_cast<T*>(a.dresidual);
  const float weight = a.weight ? a.weight[c.index] : 1.0f;
  const Affine affine(a.mean[c.index], a.rstd[c.index], weight, a.bias ? a.bias[c.index] : 0.0f);
  const auto passed = [&](int64_t k) {  // the gradient behind the ReLU
    const vf value = g2 ? load_as_float(g + k) + load_as_float(g2 + k) : load_as_float(g + k);
    if (!a.relu) return value;
    const vf out = y ? load_as_float(y + k) : affine(load_as_float(x + k));
    return out <= 0.0f ? vf{} : value;
  };
  double sums[2] = {0, 0};
  each_run(c, [&](int64_t first, int64_t lines, const LaneMask& mask, int64_t) {
    sum_run(first, lines, mask, sums, [&](int64_t k, vf* t) {
      t[0] = passed(k);
      t[1] = t[0] * (load_as_float(x + k) - affine.mean);
    });
  });
  const double rstd = a.rstd[c.index];
  a.dbias[c.index] = float(sums[0]);
  a.dweight[c.index] = float(sums[1] * rstd);
  const vf scale = splat(float(rstd * weight));
  const vf offset = splat(a.training ? float(sums[0] / c.count()) : 0.0f);
  const vf slope = splat(a.training ? float(sums[1] * rstd * rstd / c.count()) : 0.0f);
  const Writer<T> write = writer<T>(c);
  each(c, [&](int64_t k, const LaneMask& mask, int v) {
    const vf through = passed(k);
    if (dr) write(dr + k, mask.apply(through, v));
    vf value = scale * (through - offset - (load_as_float(x + k) - affine.mean) * slope);
    if (skip) value += load_as_float(skip + k);
    write(dx + k, mask.apply(value, v));
  });
  if (write.past_caches) fence();
}

template <class T>
float sum(const T* x, Channel c) {
  double total[1] = {0};
  each_run(c, [&](int64_t first, int64_t lines, const LaneMask& mask, int64_t) {
    sum_run(first, lines, mask, total, [&](int64_t k, vf* t) { t[0] = load_as_float(x + k); });
  });
  return float(total[0]);
}

}  // namespace
}  // namespace sfx

extern "C" void sfx_channel_sums(int dtype, const void* x, int64_t images, int64_t channels, int64_t pixels,
                                 float* sums, int threads) {
  using namespace sfx;
  const int n = team(threads);
#pragma omp parallel for num_threads(n) if (n > 1) schedule(static)
  for (int64_t k = 0; k < channels; ++k) {
    const Channel c{images, channels, pixels, k};
    sums[k] = dtype ? sum(static_cast<const bf16*>(x), c) : sum(static_cast<const float*>(x), c);
  }
}

extern "C" void sfx_norm(int direction, int dtype, const SfxNorm* a, int64_t images, int64_t channels, int64_t pixels,
                         int threads) {
  using namespace sfx;
  const auto run = direction ? (dtype ? backward<bf16> : backward<float>) : (dtype ? forward<bf16> : forward<float>);
  const int n = team(threads);
#pragma omp parallel for num_threads(n) if (n > 1) schedule(dynamic, 1)
  for (int64_t c = 0; c < channels; ++c) run(*a, {images, channels, pixels, c});
}
