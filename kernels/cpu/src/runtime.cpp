#include "runtime.h"

#include "abi.h"
#include "simd.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>

namespace sfx {
namespace {

constexpr int SLOTS = 3;
constexpr size_t HUGE_PAGE = size_t(2) << 20;

struct Arena {
  char* data = nullptr;
  size_t size = 0;
  ~Arena() { std::free(data); }
};
thread_local Arena arenas[SLOTS];

std::atomic<bool> forked{false};
__attribute__((constructor)) void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

}  // namespace

char* scratch(int slot, size_t bytes) {
  Arena& arena = arenas[slot];
  if (arena.size < bytes) {
    std::free(arena.data);
    arena = {nullptr, 0};
    const size_t size = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    arena.data = static_cast<char*>(std::aligned_alloc(HUGE_PAGE, size));
    if (!arena.data) throw std::bad_alloc();
    arena.size = size;
#ifdef MADV_HUGEPAGE
    madvise(arena.data, size, MADV_HUGEPAGE);
#endif
  }
  return arena.data;
}

Processor processor() {
  static const Processor found = [] {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    __get_cpuid(1, &a, &b, &c, &d);
    const unsigned family = (a >> 8 & 15) + (a >> 20 & 255), model = (a >> 4 & 15) + (a >> 12 & 0xf0);
    constexpr unsigned ZEN_5_FAMILY = 0x1a;
    if (__builtin_cpu_is("amd")) return family >= ZEN_5_FAMILY ? Processor::ZEN_5 : Processor::AMD;
    // Virtual machines hide instructions, and models: either tells.
    constexpr unsigned FEATURES = 7, AVX512_FP16 = 1u << 23;  // which Sapphire Rapids brought
    constexpr unsigned SAPPHIRE = 0x8f, EMERALD = 0xcf, GRANITE = 0xad, GRANITE_D = 0xae;
    if (family == 6 && (model == SAPPHIRE || model == EMERALD || model == GRANITE || model == GRANITE_D))
      return Processor::SAPPHIRE_RAPIDS;
    if (__get_cpuid_count(FEATURES, 0, &a, &b, &c, &d) && d & AVX512_FP16) return Processor::SAPPHIRE_RAPIDS;
#endif
    return Processor::OTHER;
  }();
  return found;
}

int team(int wanted) { return forked || wanted < 1 ? 1 : wanted; }

}  // namespace sfx

extern "C" void sfx_advise(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t first = (uintptr_t(data) + sfx::HUGE_PAGE - 1) & ~uintptr_t(sfx::HUGE_PAGE - 1);
  const uintptr_t last = (uintptr_t(data) + uintptr_t(bytes)) & ~uintptr_t(sfx::HUGE_PAGE - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

extern "C" double sfx_peak(int threads) {
  using namespace sfx;
  constexpr int64_t ROUNDS = 2000000;
  constexpr int CHAINS = 12;
  const auto start = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
  {
    vf a[CHAINS], w = splat(0.999f);
    for (int i = 0; i < CHAINS; ++i) a[i] = splat(float(i));
    for (int64_t k = 0; k < ROUNDS; ++k) {
#pragma GCC unroll 12
      for (int i = 0; i < CHAINS; ++i) a[i] = a[i] * w + w;
    }
    for (int i = 0; i < CHAINS; ++i) asm volatile("" : : "m"(a[i]));
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 2.0 * CHAINS * LANES * ROUNDS * threads / seconds / 1e9;
}
