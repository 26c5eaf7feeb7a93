// The C ABI of convolution and linear layers.
#include "abi.h"

#include <stdexcept>

#include "dense_wgrad.h"
#include "drivers.h"

using namespace sfx;

namespace {

thread_local char message[256];
constexpr int64_t LARGEST_ROW = 512 << 10;  // bytes of a dense weight's row that is made in cache

template <class Body>
int guarded(Body body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) {
    std::strcpy(message, "out of memory");
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
  }
  return 1;
}

ConvShape shape_of(const int64_t* s) {
  return {s[0], s[1], {s[2], s[3]}, {s[4], s[5]}, {s[6], s[7]}, {s[8], s[9]}, s[10]};
}
int64_t blocks_of(int64_t images) { return (images + BLOCK - 1) / BLOCK; }

// values[e] = weight of existing weight e, in Pattern order.
template <class T>
void collect(const Pattern& p, const uint32_t* column, const T* weight, float* values, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && p.nnz() > FORK_ENTRIES) schedule(static)
  for (int64_t o = 0; o < p.shape.out; ++o)
    for (uint32_t e = p.row[o]; e < p.row[o + 1]; ++e)
      values[e] = to_float(weight[o * p.row_size() + column[e]]);
}

// The dense gradient: zero where no weight exists. A large one is made row by row in cache and written past it.
template <class T>
void scatter(const Pattern& p, const uint32_t* column, const float* values, T* dense, int threads) {
  const int64_t size = p.row_size(), bytes = size * sizeof(T);
  const bool past_caches = sizeof(T) == 4 && p.shape.out * bytes >= STREAMED_GRAD && bytes % 64 == 0 &&
                           bytes <= LARGEST_ROW && uintptr_t(dense) % 64 == 0;
  char* rows = past_caches ? scratch(1, bytes * threads) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    T* held = rows ? reinterpret_cast<T*>(rows + omp_get_thread_num() * bytes) : nullptr;
    if (held) std::memset(static_cast<void*>(held), 0, bytes);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < p.shape.out; ++o) {
      T* row = held ? held : dense + o * size;
      if (!held) std::memset(static_cast<void*>(row), 0, bytes);
      for (uint32_t e = p.row[o]; e < p.row[o + 1]; ++e) row[column[e]] = from_float<T>(values[e]);
      if (!held) continue;
      for (int64_t k = 0; k < size; k += LANES)
        stream(reinterpret_cast<float*>(dense + o * size + k), load(held + k));
      for (uint32_t e = p.row[o]; e < p.row[o + 1]; ++e) held[column[e]] = {};
    }
    if (held) fence();
  }
}

void collect_as(Layer& layer, int dtype, bool channels_last, const void* weight, float* values, int threads) {
  const uint32_t* column = layer.columns(channels_last);
  dtype ? collect(layer.pattern, column, static_cast<const bf16*>(weight), values, threads)
        : collect(layer.pattern, column, static_cast<const float*>(weight), values, threads);
}

void scatter_as(Layer& layer, int dtype, bool channels_last, const float* values, void* dense, int threads) {
  const uint32_t* column = layer.columns(channels_last);
  dtype ? scatter(layer.pattern, column, values, static_cast<bf16*>(dense), threads)
        : scatter(layer.pattern, column, values, static_cast<float*>(dense), threads);
}

template <class T>
void conv_gather(Layer& layer, PassKind kind, const void* in, int64_t images, int64_t h, int64_t w,
                 const float* values, Prologue prologue, Epilogue epilogue, void* out, int threads) {
  const auto pass = layer.pass(kind, h, w, blocks_of(images), threads);
  const Blocked<const T> x{static_cast<const T*>(in), images, pass->in_channels, pass->in_h, pass->in_w, prologue};
  const Blocked<T> y{static_cast<T*>(out), images, pass->out_channels, pass->out_h, pass->out_w};
  run_gather(*pass, x, y, values, epilogue, threads);
}

template <class T>
void conv_dot(Layer& layer, const void* grad, const void* in, int64_t images, int64_t h, int64_t w, Prologue prologue,
              float* values, int threads) {
  const auto pass = layer.pass(WGRAD, h, w, blocks_of(images), threads);
  const Blocked<const T> x{static_cast<const T*>(in), images, pass->in_channels, pass->in_h, pass->in_w, prologue};
  const Blocked<const T> g{static_cast<const T*>(grad), images, pass->out_channels, pass->out_h, pass->out_w};
  run_dot(*pass, x, g, values, threads);
}

template <class T>
void conv_pixels(Layer& layer, const void* in, int64_t images, int64_t h, int64_t w, const float* values,
                 Epilogue epilogue, void* out, int threads) {
  const auto pass = layer.pass(PIXELS, h, w, images, threads);
  const Pixels<const T> x{static_cast<const T*>(in), images, pass->in_channels, pass->in_h, pass->in_w};
  const Pixels<T> y{static_cast<T*>(out), images, pass->out_channels, pass->out_h, pass->out_w};
  run_gather(*pass, x, y, values, epilogue, threads);
}

template <class T>
void linear_rows(const Pattern& p, const T* in, int64_t images, const float* values, Epilogue epilogue, T* out,
                 int threads) {
  float* x = reinterpret_cast<float*>(scratch(0, p.shape.in * 4 + 64));
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t i = 0; i < p.shape.in; ++i) x[i] = to_float(in[n * p.shape.in + i]);
#pragma omp parallel for num_threads(threads) if (threads > 1 && p.nnz() > FORK_ENTRIES) schedule(static)
    for (int64_t o = 0; o < p.shape.out; ++o) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (uint32_t e = p.row[o]; e < p.row[o + 1]; ++e) sum += values[e] * x[p.column[e]];
      if (epilogue.bias) sum += epilogue.bias[o];
      out[n * p.shape.out + o] = from_float<T>(epilogue.relu && sum < 0 ? 0.0f : sum);
    }
  }
}

template <class T>
void linear_gather(Layer& layer, PassKind kind, const void* in, int64_t images, const float* values,
                   Epilogue epilogue, void* out, int threads) {
  const auto pass = layer.pass(kind, 1, 1, blocks_of(images), threads);
  const Rows<const T> x{static_cast<const T*>(in), images, pass->in_channels};
  const Rows<T> y{static_cast<T*>(out), images, pass->out_channels};
  run_gather(*pass, x, y, values, epilogue, threads);
}

template <class T>
void linear_dot(Layer& layer, const void* grad, const void* in, int64_t images, float* values, int threads) {
  const auto pass = layer.pass(WGRAD, 1, 1, blocks_of(images), threads);
  const Rows<const T> x{static_cast<const T*>(in), images, pass->in_channels};
  const Rows<const T> g{static_cast<const T*>(grad), images, pass->out_channels};
  run_dot(*pass, x, g, values, threads);
}

}  // namespace

extern "C" {

const char* sfx_error() { return message; }
int sfx_lanes() { return LANES; }
int sfx_amx() { return has_amx(); }

void* sfx_layer_new(const int64_t* s, const uint8_t* mask) {
  Layer* layer = nullptr;
  const ConvShape shape = shape_of(s);
  const int failed = guarded([&] {
    auto made = std::make_unique<Layer>();
    made->pattern = make_pattern(shape, mask);
    layer = made.release();
  });
  return failed ? nullptr : layer;
}

void sfx_layer_free(void* layer) { delete static_cast<Layer*>(layer); }
int64_t sfx_layer_nnz(void* layer) { return static_cast<Layer*>(layer)->pattern.nnz(); }

int sfx_layer_tune(void* handle, int kind, const int64_t* t) {
  Layer& layer = *static_cast<Layer*>(handle);
  std::lock_guard<std::mutex> lock(layer.mutex);
  layer.wanted[kind].reset(t ? new Tiling{t[0], t[1], t[2], t[3], t[4], t[5], t[6]} : nullptr);
  layer.passes.clear();
  return 0;
}

int sfx_layer_tiling(void* handle, int kind, int64_t h, int64_t w, int64_t images, int threads, int64_t* out,
                     double* build_ms) {
  return guarded([&] {
    const auto pass = static_cast<Layer*>(handle)->pass(
        PassKind(kind), h, w, kind == PIXELS ? images : blocks_of(images), team(threads));
    const Tiling& t = pass->phases[0].tiling;
    const int64_t all[] = {t.rows, t.cols, t.batch, t.strip_rows, t.strip_cols, t.chunk, t.block};
    std::memcpy(out, all, sizeof all);
    *build_ms = pass->build_ms;
  });
}

int sfx_layer_collect(void* layer, int dtype, int channels_last, const void* weight, float* values, int threads) {
  return guarded([&] {
    collect_as(*static_cast<Layer*>(layer), dtype, channels_last != 0, weight, values, team(threads));
  });
}

int sfx_layer_scatter(void* layer, int dtype, int channels_last, const float* values, void* dense, int threads) {
  return guarded([&] {
    scatter_as(*static_cast<Layer*>(layer), dtype, channels_last != 0, values, dense, team(threads));
  });
}

int sfx_conv_gather(void* layer, int kind, int dtype, const void* in, int64_t images, int64_t h, int64_t w,
                    const SfxPrologue* prologue, const float* values, const float* bias, const void* residual, int relu,
                    void* out, int threads) {
  return guarded([&] {
    const auto run = dtype ? conv_gather<bf16> : conv_gather<float>;
    run(*static_cast<Layer*>(layer), PassKind(kind), in, images, h, w, values, prologue_of(prologue),
        {bias, residual, relu != 0}, out, team(threads));
  });
}

int sfx_conv_wgrad(void* layer, int dtype, const void* grad, const void* in, int64_t images, int64_t h, int64_t w,
                   const SfxPrologue* prologue, float* values, int threads) {
  return guarded([&] {
    const auto run = dtype ? conv_dot<bf16> : conv_dot<float>;
    run(*static_cast<Layer*>(layer), grad, in, images, h, w, prologue_of(prologue), values, team(threads));
  });
}

int sfx_conv_dense_wgrad(const int64_t* shape, const float* grad, const float* in, int64_t images, int64_t h, int64_t w,
                         int channels_last, int amx, float* out, int threads) {
  return guarded([&] {
    const auto run = amx ? dense_wgrad_amx : dense_wgrad;
    run(shape_of(shape), grad, in, blocks_of(images), h, w, channels_last != 0, out, team(threads));
  });
}

int sfx_linear_dense_wgrad(const float* grad, const float* in, int64_t rows, int64_t outs, int64_t ins,
                           const uint8_t* mask, float* masked, float* dense, int threads) {
  return guarded([&] { linear_dense_wgrad(grad, in, rows, outs, ins, mask, masked, dense, team(threads)); });
}

int sfx_linear_dense_fprop(const float* in, const float* weight, int64_t rows, int64_t outs, int64_t ins,
                           const float* bias, int relu, float* out, int threads) {
  return guarded([&] { linear_dense_fprop(in, weight, rows, outs, ins, bias, relu != 0, out, team(threads)); });
}

int sfx_linear_dense_dgrad(const float* grad, const float* weight, int64_t rows, int64_t outs, int64_t ins, float* out,
                           int threads) {
  return guarded([&] { linear_dense_dgrad(grad, weight, rows, outs, ins, out, team(threads)); });
}

int sfx_conv_pixels(void* layer, int dtype, const void* in, int64_t images, int64_t h, int64_t w, const float* values,
                    const float* bias, int relu, void* out, int threads) {
  return guarded([&] {
    const auto run = dtype ? conv_pixels<bf16> : conv_pixels<float>;
    run(*static_cast<Layer*>(layer), in, images, h, w, values, {bias, nullptr, relu != 0}, out, team(threads));
  });
}

int sfx_linear_rows(void* handle, int dtype, const void* in, int64_t images, const void* weight, float* values,
                    const float* bias, int relu, void* out, int threads) {
  Layer& layer = *static_cast<Layer*>(handle);
  const Epilogue epilogue{bias, nullptr, relu != 0};
  return guarded([&] {
    if (weight) collect_as(layer, dtype, false, weight, values, team(threads));
    dtype ? linear_rows(layer.pattern, static_cast<const bf16*>(in), images, values, epilogue, static_cast<bf16*>(out),
                        team(threads))
          : linear_rows(layer.pattern, static_cast<const float*>(in), images, values, epilogue,
                        static_cast<float*>(out), team(threads));
  });
}

int sfx_linear_gather(void* handle, int kind, int dtype, const void* in, int64_t images, const void* weight,
                      float* values, const float* bias, int relu, void* out, int threads) {
  Layer& layer = *static_cast<Layer*>(handle);
  return guarded([&] {
    if (weight) collect_as(layer, dtype, false, weight, values, team(threads));
    const auto run = dtype ? linear_gather<bf16> : linear_gather<float>;
    run(layer, PassKind(kind), in, images, values, {bias, nullptr, relu != 0}, out, team(threads));
  });
}

int sfx_linear_wgrad(void* handle, int dtype, const void* grad, const void* in, int64_t images, int dense_dtype,
                     void* dense, int threads) {
  Layer& layer = *static_cast<Layer*>(handle);
  return guarded([&] {
    float* values = reinterpret_cast<float*>(scratch(2, layer.pattern.nnz() * 4 + 64));
    const auto run = dtype ? linear_dot<bf16> : linear_dot<float>;
    run(layer, grad, in, images, values, team(threads));
    scatter_as(layer, dense_dtype, false, values, dense, team(threads));
  });
}

}  // extern "C"
