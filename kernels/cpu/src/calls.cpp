// Runs lists of calls of this library that were made ready once.
#include <cstring>
#include <type_traits>
#include <utility>

#include "abi.h"

namespace {

using Caller = int (*)(const int64_t* arguments, int threads);

template <class T>
T as(int64_t word) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(word);
  else
    return T(word);
}

// Calls f with a word for each argument but the last, which is the number of threads.
template <auto f>
struct Words;
template <class R, class... A, R (*f)(A...)>
struct Words<f> {
  template <size_t... k>
  static int call(const int64_t* w, int threads, std::index_sequence<k...>) {
    const auto argument = [&](auto type, size_t at) {
      using T = typename decltype(type)::type;
      return at + 1 < sizeof...(A) ? as<T>(w[at]) : as<T>(threads);
    };
    if constexpr (std::is_void_v<R>) {
      f(argument(std::common_type<A>{}, k)...);
      return 0;
    } else {
      return f(argument(std::common_type<A>{}, k)...);
    }
  }
  static int run(const int64_t* w, int threads) { return call(w, threads, std::index_sequence_for<A...>{}); }
};

struct Known {
  const char* name;
  Caller caller;
};
#define SFX_KNOWN(f) {#f, Words<f>::run}
constexpr Known KNOWN[] = {
    SFX_KNOWN(sfx_layer_collect),      SFX_KNOWN(sfx_layer_scatter),      SFX_KNOWN(sfx_conv_gather),
    SFX_KNOWN(sfx_conv_wgrad),         SFX_KNOWN(sfx_conv_dense_wgrad),   SFX_KNOWN(sfx_linear_rows),
    SFX_KNOWN(sfx_linear_gather),      SFX_KNOWN(sfx_linear_wgrad),       SFX_KNOWN(sfx_linear_dense_fprop),
    SFX_KNOWN(sfx_linear_dense_dgrad), SFX_KNOWN(sfx_linear_dense_wgrad), SFX_KNOWN(sfx_norm),
    SFX_KNOWN(sfx_channel_sums),       SFX_KNOWN(sfx_column_sums),        SFX_KNOWN(sfx_masked_copy),
    SFX_KNOWN(sfx_add),                SFX_KNOWN(sfx_relu_backward),      SFX_KNOWN(sfx_max_pool),
};
#undef SFX_KNOWN

}  // namespace

extern "C" {

void* sfx_caller(const char* name) {
  for (const Known& known : KNOWN)
    if (!std::strcmp(known.name, name)) return reinterpret_cast<void*>(known.caller);
  return nullptr;
}

int sfx_run(int64_t* words, const int64_t* homes, int64_t n_homes, const int64_t* bases, const int64_t* calls,
            int64_t n_calls, int threads) {
  for (const int64_t* h = homes; h < homes + 3 * n_homes; h += 3) words[h[0]] = bases[h[1]] + h[2];
  for (const int64_t* c = calls; c < calls + 2 * n_calls; c += 2)
    if (const int failed = reinterpret_cast<Caller>(c[0])(words + c[1], threads)) return failed;
  return 0;
}

}  // extern "C"
