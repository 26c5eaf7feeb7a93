// Scratch memory and threads.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sfx {

// At least `bytes` of 64-byte aligned scratch of the calling thread; its content is undefined, and the next call
// with the same slot invalidates it. Throws std::bad_alloc.
char* scratch(int slot, size_t bytes);

// The team to use when the caller asks for `wanted` threads: 1 in a forked child, where the parent's pool is gone.
int team(int wanted);

constexpr int64_t align64(int64_t bytes) { return (bytes + 63) & ~int64_t(63); }

}  // namespace sfx
