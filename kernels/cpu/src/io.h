// Storage that the drivers read and write, a tile at a time: blocked activations, and rows of features.
#pragma once
#include <algorithm>
#include <vector>

#include "abi.h"
#include "plan.h"
#include "simd.h"
#include "transpose.h"

namespace sfx {

// How an output of so many elements is written: a large one past the caches, from the size on where steps were measured
// to be faster for it. Followed by fence() in each thread.
template <class T>
struct Writer {
  bool past_caches;
  explicit Writer(int64_t elements) : past_caches(sizeof(T) == 4 && elements * 4 > stream_bytes()) {}
  static int64_t stream_bytes() { return processor() == Processor::SAPPHIRE_RAPIDS ? 2 << 20 : 12 << 20; }
  SFX_INLINE void operator()(T* p, vf value) const {
    if constexpr (sizeof(T) == 4)
      if (past_caches) return stream(p, value);
    store_from_float(p, value);
  }
};

struct TileAt {            // a tile (or strip) of a phase
  int64_t y, x;            // first output row and column, in the phase's numbering
  int64_t batch;           // first block of images
};

struct Epilogue {
  const float* bias;     // [channels] or null
  const void* residual;  // laid out and stored as the output, or null
  bool relu;
};

// What a layer does to each element of its input as it reads it, by channel: (x - mean) * scale + shift, and a ReLU.
// Nothing where `mean` is null.
struct Prologue {
  const float *mean = nullptr, *scale = nullptr, *shift = nullptr;
  bool relu = false;
};
inline Prologue prologue_of(const SfxPrologue* p) {
  return p ? Prologue{p->mean, p->scale, p->shift, p->relu != 0} : Prologue{};
}
template <bool ACTS>
struct Prepared {  // a prologue at one channel
  vf mean, scale, shift;
  bool clamps;
  Prepared(const Prologue& p, int64_t c) {
    if constexpr (ACTS) {
      mean = splat(p.mean[c]);
      scale = splat(p.scale[c]);
      shift = splat(p.shift[c]);
      clamps = p.relu;
    }
  }
  SFX_INLINE vf operator()(vf x) const {
    if constexpr (!ACTS) return x;
    const vf value = (x - mean) * scale + shift;
    return clamps ? relu(value) : value;
  }
};

// Zeros lanes of images that do not exist: the last block's lanes from `images % 16` on.
struct LaneMask {
  vi keep[VECS];
  explicit LaneMask(int64_t images) {
    for (int v = 0; v < VECS; ++v)
      for (int i = 0; i < LANES; ++i) keep[v][i] = v * LANES + i < images ? -1 : 0;
  }
  SFX_INLINE vf apply(vf value, int v) const { return (vf)((vi)value & keep[v]); }
};

// [blocks, channels, h, w, 16]
template <class T>
struct Blocked {
  T* data;
  int64_t images, channels, h, w;
  Prologue prologue = {};

  T* at(int64_t block, int64_t channel, int64_t y, int64_t x) const {
    return data + (((block * channels + channel) * h + y) * w + x) * BLOCK;
  }

  // Copies the strip at `at` for `n` channels into `out`, [n][rows][columns][batch][16] with pitches of `p`.
  void pack(char* out, const uint32_t* channel, int64_t n, const PhasePlan& p, TileAt at_) const {
    prologue.mean ? pack_as<true>(out, channel, n, p, at_) : pack_as<false>(out, channel, n, p, at_);
  }
  template <bool ACTS>
  void pack_as(char* out, const uint32_t* channel, int64_t n, const PhasePlan& p, TileAt at_) const {
    struct Run {  // of a packed row: lines that are read at equal distances, or zeros where `from` is negative
      int64_t from, step, lines;
      bool last;  // of the last block of images
    };
    thread_local std::vector<Run> runs;
    const LaneMask tail(ACTS && images % BLOCK ? images % BLOCK : BLOCK), all(BLOCK);
    const int64_t blocks = (images + BLOCK - 1) / BLOCK;
    runs.clear();
    for (int64_t k = 0; k < p.pack_x.pitch; ++k)
      for (int64_t b = at_.batch; b < at_.batch + p.tiling.batch; ++b) {
        const int64_t x = p.pack_x.source[k] + at_.x * p.x.in_step;
        const int64_t from = x >= 0 && x < w && b < blocks ? at(b, 0, 0, x) - data : -1;
        const bool last = b + 1 == blocks;
        Run* run = runs.empty() ? nullptr : &runs.back();
        if (!run || last != run->last || (from < 0) != (run->from < 0) ||
            (from >= 0 && run->lines > 1 && from != run->from + run->lines * run->step)) {
          runs.push_back({from, 0, 1, last});
        } else if (run->lines++ == 1) {
          run->step = from - run->from;
        }
      }
    for (int64_t c = 0; c < n; ++c) {
      const Prepared<ACTS> prepared(prologue, channel[c]);
      for (int64_t r = 0; r < p.pack_y.pitch; ++r) {
        char* to = out + c * p.channel_bytes + r * p.row_bytes;
        const int64_t y = p.pack_y.source[r] + at_.y * p.y.in_step;
        if (y < 0 || y >= h) {
          std::memset(to, 0, p.row_bytes);
          continue;
        }
        const T* row = at(0, channel[c], y, 0);
        for (const Run& run : runs) {
          if (run.from < 0) {
            for (int64_t v = 0; v < run.lines * VECS; ++v, to += LANES * 4) store(to, vf{});
            continue;
          }
          const LaneMask& mask = run.last ? tail : all;
          const T* from = row + run.from;
          const auto copy = [&](int64_t step) SFX_LAMBDA {
            for (int64_t k = 0; k < run.lines; ++k)
              for (int v = 0; v < VECS; ++v, to += LANES * 4) {
                const vf value = prepared(load_as_float(from + k * step + v * LANES));
                store(to, ACTS ? mask.apply(value, v) : value);
              }
          };
          run.step == BLOCK ? copy(BLOCK) : copy(run.step);
        }
      }
    }
    std::memset(out + n * p.channel_bytes, 0, p.tail_bytes);
  }

  // What pack() will read for these channels, roughly.
  Ahead ahead(const uint32_t* channel, int64_t n, const PhasePlan& p, TileAt t) const {
    if (p.tiling.batch != 1 || !n || p.pack_x.source.empty()) return {};
    const auto [y0, y1] = std::minmax_element(p.pack_y.source.begin(), p.pack_y.source.end());
    const auto [x0, x1] = std::minmax_element(p.pack_x.source.begin(), p.pack_x.source.end());
    const int64_t top = std::clamp<int64_t>(*y0 + t.y * p.y.in_step, 0, h);
    const int64_t bottom = std::clamp<int64_t>(*y1 + t.y * p.y.in_step + 1, top, h);
    const int64_t left = std::clamp<int64_t>(*x0 + t.x * p.x.in_step, 0, w);
    const int64_t right = std::clamp<int64_t>(*x1 + t.x * p.x.in_step + 1, left, w);
    const int64_t cell = BLOCK * sizeof(T), pitch = h * w * cell;
    const char* base = reinterpret_cast<const char*>(at(t.batch, 0, top, left));
    if (right - left == w)  // whole rows are one run
      return {base, channel, n, pitch, bottom > top, 0, (bottom - top) * w * cell / 64};
    return {base, channel, n, pitch, bottom - top, w * cell, (right - left) * cell / 64};
  }

  // What a tile of channels [c0, c0 + n) will read.
  Ahead ahead_tile(int64_t c0, int64_t n, const PhasePlan& p, TileAt t) const {
    const int64_t rows = std::min(p.tiling.rows, h - t.y), columns = std::min(p.tiling.cols, w - t.x);
    if (p.tiling.batch != 1 || rows < 1 || columns < 1) return {};
    const int64_t cell = BLOCK * sizeof(T);
    const char* base = reinterpret_cast<const char*>(at(t.batch, c0, t.y, t.x));
    return {base, nullptr, n, h * w * cell, rows, w * cell, ceil_div(columns * cell, 64)};
  }

  // Copies a tile of outputs of channels [c0, c0 + n) into `out`, [n][rows][columns][batch][16]; zero outside.
  void pack_tile(char* out, int64_t c0, int64_t n, const PhasePlan& p, TileAt t) const {
    const int64_t blocks = (images + BLOCK - 1) / BLOCK;
    const auto line = [&](const T* from) SFX_LAMBDA {
      for (int v = 0; v < VECS; ++v) store(out + v * LANES * 4, load_as_float(from + v * LANES));
      out += LINE;
    };
    const int64_t rows = p.tiling.rows, columns = p.tiling.cols;
    if (p.tiling.batch == 1 && t.y + rows <= p.y.count && t.x + columns <= p.x.count) {
      for (int64_t c = c0; c < c0 + n; ++c)
        for (int64_t r = 0; r < rows; ++r) {
          const T* from = at(t.batch, c, t.y + r, t.x);
          for (int64_t k = 0; k < columns; ++k) line(from + k * BLOCK);
        }
      return;
    }
    for (int64_t c = c0; c < c0 + n; ++c)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < columns; ++k)
          for (int64_t b = 0; b < p.tiling.batch; ++b) {
            if (t.y + r < p.y.count && t.x + k < p.x.count && t.batch + b < blocks) {
              line(at(t.batch + b, c, t.y + r, t.x + k));
            } else {
              std::memset(out, 0, LINE);
              out += LINE;
            }
          }
  }

  // Writes a tile of sums of channels [c0, c0 + n). Lanes without an image are written as zero.
  void unpack(const char* acc, int64_t c0, int64_t n, const PhasePlan& p, TileAt t, Epilogue e) const {
    const int64_t blocks = (images + BLOCK - 1) / BLOCK, batch = p.tiling.batch;
    const int64_t rows = std::min(p.tiling.rows, p.y.count - t.y), columns = std::min(p.tiling.cols, p.x.count - t.x);
    const bool tail = images % BLOCK && e.bias;
    const Writer<T> write(blocks * channels * h * w * BLOCK);
    const LaneMask mask(images % BLOCK ? images % BLOCK : BLOCK);
    for (int64_t c = 0; c < n; ++c) {
      const vf bias = splat(e.bias ? e.bias[c0 + c] : 0.0f);
      const char* from = acc + c * p.tile_bytes();
      for (int64_t b = 0; b < batch && t.batch + b < blocks; ++b)
        for (int64_t r = 0; r < rows; ++r) {
          T* to = at(t.batch + b, c0 + c, p.y.first + (t.y + r) * p.y.out_step, p.x.first + t.x * p.x.out_step);
          const T* residual = e.residual ? static_cast<const T*>(e.residual) + (to - data) : nullptr;
          const char* row = from + (r * p.tiling.cols * batch + b) * LINE;
          for (int64_t k = 0; k < columns; ++k)
            for (int v = 0; v < VECS; ++v) {
              vf value = load(row + k * batch * LINE + v * LANES * 4) + bias;
              if (residual) value += load_as_float(residual + k * p.x.out_step * BLOCK + v * LANES);
              if (e.relu) value = relu(value);
              if (tail && t.batch + b == blocks - 1) value = mask.apply(value, v);
              write(to + k * p.x.out_step * BLOCK + v * LANES, value);
            }
        }
    }
    if (write.past_caches) fence();
  }

  // Where the sums of a tile of channels from c0 on go without unpack(), if they can; `table` is the sink's.
  bool sink(Sink* sink, int64_t* table, int64_t c0, const PhasePlan& p, TileAt t, Epilogue e) const {
    const int64_t blocks = (images + BLOCK - 1) / BLOCK, batch = p.tiling.batch;
    if (sizeof(T) != 4 || t.y + p.tiling.rows > p.y.count || t.x + p.tiling.cols > p.x.count ||
        t.batch + batch > blocks || (e.bias && images % BLOCK && t.batch + batch == blocks))
      return false;
    const int64_t line = p.x.out_step * LINE, row = p.y.out_step * w * LINE, block = channels * h * w * LINE;
    int64_t i = 0;
    for (int64_t r = 0; r < p.tiling.rows; ++r)
      for (int64_t k = 0; k < p.tiling.cols; ++k)
        for (int64_t b = 0; b < batch; ++b)
          for (int v = 0; v < VECS; ++v) table[i++] = r * row + k * line + b * block + v * LANES * 4;
    T* first = at(t.batch, c0, p.y.first + t.y * p.y.out_step, p.x.first + t.x * p.x.out_step);
    const Writer<T> write(blocks * channels * h * w * BLOCK);
    const char* residual = e.residual ? static_cast<const char*>(e.residual) + (first - data) * sizeof(T) : nullptr;
    *sink = {reinterpret_cast<char*>(first), h * w * LINE, table, e.bias ? e.bias + c0 : nullptr, residual, e.relu,
             write.past_caches};
    return true;
  }

  // Where a whole tile of channel c0 lies ready as fp32 rows, or null. Sets the pitches between channels and rows.
  const char* tile_in_place(int64_t c0, const PhasePlan& p, TileAt t, int64_t* channel, int64_t* row) const {
    if (sizeof(T) != 4 || p.tiling.batch != 1 || t.y + p.tiling.rows > p.y.count || t.x + p.tiling.cols > p.x.count)
      return nullptr;
    *channel = h * w * LINE;
    *row = w * LINE;
    return reinterpret_cast<const char*>(at(t.batch, c0, t.y, t.x));
  }
};

// [images, channels, h, w]; lanes are pixels, a batch of the plan is one image.
template <class T>
struct Pixels {
  T* data;
  int64_t images, channels, h, w;

  void pack(char* out, const uint32_t* channel, int64_t n, const PhasePlan& p, TileAt t) const {
    const int64_t y0 = t.y * p.y.in_step, x0 = t.x * p.x.in_step, columns = p.pack_x.pitch;
    const int64_t first = p.pack_x.source.empty() ? 0 : p.pack_x.source[0] + x0;
    const int64_t left = std::clamp<int64_t>(-first, 0, columns), right = std::clamp<int64_t>(w - first, left, columns);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t r = 0; r < p.pack_y.pitch; ++r) {
        float* to = reinterpret_cast<float*>(out + c * p.channel_bytes + r * p.row_bytes);
        const int64_t y = p.pack_y.source[r] + y0;
        if (y < 0 || y >= h) {
          std::fill(to, to + columns, 0.0f);
          continue;
        }
        const T* from = data + ((t.batch * channels + channel[c]) * h + y) * w;
        if (p.x.in_step == 1) {
          std::fill(to, to + left, 0.0f);
          for (int64_t k = left; k < right; ++k) to[k] = to_float(from[first + k]);
          std::fill(to + right, to + columns, 0.0f);
        } else {
          for (int64_t k = 0; k < columns; ++k) {
            const int64_t x = p.pack_x.source[k] + x0;
            to[k] = x < 0 || x >= w ? 0.0f : to_float(from[x]);
          }
        }
      }
    std::memset(out + n * p.channel_bytes, 0, p.tail_bytes);
  }

  Ahead ahead(const uint32_t*, int64_t, const PhasePlan&, TileAt) const { return {}; }
  bool sink(Sink*, int64_t*, int64_t, const PhasePlan&, TileAt, Epilogue) const { return false; }

  void unpack(const char* acc, int64_t c0, int64_t n, const PhasePlan& p, TileAt t, Epilogue e) const {
    const int64_t rows = std::min(p.tiling.rows, p.y.count - t.y), columns = std::min(p.tiling.cols, p.x.count - t.x);
    for (int64_t c = 0; c < n; ++c) {
      const float* sums = reinterpret_cast<const float*>(acc + c * p.tile_bytes());
      const float bias = e.bias ? e.bias[c0 + c] : 0.0f;
      for (int64_t r = 0; r < rows; ++r) {
        T* to = data + ((t.batch * channels + c0 + c) * h + t.y + r) * w + t.x;
        for (int64_t k = 0; k < columns; ++k) {
          const float value = sums[r * p.pack_x.pitch + k] + bias;
          to[k] = from_float<T>(e.relu && value < 0 ? 0.0f : value);
        }
      }
    }
  }
};

// [images, features] as a linear layer has them; a tile is some blocks of images.
template <class T>
struct Rows {
  T* data;
  int64_t images, features;

  void pack(char* out, const uint32_t* channel, int64_t n, const PhasePlan& p, TileAt t) const {
    transposed(n, p.tiling.batch * VECS, [&](int64_t c, int64_t end, int64_t v) SFX_LAMBDA {
      const auto feature = [&](int64_t k) { return int64_t(channel[c + k]); };
      return read(out + c * p.channel_bytes + v * LANES * 4, p.channel_bytes, feature, end - c,
                  t.batch * BLOCK + v * LANES);
    });
  }

  Ahead ahead(const uint32_t* channel, int64_t n, const PhasePlan& p, TileAt t) const {
    return n < LANES ? Ahead() : ahead_tile(channel[0], int64_t(channel[n - 1]) - channel[0] + 1, p, t);
  }

  Ahead ahead_tile(int64_t c0, int64_t n, const PhasePlan& p, TileAt t) const {
    const int64_t first = t.batch * BLOCK, rows = std::min(p.tiling.batch * BLOCK, images - first);
    const char* base = reinterpret_cast<const char*>(data + first * features + c0);
    return {base, nullptr, 1, 0, rows, features * int64_t(sizeof(T)), ceil_div(n * int64_t(sizeof(T)), 64)};
  }

  void pack_tile(char* out, int64_t c0, int64_t n, const PhasePlan& p, TileAt t) const {
    const int64_t pitch = p.tile_bytes();
    transposed(n, p.tiling.batch * VECS, [&](int64_t c, int64_t end, int64_t v) SFX_LAMBDA {
      const auto feature = [&](int64_t k) { return c0 + c + k; };
      return read(out + c * pitch + v * LANES * 4, pitch, feature, end - c, t.batch * BLOCK + v * LANES);
    });
  }

  void unpack(const char* acc, int64_t c0, int64_t n, const PhasePlan& p, TileAt t, Epilogue e) const {
    const int64_t pitch = p.tile_bytes();
    transposed(n, p.tiling.batch * VECS, [&](int64_t c, int64_t end, int64_t v) {
      const int64_t width = c + LANES <= end ? LANES : 1;
      write(acc + c * pitch + v * LANES * 4, pitch, c0 + c, width, t.batch * BLOCK + v * LANES, e);
      return width;
    });
  }

  const char* tile_in_place(int64_t, const PhasePlan&, TileAt, int64_t*, int64_t*) const { return nullptr; }
  bool sink(Sink*, int64_t*, int64_t, const PhasePlan&, TileAt, Epilogue) const { return false; }

 private:
  // Calls visit(feature, end, vector) -> features done for all `n` features of all vectors of images, some lines of
  // each row of features at a time: whole rows would leave L1 before the next, and single lines are no stream to
  // prefetch.
  template <class Visit>
  void transposed(int64_t n, int64_t vectors, Visit visit) const {
    constexpr int64_t TOGETHER = 64;
    for (int64_t c0 = 0; c0 < n; c0 += TOGETHER)
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t c = c0, end = std::min(n, c0 + TOGETHER); c < end;) c += visit(c, end, v);
  }

  // Of LANES images the features feature(0) < feature(1) < ..., at most `most`, that lie within LANES of the first, to
  // one native vector each. Returns how many.
  template <class Feature>
  SFX_INLINE int64_t read(char* to, int64_t pitch, Feature feature, int64_t most, int64_t image) const {
    const int64_t n = std::clamp<int64_t>(images - image, 0, LANES);
    const int64_t first = std::min(feature(0), features - LANES);
    constexpr int64_t FEW = 2;  // up to here one by one is faster
    int64_t found = 1;
    if (most >= LANES && feature(LANES - 1) - first == LANES - 1) {
      found = LANES;
    } else if (first >= 0) {
      while (found < most && feature(found) < first + LANES) ++found;
    }
    if (found <= FEW) {
      const T* from = data + image * features + feature(0);
      vf v{};
      for (int64_t i = 0; i < n; ++i) v[i] = to_float(from[i * features]);
      store(to, v);
      return 1;
    }
    const T* from = data + image * features + first;
    vf r[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) r[i] = i < n ? load_as_float(from + i * features) : vf{};
    transpose(r);
    if (found == LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) store(to + i * pitch, r[i]);
    } else {  // the last of a chunk, or with channels between them that no weight reads
      vf all[LANES];
      for (int i = 0; i < LANES; ++i) all[i] = r[i];
      for (int64_t k = 0; k < found; ++k) store(to + k * pitch, all[feature(k) - first]);
    }
    return found;
  }

  void write(const char* from, int64_t pitch, int64_t feature, int64_t width, int64_t image, Epilogue e) const {
    const int64_t n = std::clamp<int64_t>(images - image, 0, LANES);
    T* to = data + image * features + feature;
    if (width == 1) {
      vf v = load(from) + splat(e.bias ? e.bias[feature] : 0.0f);
      if (e.relu) v = relu(v);
      for (int64_t i = 0; i < n; ++i) to[i * features] = from_float<T>(v[i]);
      return;
    }
    vf r[LANES];
    for (int i = 0; i < LANES; ++i) r[i] = load(from + i * pitch);
    transpose(r);
    const vf bias = e.bias ? load(e.bias + feature) : vf{};
    for (int i = 0; i < n; ++i) {
      vf v = r[i] + bias;
      if (e.relu) v = relu(v);
      store_from_float(to + i * features, v);
    }
  }
};

}  // namespace sfx
