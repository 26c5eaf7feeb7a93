// One pass over memory for what sparse training does to dense weights, gradients and moments.
#include <cmath>
#include <vector>

#include "abi.h"
#include "runtime.h"

namespace {

constexpr int64_t CHUNK = 1 << 14;

template <class F>
void in_chunks(int64_t n, int threads, F&& run) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1) schedule(static)
  for (int64_t c = 0; c < chunks; ++c) run(c, c * CHUNK, c + 1 < chunks ? CHUNK : n - c * CHUNK);
}

}  // namespace

extern "C" {

void sfx_masked_copy(const float* x, const uint8_t* mask, float* out, int64_t n, int threads) {
  in_chunks(n, sfx::team(threads), [&](int64_t, int64_t start, int64_t count) {
    const float* from = x + start;
    const uint8_t* exists = mask + start;
    float* to = out + start;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = exists[i] ? from[i] : 0.0f;
  });
}

void sfx_masked_fold(float* moment, const float* collected, float* weight, const uint8_t* mask, int64_t n, float seen,
                     float alpha, int threads) {
  in_chunks(n, sfx::team(threads), [&](int64_t, int64_t start, int64_t count) {
    float *m = moment + start, *w = weight + start;
    const float* grad = collected + start;
    const uint8_t* exists = mask + start;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float folded = m[i] + alpha * (grad[i] * seen), kept = w[i];
      m[i] = exists[i] ? m[i] : folded;
      w[i] = exists[i] ? kept : 0.0f;
    }
  });
}

// The sums do not depend on the number of threads.
void sfx_products(const float* a, const float* b, int64_t n, double* sums, int threads) {
  const int64_t chunks = (n + CHUNK - 1) / CHUNK;
  std::vector<double> parts(2 * chunks);
  in_chunks(n, sfx::team(threads), [&](int64_t c, int64_t start, int64_t count) {
    const float *left = a + start, *right = b + start;
    double ab = 0, bb = 0;
#pragma omp simd reduction(+ : ab, bb)
    for (int64_t i = 0; i < count; ++i) {
      ab += double(left[i]) * double(right[i]);
      bb += double(right[i]) * double(right[i]);
    }
    parts[2 * c] = ab;
    parts[2 * c + 1] = bb;
  });
  sums[0] = sums[1] = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    sums[0] += parts[2 * c];
    sums[1] += parts[2 * c + 1];
  }
}

}  // extern "C"
