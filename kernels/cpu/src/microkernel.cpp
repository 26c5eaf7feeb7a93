#include "microkernel.h"

#include "transpose.h"

namespace sfx {
namespace {

constexpr int REGISTERS = LANES == 16 ? 32 : 16;
constexpr int MAX_TILE = REGISTERS == 32 ? 28 : 12;
constexpr int64_t VEC = LANES * 4;

template <int G, int X>
SFX_INLINE void accumulate(const char* x, int64_t pitch, const uint32_t* offset, const float* value, uint32_t count,
                           vf (&sum)[G * X]) {
  for (uint32_t k = 0; k < count; ++k) {
    const char* p = x + offset[k];
    const vf w = splat(value[k]);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 32
      for (int i = 0; i < X; ++i) sum[g * X + i] += w * load(p + i * VEC);
      p += pitch;
    }
  }
}

template <int G, int X>
void fma_kernel(const char* x, int64_t pitch, const Record* records, int64_t n, const uint32_t* offset,
                const float* value, char* acc, bool first, Ahead& ahead) {
  constexpr int P = G * X;
  for (int64_t r = 0; r < n; ++r) {
    char* out = acc + int64_t(records[r].channel) * (P * VEC);
    const uint32_t count = records[r].count;
    vf sum[P];
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) sum[i] = first ? vf{} : load(out + i * VEC);
    accumulate<G, X>(x, pitch, offset, value, count, sum);
#pragma GCC unroll 32
    for (int i = 0; i < P; ++i) store(out + i * VEC, sum[i]);
    offset += count;
    value += count;
    ahead.step();
  }
}

constexpr int HELD_SUMS = 64;  // entries whose lanes wait in L1 to be summed, a multiple of LANES

// partial[i] += sum of the lanes of sums[i]; the entries up to the next multiple of LANES are used as scratch, so
// that `partial` has room for LANES - 1 more.
__attribute__((noinline)) void flush(vf* sums, int n, float* partial) {
  for (int i = n; i % LANES; ++i) sums[i] = vf{};
  for (int i = 0; i < n; i += LANES) store(partial + i, load(partial + i) + sum_each(sums + i));
}

template <int G, int X>
void dot_kernel(const char* x, int64_t pitch, const Record* records, int64_t n, const uint32_t* offset, const char* g,
                int64_t g_channel, int64_t g_row, float* partial, Ahead& ahead) {
  constexpr int P = G * X;
  constexpr int CHAINS = P >= 16 ? 4 : P >= 4 ? 2 : 1;
  vf sums[HELD_SUMS];
  int used = 0;
  for (int64_t r = 0; r < n; ++r) {
    const char* gp = g + int64_t(records[r].channel) * g_channel;
    for (uint32_t left = records[r].count; left;) {
      if (used + left > HELD_SUMS && used) {
        flush(sums, used, partial);
        partial += used;
        used = 0;
      }
      const uint32_t m = left < HELD_SUMS ? left : HELD_SUMS;
      vf held[P];
#pragma GCC unroll 4
      for (int j = 0; j < G; ++j)
#pragma GCC unroll 32
        for (int i = 0; i < X; ++i) held[j * X + i] = load(gp + j * g_row + i * VEC);
      for (uint32_t k = 0; k < m; ++k) {
        const char* p = x + offset[k];
        vf chain[CHAINS];
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) chain[c] = held[c] * load(p + c / X * pitch + c % X * VEC);
#pragma GCC unroll 4
        for (int j = 0; j < G; ++j) {
#pragma GCC unroll 32
          for (int i = 0; i < X; ++i)
            if (j * X + i >= CHAINS) chain[(j * X + i) % CHAINS] += held[j * X + i] * load(p + i * VEC);
          p += pitch;
        }
#pragma GCC unroll 4
        for (int c = 1; c < CHAINS; ++c) chain[0] += chain[c];
        sums[used + k] = chain[0];
      }
      used += m;
      left -= m;
      offset += m;
    }
    ahead.step();
  }
  flush(sums, used, partial);
}

template <int G, int X>
constexpr Microkernel entry() {
  if constexpr (G * X <= MAX_TILE)
    return {G, X, fma_kernel<G, X>, dot_kernel<G, X>};
  else
    return {G, X, nullptr, nullptr};
}

const Microkernel TABLE[] = {
    entry<1, 1>(),  entry<1, 2>(),  entry<1, 3>(),  entry<1, 4>(),  entry<1, 5>(),  entry<1, 6>(),  entry<1, 7>(),
    entry<1, 8>(),  entry<1, 10>(), entry<1, 12>(), entry<1, 14>(), entry<1, 16>(), entry<1, 20>(), entry<1, 24>(),
    entry<1, 28>(), entry<2, 1>(),  entry<2, 2>(),  entry<2, 3>(),  entry<2, 4>(),  entry<2, 5>(),  entry<2, 6>(),
    entry<2, 7>(),  entry<2, 8>(),  entry<2, 10>(), entry<2, 12>(), entry<2, 14>(), entry<3, 1>(),  entry<3, 2>(),
    entry<3, 3>(),  entry<3, 4>(),  entry<3, 5>(),  entry<3, 6>(),  entry<3, 7>(),  entry<3, 8>(),  entry<4, 1>(),
    entry<4, 2>(),  entry<4, 3>(),  entry<4, 4>(),  entry<4, 5>(),  entry<4, 6>(),  entry<4, 7>(),
};
constexpr int COUNT = sizeof(TABLE) / sizeof(TABLE[0]);

}  // namespace

const Microkernel* microkernels(int* count) {
  *count = COUNT;
  return TABLE;
}

const Microkernel* find_microkernel(int rows, int vectors) {
  for (const Microkernel& m : TABLE)
    if (m.rows == rows && m.vectors == vectors) return m.fma ? &m : nullptr;
  return nullptr;
}

}  // namespace sfx
