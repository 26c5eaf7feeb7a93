// Everything that crosses the C ABI. Functions that return int give 0, or 1 with sfx_error() set.
// dtype: 0 = fp32, 1 = bf16. Weights' values are fp32, one for each existing weight in row-major order.
#pragma once
#include <cstdint>

extern "C" {

const char* sfx_error();
int sfx_lanes();
// Whether this processor has matrix units that this library uses: Intel's AMX.
int sfx_amx();

// shape: out, in, R, S, stride (2), pad (2), dilation (2), groups. mask: [out, in / groups, R, S] bytes.
void* sfx_layer_new(const int64_t* shape, const uint8_t* mask);
void sfx_layer_free(void* layer);
int64_t sfx_layer_nnz(void* layer);

// Fix the tiling of a pass (rows, cols, batch, strip_rows, strip_cols, chunk, block), or let it be chosen (null).
int sfx_layer_tune(void* layer, int kind, const int64_t* tiling);
int sfx_layer_tiling(void* layer, int kind, int64_t h, int64_t w, int64_t images, int threads, int64_t* tiling,
                     double* build_ms);

// Dense weight to values, and values to a dense gradient that is zero elsewhere.
int sfx_layer_collect(void* layer, int dtype, int channels_last, const void* weight, float* values, int threads);
int sfx_layer_scatter(void* layer, int dtype, int channels_last, const float* values, void* dense, int threads);

// What a convolution or pooling does to each element of its input as it reads it, [channels] each:
// (x - mean) * scale + shift, then a ReLU where `relu`. Lanes without an image stay zero.
struct SfxPrologue {
  const float *mean, *scale, *shift;
  int32_t relu;
};

// kind: 0 = fprop, 1 = dgrad. h, w: the layer's input size. prologue: of the input of fprop and wgrad, may be null.
// residual: added to the output, of its shape and dtype, may be null.
int sfx_conv_gather(void* layer, int kind, int dtype, const void* in, int64_t images, int64_t h, int64_t w,
                    const SfxPrologue* prologue, const float* values, const float* bias, const void* residual, int relu,
                    void* out, int threads);
int sfx_conv_wgrad(void* layer, int dtype, const void* grad, const void* in, int64_t images, int64_t h, int64_t w,
                   const SfxPrologue* prologue, float* values, int threads);
// The gradient of all weights, existing or not; shape as in sfx_layer_new, fp32, out as the weight lies in memory. amx:
// on matrix units.
int sfx_conv_dense_wgrad(const int64_t* shape, const float* grad, const float* in, int64_t images, int64_t h, int64_t w,
                         int channels_last, int amx, float* out, int threads);
// The same of a linear layer, zero where mask is, and in `dense`, unless it is null, everywhere.
int sfx_linear_dense_wgrad(const float* grad, const float* in, int64_t rows, int64_t outs, int64_t ins,
                           const uint8_t* mask, float* masked, float* dense, int threads);
// Forward and input gradient with all weights [outs, ins], fp32; bias may be null.
int sfx_linear_dense_fprop(const float* in, const float* weight, int64_t rows, int64_t outs, int64_t ins,
                           const float* bias, int relu, float* out, int threads);
int sfx_linear_dense_dgrad(const float* grad, const float* weight, int64_t rows, int64_t outs, int64_t ins, float* out,
                           int threads);
// Linear layers take the values, or a dense weight of `dtype` that is collected into them first; and give a dense
// gradient of the weight, zero where none exists.
int sfx_linear_gather(void* layer, int kind, int dtype, const void* in, int64_t images, const void* weight,
                      float* values, const float* bias, int relu, void* out, int threads);
int sfx_linear_wgrad(void* layer, int dtype, const void* grad, const void* in, int64_t images, int dense_dtype,
                     void* dense, int threads);

// One image at a time, lanes over pixels: x [images, in, h, w] to out [images, out, h', w'].
int sfx_conv_pixels(void* layer, int dtype, const void* in, int64_t images, int64_t h, int64_t w, const float* values,
                    const float* bias, int relu, void* out, int threads);
// A few rows, each a sparse matrix-vector product.
int sfx_linear_rows(void* layer, int dtype, const void* in, int64_t images, const void* weight, float* values,
                    const float* bias, int relu, void* out, int threads);

// [images, channels, pixels] (or [images, pixels, channels] where channels_last) to [blocks, channels, pixels, 16],
// whose lanes beyond `images` become zero, or back.
void sfx_convert(int to_blocked, int dtype, const void* from, void* to, int64_t images, int64_t channels,
                 int64_t pixels, int channels_last, int threads);

// BatchNorm (+ residual) (+ ReLU). Activations are blocked, of one dtype; the rest is fp32 per channel.
struct SfxNorm {
  const void *x, *residual, *grad;
  const void *grad2, *skip;                 // added to the output's gradient and to the input's, may be null
  void *y, *dx, *dresidual;                 // y may be null: forward then writes statistics alone, backward has no residual
  const float *weight, *bias;               // null: 1 and 0
  float *mean, *var, *rstd;                 // written by forward in training, and of the running statistics where these
                                            // are given; else read (var unused)
  float *running_mean, *running_var;        // may be null; training moves them by `factor` towards the batch's
  float *scale, *shift;                     // a prologue's, written by forward unless null
  float *dweight, *dbias;
  double eps, factor;
  int32_t training, relu;
};
void sfx_norm(int backward, int dtype, const SfxNorm* arguments, int64_t images, int64_t channels, int64_t pixels,
              int threads);
// sums[c]: of channel c of blocked activations, whose lanes beyond `images` are not read.
void sfx_channel_sums(int dtype, const void* x, int64_t images, int64_t channels, int64_t pixels, float* sums,
                      int threads);

// out = x where mask, zero elsewhere; `out` may be `x`.
void sfx_masked_copy(const float* x, const uint8_t* mask, float* out, int64_t n, int threads);
// Where mask is false: moment += alpha * (collected * seen), weight = 0; for each of `count` (moment, collected, weight,
// mask, n) as five words, and (seen, alpha).
void sfx_masked_fold(const int64_t* arrays, const float* factors, int64_t count, int threads);
// bits: one for each of the mask's n bytes, in words of 64, set where the byte is not zero.
void sfx_mask_pack(const uint8_t* mask, uint64_t* bits, int64_t n, int threads);
// Whether all of `count` masks have the bits that sfx_mask_pack found: (mask, bits, n) of each as three words.
int sfx_masks_same(const int64_t* masks, int64_t count, int threads);
// out = a + b.
void sfx_add(const float* a, const float* b, float* out, int64_t n, int threads);
// sums[c]: of column c of x [rows, columns].
void sfx_column_sums(const float* x, int64_t rows, int64_t columns, float* sums, int threads);
// out = grad where y > 0, zero elsewhere.
void sfx_relu_backward(const float* grad, const float* y, float* out, int64_t n, int threads);
// sums: <a, b> and <b, b> of each of `count` (a, b, n) as three words.
void sfx_products(const int64_t* arrays, int64_t count, double* sums, int threads);

// Max pooling of blocked activations, and its gradient; `taps` has a byte for each output. prologue: of the forward's
// input, may be null.
struct SfxPool {
  int64_t in[2], out[2], kernel[2], stride[2], pad[2];
};
void sfx_max_pool(int backward, int dtype, const SfxPool* pool, const SfxPrologue* prologue, int64_t images,
                  int64_t channels, const void* from, void* to, uint8_t* taps, int threads);

// What sfx_run needs to call the function of this name, which takes integers and pointers, and last the threads; null if
// there is none.
void* sfx_caller(const char* name);
// Makes `n_calls` calls, each of a caller and the word at which its arguments begin, one word each but for the threads.
// First words[cell] = bases[base] + offset for `n_homes` of (cell, base, offset). Stops at the first call that fails.
int sfx_run(int64_t* words, const int64_t* homes, int64_t n_homes, const int64_t* bases, const int64_t* calls,
            int64_t n_calls, int threads);

// Asks for huge pages for memory that is about to be written for the first time.
void sfx_advise(void* data, int64_t bytes);
// Multiply-adds per second of `threads` threads in registers, in GFLOP/s.
double sfx_peak(int threads);

}  // extern "C"
