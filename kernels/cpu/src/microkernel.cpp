#include "microkernel.h"

#include <utility>

#include "transpose.h"

namespace sfx {
namespace {

constexpr int64_t VEC = LANES * 4;

// G rows of X native vectors; clipped if a column's vectors S are given.
template <int G, int X, int S = 0>
struct Tile {
  static constexpr int ROWS = G, VECTORS = X, P = G * X, COLUMN = S;
};

// The part of a tile that entries of class K touch.
template <class T, int K>
struct Part {
  static constexpr int TOP = K / CLIPS == FIRST_OUTPUT, BOTTOM = T::ROWS - (K / CLIPS == LAST_OUTPUT);
  static constexpr int LEFT = K % CLIPS == FIRST_OUTPUT ? T::COLUMN : 0;
  static constexpr int RIGHT = T::VECTORS - (K % CLIPS == LAST_OUTPUT ? T::COLUMN : 0);
};

// Calls body(class, entries) for each class of a record, or once for all entries of a tile that is not clipped.
template <class Body, int... K>
SFX_INLINE void each_class(const Runs& runs, std::integer_sequence<int, K...>, Body body) {
  (body(std::integral_constant<int, K>(), runs.of[K]), ...);
}
template <class T, class Body>
SFX_INLINE void each_class(uint32_t count, const Runs* runs, int64_t record, Body body) {
  if constexpr (T::COLUMN)
    each_class(runs[record], std::make_integer_sequence<int, CLASSES>(), body);
  else
    body(std::integral_constant<int, 0>(), count);
}

template <class T, int K>
SFX_INLINE void accumulate(const char* x, int64_t pitch, const uint32_t* offset, const float* value, uint32_t count,
                           vf (&sum)[T::P]) {
  using R = Part<T, K>;
  const auto add = [&](uint32_t k) SFX_LAMBDA {
    const char* p = x + offset[k];
    const vf w = splat(value[k]);
#pragma GCC unroll 8
    for (int g = R::TOP; g < R::BOTTOM; ++g) {
#pragma GCC unroll 32
      for (int i = R::LEFT; i < R::RIGHT; ++i) sum[g * T::VECTORS + i] += w * load(p + (i - R::LEFT) * VEC);
      p += pitch;
    }
  };
  if constexpr (T::COLUMN) {  // a class has few entries, and how many is hard to predict: one branch, not two
#pragma GCC unroll 1
    for (uint32_t k = 0; k < count; ++k) add(k);
  } else {
#pragma GCC unroll 2
    for (uint32_t k = 0; k < count; ++k) add(k);
  }
}

template <int P>
SFX_INLINE void put(const Sink& sink, uint32_t channel, vf (&sum)[P]) {
  char* out = sink.out + int64_t(channel) * sink.channel_bytes;
  if (sink.bias) {
    const vf bias = splat(sink.bias[channel]);
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) sum[i] += bias;
  }
  if (sink.residual) {
    const char* residual = sink.residual + int64_t(channel) * sink.channel_bytes;
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) sum[i] += load(residual + sink.at[i]);
  }
  if (sink.relu) {
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) sum[i] = relu(sum[i]);
  }
  if (sink.past_caches) {
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) stream(reinterpret_cast<float*>(out + sink.at[i]), sum[i]);
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) store(out + sink.at[i], sum[i]);
  }
}

// The residual of a record, which put() will read.
template <int P>
SFX_INLINE void fetch(const Sink& sink, uint32_t channel) {
  const char* residual = sink.residual + int64_t(channel) * sink.channel_bytes;
#pragma GCC unroll 32
  for (int i = 0; i < P; ++i) __builtin_prefetch(residual + sink.at[i]);
}

template <class T>
void fma_kernel(const char* x, int64_t pitch, const Record* records, const Runs* runs, int64_t n,
                const uint32_t* offset, const float* value, char* acc, bool first, const Sink* sink, Ahead& ahead) {
  constexpr int P = T::P;
  for (int64_t r = 0; r < n; ++r) {
    char* out = acc + int64_t(records[r].channel) * (P * VEC);
    if (sink && sink->residual) fetch<P>(*sink, records[r].channel);
    vf sum[P];
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) sum[i] = first ? vf{} : load(out + i * VEC);
    each_class<T>(records[r].count, runs, r, [&]([[maybe_unused]] auto k, uint32_t count) SFX_LAMBDA {
      accumulate<T, decltype(k)::value>(x, pitch, offset, value, count, sum);
      offset += count;
      value += count;
    });
    if (sink) {
      put<P>(*sink, records[r].channel, sum);
    } else {
#pragma GCC unroll 32
      for (int i = 0; i < P; ++i) store(out + i * VEC, sum[i]);
    }
    ahead.step();
  }
}

constexpr int HELD_SUMS = 64;  // slots whose lanes wait in L1 to be summed, a multiple of LANES

// Slots whose sums share a vector before they wait. The more there are, the less is stored and loaded; a record's last
// vector may have empty ones, and so would each class of a clipped tile's few entries.
template <class T>
constexpr int group() {
  const int most = REGISTERS == 32 || T::P <= 4 ? 4 : 2;  // whose sums stay in registers beside the gradient
  return T::COLUMN || T::P + most > REGISTERS - 4 ? 1 : most;
}

// partial[i] += sum of the lanes of slot i; the slots up to the next multiple of LANES are used as scratch, so
// that `partial` has room for LANES - 1 more.
template <int GROUP>
__attribute__((noinline)) void flush(vf* sums, int n, float* partial) {
  constexpr int VECTORS = LANES / GROUP;
  for (int i = n; i % VECTORS; ++i) sums[i] = vf{};
  for (int i = 0; i < n; i += VECTORS)
    store(partial + i * GROUP, load(partial + i * GROUP) + sum_groups<GROUP>(sums + i));
}

// g * x over the part of the tile that class K touches.
template <class T, int K>
SFX_INLINE vf multiply(const char* x, int64_t pitch, const vf (&g)[T::P]) {
  using R = Part<T, K>;
  constexpr int CHAINS = T::P >= 16 ? 2 : 1;
  vf chain[CHAINS] = {};
#pragma GCC unroll 8
  for (int j = R::TOP; j < R::BOTTOM; ++j) {
#pragma GCC unroll 32
    for (int i = R::LEFT; i < R::RIGHT; ++i) {
      const int at = j * T::VECTORS + i;
      chain[at % CHAINS] += g[at] * load(x + (i - R::LEFT) * VEC);
    }
    x += pitch;
  }
#pragma GCC unroll 4
  for (int c = 1; c < CHAINS; ++c) chain[0] += chain[c];
  return chain[0];
}

// The same for each of `count` entries, whose slots are rounded up to the group. Returns how many vectors they take.
template <class T, int K>
SFX_INLINE uint32_t multiply_each(const char* x, int64_t pitch, const uint32_t* offset, uint32_t count,
                                  const vf (&g)[T::P], vf* sums) {
  constexpr uint32_t GROUP = group<T>();
  vf* const first = sums;
  for (; count >= GROUP; count -= GROUP, offset += GROUP) {
    vf s[GROUP];
#pragma GCC unroll 4
    for (uint32_t i = 0; i < GROUP; ++i) s[i] = multiply<T, K>(x + offset[i], pitch, g);
    *sums++ = sum_group(s);
  }
  if constexpr (GROUP > 1) {
    if (count) {
      vf s[GROUP] = {};
#pragma GCC unroll 4
      for (uint32_t i = 0; i < GROUP - 1; ++i)
        if (i < count) s[i] = multiply<T, K>(x + offset[i], pitch, g);
      *sums++ = sum_group(s);
    }
  }
  return uint32_t(sums - first);
}

template <class T>
void dot_kernel(const char* x, int64_t pitch, const Record* records, const Runs* runs, int64_t n,
                const uint32_t* offset, const char* g, int64_t g_channel, int64_t g_row, float* partial,
                Fetches& fetches) {
  constexpr uint32_t GROUP = group<T>(), MOST = HELD_SUMS / GROUP;
  vf sums[MOST];
  uint32_t used = 0;
  // The next record's gradient may lie beyond L2; on newer Xeons loading it twice costs more than waiting for it.
  const bool fetches_next = processor() != Processor::SAPPHIRE_RAPIDS;
  for (int64_t r = 0; r < n; ++r) {
    const char* tile = g + int64_t(records[r].channel) * g_channel;
    vf held[T::P];
#pragma GCC unroll 8
    for (int j = 0; j < T::ROWS; ++j)
#pragma GCC unroll 32
      for (int i = 0; i < T::VECTORS; ++i) held[j * T::VECTORS + i] = load(tile + j * g_row + i * VEC);
    if (fetches_next && r + 1 < n) {
      const char* next = g + int64_t(records[r + 1].channel) * g_channel;
#pragma GCC unroll 8
      for (int j = 0; j < T::ROWS; ++j)
#pragma GCC unroll 32
        for (int i = 0; i < T::VECTORS; ++i) __builtin_prefetch(next + j * g_row + i * VEC);
    }
    each_class<T>(records[r].count, runs, r, [&]([[maybe_unused]] auto k, uint32_t left) SFX_LAMBDA {
      while (left) {
        const uint32_t m = left < HELD_SUMS ? left : HELD_SUMS;
        if (used + (m + GROUP - 1) / GROUP > MOST) {
          flush<GROUP>(sums, used, partial);
          partial += used * GROUP;
          used = 0;
        }
        used += multiply_each<T, decltype(k)::value>(x, pitch, offset, m, held, sums + used);
        left -= m;
        offset += m;
      }
    });
    fetches.step();
  }
  flush<GROUP>(sums, used, partial);
}

template <int G, int X, int S = 0>
constexpr Microkernel entry() {
  if constexpr (G * X <= MAX_TILE)
    return {G, X, S, group<Tile<G, X, S>>(), fma_kernel<Tile<G, X, S>>, dot_kernel<Tile<G, X, S>>};
  else
    return {G, X, S, 1, nullptr, nullptr};
}

// Square tiles of N x N positions of B blocks of images.
template <int N, int B>
constexpr Microkernel clipped() {
  return entry<N, N * B * VECS, B * VECS>();
}

const Microkernel TABLE[] = {
    entry<1, 1>(),  entry<1, 2>(),  entry<1, 3>(),  entry<1, 4>(),  entry<1, 5>(),  entry<1, 6>(),  entry<1, 7>(),
    entry<1, 8>(),  entry<1, 10>(), entry<1, 12>(), entry<1, 14>(), entry<1, 16>(), entry<1, 20>(), entry<1, 24>(),
    entry<1, 28>(), entry<2, 1>(),  entry<2, 2>(),  entry<2, 3>(),  entry<2, 4>(),  entry<2, 5>(),  entry<2, 6>(),
    entry<2, 7>(),  entry<2, 8>(),  entry<2, 10>(), entry<2, 12>(), entry<2, 14>(), entry<3, 1>(),  entry<3, 2>(),
    entry<3, 3>(),  entry<3, 4>(),  entry<3, 5>(),  entry<3, 6>(),  entry<3, 7>(),  entry<3, 8>(),  entry<4, 1>(),
    entry<4, 2>(),  entry<4, 3>(),  entry<4, 4>(),  entry<4, 5>(),  entry<4, 6>(),  entry<4, 7>(),
    clipped<2, 1>(), clipped<2, 2>(), clipped<2, 3>(), clipped<2, 4>(), clipped<2, 6>(), clipped<3, 1>(),
    clipped<3, 2>(), clipped<3, 3>(), clipped<4, 1>(), clipped<5, 1>(),
};
constexpr int COUNT = sizeof(TABLE) / sizeof(TABLE[0]);

}  // namespace

const Microkernel* microkernels(int* count) {
  *count = COUNT;
  return TABLE;
}

const Microkernel* find_microkernel(int64_t rows, int64_t vectors, int64_t column) {
  for (const Microkernel& m : TABLE)
    if (m.rows == rows && m.vectors == vectors && m.column == column) return m.fma ? &m : nullptr;
  return nullptr;
}

}  // namespace sfx
