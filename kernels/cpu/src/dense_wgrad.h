// Products with all weights of a layer, existing or not: the gradient of a convolution's, and what a linear layer does.
#pragma once
#include "geometry.h"

namespace sfx {

constexpr int64_t STREAMED_GRAD = 4 << 20;  // a larger gradient has left the caches when the optimizer reads it

// out [out, in / groups, R, S], or [out, R, S, in / groups] where channels_last, from grad [blocks, out, out_h, out_w,
// 16] and x [blocks, in, h, w, 16]. Lanes without an image are zero in one of them. The result depends on the number of
// threads only.
void dense_wgrad(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                 bool channels_last, float* out, int threads);

// The same on matrix units, as exact; for processors that have them.
bool has_amx();
void dense_wgrad_amx(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                     bool channels_last, float* out, int threads);

// masked [outs, ins] from grad [rows, outs] and x [rows, ins], zero where mask [outs, ins] is; `dense`, which may be null,
// gets what is not masked too. The result does not depend on the number of threads.
void linear_dense_wgrad(const float* grad, const float* x, int64_t rows, int64_t outs, int64_t ins, const uint8_t* mask,
                        float* masked, float* dense, int threads);

// out [rows, outs] from x [rows, ins] and weight [outs, ins], plus bias [outs], which may be null, then a ReLU; and the
// input's gradient [rows, ins] from grad [rows, outs]. The results do not depend on the number of threads.
void linear_dense_fprop(const float* x, const float* weight, int64_t rows, int64_t outs, int64_t ins, const float* bias,
                        bool relu, float* out, int threads);
void linear_dense_dgrad(const float* grad, const float* weight, int64_t rows, int64_t outs, int64_t ins, float* out,
                        int threads);

}  // namespace sfx
