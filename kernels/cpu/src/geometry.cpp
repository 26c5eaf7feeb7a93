#include "geometry.h"

#include <algorithm>

namespace sfx {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

}  // namespace

std::vector<AxisMap> fprop_axis(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t in_size,
                                int64_t out_size) {
  AxisMap a{0, out_size, 1, stride, in_size, {}, {}};
  for (int64_t r = 0; r < kernel; ++r) {
    a.tap.push_back(r);
    a.displacement.push_back(r * dilation - pad);
  }
  return {a};
}

std::vector<AxisMap> dgrad_axis(int64_t kernel, int64_t stride, int64_t pad, int64_t dilation, int64_t in_size,
                                int64_t out_size) {
  std::vector<AxisMap> phases;
  for (int64_t p = 0; p < std::min(stride, in_size); ++p) {
    AxisMap a{p, (in_size - p + stride - 1) / stride, stride, 1, out_size, {}, {}};
    for (int64_t r = 0; r < kernel; ++r) {
      const int64_t d = p + pad - r * dilation;
      if (d - floor_div(d, stride) * stride != 0) continue;
      a.tap.push_back(r);
      a.displacement.push_back(floor_div(d, stride));
    }
    phases.push_back(a);
  }
  return phases;
}

Packing pack_axis(const AxisMap& axis, int64_t kernel, int64_t outputs) {
  Packing p;
  p.tap_start.assign(kernel, -1);
  int64_t classes = 0;
  for (int64_t q = 0; q < axis.in_step; ++q) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    for (int64_t d : axis.displacement)
      if (d - floor_div(d, axis.in_step) * axis.in_step == q) {
        low = std::min(low, floor_div(d, axis.in_step));
        high = std::max(high, floor_div(d, axis.in_step));
      }
    if (low > high) continue;
    ++classes;
    const int64_t base = int64_t(p.source.size()) - low;
    for (int64_t k = low; k < high + outputs; ++k) p.source.push_back(q + k * axis.in_step);
    for (size_t t = 0; t < axis.tap.size(); ++t)
      if (axis.displacement[t] - floor_div(axis.displacement[t], axis.in_step) * axis.in_step == q)
        p.tap_start[axis.tap[t]] = base + floor_div(axis.displacement[t], axis.in_step);
  }
  p.pitch = int64_t(p.source.size());
  if (classes == 1 && outputs >= axis.count) {
    int64_t before = 0, after = 0;
    while (before < p.pitch && p.source[before] < 0) ++before;
    while (after < p.pitch && p.source[p.pitch - 1 - after] >= axis.in_size) ++after;
    if (before + after < p.pitch) p.pitch -= std::min(before, after);
  }
  return p;
}

bool pack_clipped(const AxisMap& axis, int64_t kernel, Packing* packing) {
  Packing p;
  p.tap_start.assign(kernel, -1);
  p.clip.assign(kernel, NO_OUTPUT);
  for (int64_t q = 0; q < axis.in_step; ++q) {
    int64_t low = INT64_MAX, high = INT64_MIN;  // inputs of this residue that some tap reads
    const int64_t inputs = (axis.in_size - q + axis.in_step - 1) / axis.in_step;
    for (const bool place : {false, true})
      for (size_t t = 0; t < axis.tap.size(); ++t) {
        const int64_t first = floor_div(axis.displacement[t], axis.in_step);
        if (axis.displacement[t] - first * axis.in_step != q) continue;
        const int64_t before = std::max<int64_t>(0, -first), after = std::max<int64_t>(0, first + axis.count - inputs);
        if (before + after > 1 || before + after >= axis.count) return false;
        if (place) {
          p.tap_start[axis.tap[t]] = int64_t(p.source.size()) + first + before - low;
          p.clip[axis.tap[t]] = before ? FIRST_OUTPUT : after ? LAST_OUTPUT : NO_OUTPUT;
        }
        low = std::min(low, first + before);
        high = std::max(high, first + axis.count - after);
      }
    for (int64_t k = low; k < high; ++k) p.source.push_back(q + k * axis.in_step);
  }
  p.pitch = int64_t(p.source.size());
  *packing = p;
  return true;
}

}  // namespace sfx
