// The gradient of all weights of a convolution, existing or not.
#pragma once
#include "geometry.h"

namespace sfx {

// out [out, in / groups, R, S], or [out, R, S, in / groups] where channels_last, from grad [blocks, out, out_h, out_w,
// 16] and x [blocks, in, h, w, 16]. Lanes without an image are zero in one of them. The result depends on the number of
// threads only.
void dense_wgrad(const ConvShape& shape, const float* grad, const float* x, int64_t blocks, int64_t h, int64_t w,
                 bool channels_last, float* out, int threads);

}  // namespace sfx
