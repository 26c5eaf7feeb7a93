// Scratch memory, threads and the processor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sfx {

// At least `bytes` of 64-byte aligned scratch of the calling thread; its content is undefined, and the next call
// with the same slot invalidates it. Throws std::bad_alloc.
char* scratch(int slot, size_t bytes);

// The team to use when the caller asks for `wanted` threads: 1 in a forked child, where the parent's pool is gone.
int team(int wanted);

// Entries from which a loop that moves one number for each is shared among threads: a team takes 2 to 4 us to start.
constexpr int64_t FORK_ENTRIES = 4000;

// Processors that were found to want settings of their own. AMD: Zen 4 and older. SAPPHIRE_RAPIDS: and newer Xeons.
enum class Processor { OTHER, SAPPHIRE_RAPIDS, AMD, ZEN_5 };
Processor processor();

constexpr int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

}  // namespace sfx
