// LANES x LANES transposition by log2(LANES) rounds of perfect shuffles.
#pragma once
#include <utility>

#include "simd.h"

namespace sfx {

template <int HALF, int... I>
SFX_INLINE vf interleave(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + HALF * LANES / 2 + (I % 2) * LANES)...);
}

SFX_INLINE void transpose(vf (&r)[LANES]) {
  constexpr std::make_integer_sequence<int, LANES> lanes;
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
    vf s[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      s[2 * i] = interleave<0>(r[i], r[i + LANES / 2], lanes);
      s[2 * i + 1] = interleave<1>(r[i], r[i + LANES / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) r[i] = s[i];
  }
}

// Lane i of the result is the sum of the lanes of r[i].
SFX_INLINE vf sum_each(const vf* r) {
  constexpr std::make_integer_sequence<int, LANES> lanes;
  vf s[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) s[i] = r[i];
#pragma GCC unroll 4
  for (int n = LANES / 2; n; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) s[i] = interleave<0>(s[i], s[i + n], lanes) + interleave<1>(s[i], s[i + n], lanes);
  return s[0];
}

}  // namespace sfx
