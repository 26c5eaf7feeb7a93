// One pass over memory for what sparse training does to dense weights, gradients and moments, and to gradients of
// activations.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "abi.h"
#include "runtime.h"
#include "simd.h"

namespace {

constexpr int64_t WORD = 64;            // bytes of a mask whose bits make a word
constexpr int64_t WORDS = 1 << 10;      // that are worth a thread

constexpr int64_t CHUNK = 1 << 14;

// The chunks of several arrays, in their order; sizes[a * pitch] elements has array a.
struct Chunks {
  const int64_t* sizes;
  int64_t pitch;
  std::vector<int64_t> first;  // chunk of each array, then how many there are

  Chunks(const int64_t* of, int64_t stride, int64_t count) : sizes(of), pitch(stride), first(count + 1) {
    for (int64_t a = 0; a < count; ++a) first[a + 1] = first[a] + (sizes[a * pitch] + CHUNK - 1) / CHUNK;
  }
  // Calls run(chunk, array, start, count) for each. A thread has the same part of an array in all passes over it.
  template <class F>
  void each(int threads, F&& run) const {
#pragma omp parallel num_threads(threads) if (threads > 1 && first.back() > 1)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      for (int64_t a = 0; a + 1 < int64_t(first.size()); ++a) {
        const int64_t n = first[a + 1] - first[a];
        for (int64_t c = n * thread / team; c < n * (thread + 1) / team; ++c)
          run(first[a] + c, a, c * CHUNK, std::min(CHUNK, sizes[a * pitch] - c * CHUNK));
      }
    }
  }
};

template <class F>
void in_chunks(int64_t n, int threads, F&& run) {
  Chunks(&n, 1, 1).each(threads, [&](int64_t, int64_t, int64_t start, int64_t count) { run(start, count); });
}

uint64_t bits_of(const uint8_t* mask) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  const auto half = [](const uint8_t* at) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return uint64_t(~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()))));
  };
  return half(mask) | half(mask + 32) << 32;
#else
  uint64_t bits = 0;
  for (int64_t i = 0; i < WORD; ++i) bits |= uint64_t(mask[i] != 0) << i;
  return bits;
#endif
}

// Calls run(word, bits) for each word of a mask.
template <class F>
void each_word(const uint8_t* mask, int64_t n, int threads, F&& run) {
  const int64_t whole = n / WORD;
#pragma omp parallel for num_threads(threads) if (threads > 1 && whole >= 2 * WORDS) schedule(static, WORDS)
  for (int64_t w = 0; w < whole; ++w) run(w, bits_of(mask + w * WORD));
  if (n % WORD) {
    uint8_t rest[WORD] = {};
    std::memcpy(rest, mask + whole * WORD, n % WORD);
    run(whole, bits_of(rest));
  }
}

}  // namespace

extern "C" {

void sfx_mask_pack(const uint8_t* mask, uint64_t* bits, int64_t n, int threads) {
  each_word(mask, n, sfx::team(threads), [&](int64_t w, uint64_t found) { bits[w] = found; });
}

int sfx_masks_same(const int64_t* masks, int64_t count, int threads) {
  std::atomic<bool> same{true};
  for (const int64_t* m = masks; m < masks + 3 * count && same; m += 3) {
    const uint64_t* bits = reinterpret_cast<const uint64_t*>(m[1]);
    each_word(reinterpret_cast<const uint8_t*>(m[0]), m[2], sfx::team(threads), [&](int64_t w, uint64_t found) {
      if (found != bits[w]) same.store(false, std::memory_order_relaxed);
    });
  }
  return same;
}

void sfx_masked_copy(const float* x, const uint8_t* mask, float* out, int64_t n, int threads) {
  in_chunks(n, sfx::team(threads), [&](int64_t start, int64_t count) {
    const float* from = x + start;
    const uint8_t* exists = mask + start;
    float* to = out + start;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = exists[i] ? from[i] : 0.0f;
  });
}

void sfx_masked_fold(const int64_t* arrays, const float* factors, int64_t count, int threads) {
  Chunks(arrays + 4, 5, count).each(sfx::team(threads), [&](int64_t, int64_t array, int64_t start, int64_t n) {
    const int64_t* a = arrays + 5 * array;
    float *m = reinterpret_cast<float*>(a[0]) + start, *w = reinterpret_cast<float*>(a[2]) + start;
    const float* grad = reinterpret_cast<const float*>(a[1]) + start;
    const uint8_t* exists = reinterpret_cast<const uint8_t*>(a[3]) + start;
    const float seen = factors[2 * array], alpha = factors[2 * array + 1];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float folded = m[i] + alpha * (grad[i] * seen), kept = w[i];
      m[i] = exists[i] ? m[i] : folded;
      w[i] = exists[i] ? kept : 0.0f;
    }
  });
}

void sfx_add(const float* a, const float* b, float* out, int64_t n, int threads) {
  in_chunks(n, sfx::team(threads), [&](int64_t start, int64_t count) {
#pragma omp simd
    for (int64_t i = start; i < start + count; ++i) out[i] = a[i] + b[i];
  });
}

void sfx_column_sums(const float* x, int64_t rows, int64_t columns, float* sums, int threads) {
  constexpr int64_t TOGETHER = 64, LARGE = 1 << 16;
  const int64_t groups = (columns + TOGETHER - 1) / TOGETHER;
#pragma omp parallel for num_threads(sfx::team(threads)) if (threads > 1 && rows * columns >= LARGE) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * TOGETHER, n = std::min(TOGETHER, columns - first);
    double total[TOGETHER] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x + r * columns + first;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) total[c] += row[c];
    }
    for (int64_t c = 0; c < n; ++c) sums[first + c] = float(total[c]);
  }
}

void sfx_relu_backward(const float* grad, const float* y, float* out, int64_t n, int threads) {
  in_chunks(n, sfx::team(threads), [&](int64_t start, int64_t count) {
    int64_t i = start;
    for (const int64_t last = start + count - count % sfx::LANES; i < last; i += sfx::LANES)
      sfx::store(out + i, sfx::load(y + i) <= 0.0f ? sfx::vf{} : sfx::load(grad + i));
    for (; i < start + count; ++i) out[i] = y[i] <= 0.0f ? 0.0f : grad[i];
  });
}

// The sums do not depend on the number of threads.
void sfx_products(const int64_t* arrays, int64_t count, double* sums, int threads) {
  const Chunks chunks(arrays + 2, 3, count);
  std::vector<double> parts(2 * chunks.first.back());
  chunks.each(sfx::team(threads), [&](int64_t c, int64_t array, int64_t start, int64_t n) {
    const int64_t* a = arrays + 3 * array;
    const float* left = reinterpret_cast<const float*>(a[0]) + start;
    const float* right = reinterpret_cast<const float*>(a[1]) + start;
    double ab = 0, bb = 0;
#pragma omp simd reduction(+ : ab, bb)
    for (int64_t i = 0; i < n; ++i) {
      ab += double(left[i]) * double(right[i]);
      bb += double(right[i]) * double(right[i]);
    }
    parts[2 * c] = ab;
    parts[2 * c + 1] = bb;
  });
  for (int64_t a = 0; a < count; ++a) {
    sums[2 * a] = sums[2 * a + 1] = 0;
    for (int64_t c = chunks.first[a]; c < chunks.first[a + 1]; ++c) {
      sums[2 * a] += parts[2 * c];
      sums[2 * a + 1] += parts[2 * c + 1];
    }
  }
}

}  // extern "C"
