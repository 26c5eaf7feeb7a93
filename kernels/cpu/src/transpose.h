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

// a's lanes whose number has no BIT and b's that have it; where SWAPPED, instead of each the lane that differs in BIT.
template <int BIT, bool SWAPPED, int... I>
SFX_INLINE vf take_halves(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((SWAPPED ? I ^ BIT : I) + (I & BIT ? LANES : 0))...);
}

// s[i] becomes sums of lanes that differ in BIT: of s[i] where the lane's number has no BIT, else of s[i + BIT];
// then the same for the next bit below N. A blend and a shuffle a pair, where halves side by side would take two shuffles.
template <int BIT, int N>
SFX_INLINE void add_halves(vf (&s)[N]) {
  if constexpr (BIT < N) {
    constexpr std::make_integer_sequence<int, LANES> lanes;
#pragma GCC unroll 8
    for (int i = 0; i < N; i += 2 * BIT)
      s[i] = take_halves<BIT, false>(s[i], s[i + BIT], lanes) + take_halves<BIT, true>(s[i], s[i + BIT], lanes);
    add_halves<2 * BIT, N>(s);
  }
}

// The sums of the lanes of LANES vectors, one to a lane, in two steps: sum_group() of each GROUP of them, then
// sum_groups() of what these gave.
template <int GROUP>
SFX_INLINE vf sum_group(vf (&s)[GROUP]) {
  add_halves<1, GROUP>(s);
  return s[0];
}
template <int GROUP>
SFX_INLINE vf sum_groups(const vf* r) {
  vf s[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES / GROUP; ++i) s[i * GROUP] = r[i];
  add_halves<GROUP, LANES>(s);
  return s[0];
}

}  // namespace sfx
