// Outer products on the matrix units of Intel's AMX, which multiply bf16 and sum in fp32: each number is cut into three
// parts of 8 bits, and six products of parts make one that is as exact as fp32's. Sixteen times the multiply-adds of
// AVX-512 a cycle are then 2.7 times as many.
#include "dense_wgrad.h"
#include "outer_products.h"
#include "transpose.h"

#if defined(__AVX512BW__) && defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 11
#define SFX_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sfx {

#if SFX_AMX
namespace {

constexpr int SIDE = 16;   // rows of a tile, and its columns of fp32 or of pairs of bf16
constexpr int PARTS = 3;   // of a number: the first holds its highest bits
constexpr int64_t TILE = SIDE * 64, CELL = PARTS * 2 * TILE;  // bytes of a tile, and of two panels' sides at a position
static_assert(PANEL == 2 * SIDE && LANES == SIDE, "a panel is two tiles wide");

// The calling thread's tiles, all of 16 rows of 64 bytes.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = SIDE;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

template <int T>
SFX_INLINE void load_tile(const void* from, int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(pitch), "i"(T) : "memory");
}
template <int T>
SFX_INLINE void store_tile(void* to, int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(pitch), "i"(T) : "memory");
}
template <int C, int A, int B>
SFX_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// At a position lie, of each part, two tiles: rows of the input's are channels, rows of the gradient's pairs of images.
// Tiles 0 to 3 are sums of inputs x outputs, 4 and 5 hold a part of the inputs, 6 and 7 one of the outputs.
template <int WIDTH, int PART, int T>
SFX_INLINE void load_tiles(const char* cell) {
  load_tile<T>(cell + PART * 2 * TILE, 64);
  if constexpr (WIDTH == 2) load_tile<T + 1>(cell + PART * 2 * TILE + TILE, 64);
}
template <int INPUTS, int PART>
SFX_INLINE void load_inputs(const char* cell) { load_tiles<INPUTS, PART, 4>(cell); }
template <int OUTPUTS, int PART>
SFX_INLINE void load_outputs(const char* cell) { load_tiles<OUTPUTS, PART, 6>(cell); }
template <int INPUTS, int OUTPUTS>
SFX_INLINE void multiply() {
  multiply_tiles<0, 4, 6>();
  if constexpr (OUTPUTS == 2) multiply_tiles<1, 4, 7>();
  if constexpr (INPUTS == 2) multiply_tiles<2, 5, 6>();
  if constexpr (INPUTS == 2 && OUTPUTS == 2) multiply_tiles<3, 5, 7>();
}

// sums[input][output] += x * grad over the walk.
template <int INPUTS, int OUTPUTS>
void outer_kernel(const char* x, const char* grad, const Walk& walk, float* sums) {
  constexpr int64_t pitch = PANEL * 4;
  float* const second = sums + SIDE * PANEL;
  load_tile<0>(sums, pitch);
  if constexpr (OUTPUTS == 2) load_tile<1>(sums + SIDE, pitch);
  if constexpr (INPUTS == 2) load_tile<2>(second, pitch);
  if constexpr (INPUTS == 2 && OUTPUTS == 2) load_tile<3>(second + SIDE, pitch);
  for (int64_t b = 0; b < walk.blocks; ++b)
    for (int64_t r = 0; r < walk.rows; ++r) {
      const char* xp = x + b * walk.x_block + r * walk.x_row;
      const char* gp = grad + b * walk.g_block + r * walk.g_row;
      for (int64_t k = 0; k < walk.columns; ++k, xp += walk.x_column, gp += CELL) {
        load_inputs<INPUTS, 0>(xp);
        load_outputs<OUTPUTS, 2>(gp);
        multiply<INPUTS, OUTPUTS>();
        load_outputs<OUTPUTS, 1>(gp);
        multiply<INPUTS, OUTPUTS>();
        load_outputs<OUTPUTS, 0>(gp);
        multiply<INPUTS, OUTPUTS>();
        load_inputs<INPUTS, 2>(xp);
        multiply<INPUTS, OUTPUTS>();
        load_inputs<INPUTS, 1>(xp);
        multiply<INPUTS, OUTPUTS>();
        load_outputs<OUTPUTS, 1>(gp);
        multiply<INPUTS, OUTPUTS>();
      }
    }
  store_tile<0>(sums, pitch);
  if constexpr (OUTPUTS == 2) store_tile<1>(sums + SIDE, pitch);
  if constexpr (INPUTS == 2) store_tile<2>(second, pitch);
  if constexpr (INPUTS == 2 && OUTPUTS == 2) store_tile<3>(second + SIDE, pitch);
}

typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(64)));

// The parts of two blocks of images: the highest 8 bits of each number, of what is left, and of what is left then.
SFX_INLINE void split(vf first, vf second, vf (&parts)[PARTS]) {
  for (int i = 0; i < PARTS; ++i) {
    const vf high_first = (vf)((vu)first & 0xffff0000u), high_second = (vf)((vu)second & 0xffff0000u);
    parts[i] = (vf)__builtin_shufflevector((vh)first, (vh)second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29,
                                           31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
    first -= high_first;
    second -= high_second;
  }
}

// Cells of `n` channels at `positions` positions. `from` is the first block's, where channels lie `channel` floats apart;
// the second block lies `block` floats behind, if there is one. Rows of tiles are channels, or where `turned` pairs of
// images; zero for channels that are not there.
template <bool TURNED>
void pack(const float* from, int64_t channel, int64_t block, bool second, int64_t n, int64_t positions, char* out) {
  for (int64_t k0 = 0; k0 < n; k0 += SIDE)
    for (int64_t x = 0; x < positions; ++x) {
      char* const to = out + x * CELL + k0 / SIDE * TILE;
      vf m[PARTS][SIDE];
      for (int i = 0; i < SIDE; ++i) {
        const float* at = from + (k0 + i) * channel + x * BLOCK;
        const bool there = k0 + i < n;
        vf parts[PARTS];
        split(there ? load(at) : vf{}, there && second ? load(at + block) : vf{}, parts);
        for (int p = 0; p < PARTS; ++p) {
          if constexpr (TURNED)
            m[p][i] = parts[p];
          else
            store(to + p * 2 * TILE + i * 64, parts[p]);
        }
      }
      for (int p = 0; TURNED && p < PARTS; ++p) {
        transpose(m[p]);
        for (int i = 0; i < SIDE; ++i) store(to + p * 2 * TILE + i * 64, m[p][i]);
      }
    }
}

// Matrix units, of which one instruction sums the products of two blocks of images.
struct Matrices {
  using Thread = Tiles;
  static constexpr int64_t DEPTH = 2, MAX_INPUTS = 2 * SIDE, INPUT_STEP = SIDE, GRAD_CELL = CELL;
  static int64_t input_cell(int64_t) { return CELL; }
  static constexpr auto pack_grad = pack<true>, pack_input = pack<false>;
  static void multiply(int64_t inputs, int64_t outputs, const char* x, const char* grad, const Walk& walk, float* sums) {
    const auto kernel = inputs > SIDE ? (outputs > SIDE ? outer_kernel<2, 2> : outer_kernel<2, 1>)
                                      : (outputs > SIDE ? outer_kernel<1, 2> : outer_kernel<1, 1>);
    kernel(x, grad, walk, sums);
  }
};

bool permitted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned FEATURES = 7, AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24, TILE_DATA = 18;
  if (!__get_cpuid_count(FEATURES, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
  constexpr long REQUEST_PERMISSION = 0x1023;  // of arch_prctl: the kernel saves tiles for those alone who ask
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

bool has_amx() {
  static const bool found = permitted();
  return found;
}

void dense_wgrad_amx(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                     bool channels_last, float* out, int threads) {
  // Packing the input costs more the fewer taps and outputs read it.
  const int64_t panels = shape.taps() < 4 || shape.stride[0] * shape.stride[1] > 1 ? 4 : 2;
  outer_products<Matrices>(shape, grad, x, blocks, h, w, panels, channels_last, out, threads);
}
#else
bool has_amx() { return false; }
void dense_wgrad_amx(const ConvShape&, const float*, const float*, int64_t, int64_t, int64_t, bool, float*, int) {}
#endif

}  // namespace sfx
