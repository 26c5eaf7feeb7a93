// Vector width and element types. One source serves every width: LANES is set by the build.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef SFX_LANES
#define SFX_LANES 4
#endif

#define SFX_INLINE inline __attribute__((always_inline))
#define SFX_LAMBDA __attribute__((always_inline))

namespace sfx {

constexpr int LANES = SFX_LANES;           // floats in a native vector
constexpr int BLOCK = 16;                  // images in a block
constexpr int VECS = BLOCK / LANES;        // native vectors in a line
constexpr int64_t LINE = BLOCK * 4;        // bytes of a line: one position of one block in fp32

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef float vf_unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

SFX_INLINE vf load(const void* p) { return *static_cast<const vf_unaligned*>(p); }
SFX_INLINE void store(void* p, vf v) { *static_cast<vf_unaligned*>(p) = v; }
SFX_INLINE vf splat(float s) { return s - vf{}; }
SFX_INLINE vf relu(vf v) { return v < 0.0f ? vf{} : v; }  // NaN stays NaN

// `v` in lanes whose byte is not zero, zero in the others.
SFX_INLINE vf keep(vf v, const uint8_t* lanes) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lanes));
  return (vf)_mm512_maskz_mov_ps(_mm_test_epi8_mask(bytes, bytes), (__m512)v);
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
  return (vf)_mm256_andnot_ps((__m256)_mm256_cmpeq_epi32(wide, _mm256_setzero_si256()), (__m256)v);
#else
  for (int i = 0; i < LANES; ++i) v[i] = lanes[i] ? v[i] : 0.0f;
  return v;
#endif
}

// Writes a vector past the caches. `p` is aligned to the vector. Followed by fence() before others may read.
SFX_INLINE void stream(float* p, vf v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
SFX_INLINE void fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

struct bf16 {
  uint16_t bits;
};

SFX_INLINE float to_float(float x) { return x; }
SFX_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T>
SFX_INLINE T from_float(float x);
template <>
SFX_INLINE float from_float<float>(float x) { return x; }
template <>
SFX_INLINE bf16 from_float<bf16>(float x) {  // round to nearest even, NaN stays NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {uint16_t(x != x ? (u >> 16) | 0x40 : rounded)};
}

// A native vector from LANES consecutive elements of storage, widened to fp32.
SFX_INLINE vf load_as_float(const float* p) { return load(p); }
SFX_INLINE vf load_as_float(const bf16* p) {
  typedef uint16_t half __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
  typedef uint32_t wide __attribute__((vector_size(LANES * 4)));
  wide w = __builtin_convertvector(*reinterpret_cast<const half*>(p), wide) << 16;
  return (vf)w;
}

SFX_INLINE void store_from_float(float* p, vf v) { store(p, v); }
SFX_INLINE void store_from_float(bf16* p, vf v) {
  typedef uint16_t half __attribute__((vector_size(LANES * 2)));
  typedef uint32_t wide __attribute__((vector_size(LANES * 4)));
  wide u = (wide)v;
  wide rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  wide nan = (u >> 16) | 0x40;
  half h = __builtin_convertvector(v == v ? rounded : nan, half);
  std::memcpy(p, &h, sizeof h);
}

}  // namespace sfx
