#include "plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <stdexcept>

#include "runtime.h"

namespace sfx {
namespace {

constexpr int64_t L1_BUDGET = 26 << 10, L2_BUDGET = 448 << 10, ACC_BUDGET = 320 << 10;
// Bytes that the packed channels of a chunk may take; the last: all of them.
constexpr int64_t CHUNK_BUDGETS[] = {L1_BUDGET,     2 * L1_BUDGET, 3 * L1_BUDGET, 4 * L1_BUDGET,
                                     L2_BUDGET / 2, L2_BUDGET,     INT64_MAX / 2};
constexpr size_t KEPT_PASSES = 12;

struct Sizes {  // what the cost of a tiling depends on
  PassKind kind;
  int64_t live, outputs, entries, blocks;
  int threads;
};

// Packed positions of an axis by the number of outputs that a strip has.
class Pitches {
 public:
  Pitches(const AxisMap& axis, int64_t kernel) : axis_(axis), kernel_(kernel) {
    Packing p;
    if (!pack_clipped(axis, kernel, &p)) return;
    clipped_ = p.pitch;
    for (int64_t tap : axis.tap)
      touched_ += (1 - double(p.clip[tap] != NO_OUTPUT) / double(axis.count)) / double(axis.tap.size());
  }
  int64_t clipped() const { return clipped_; }  // of the whole axis without zeros around it; 0 if it cannot be
  double touched() const { return touched_; }   // share of its outputs that a tap touches then
  int64_t operator()(int64_t outputs) {
    if (int64_t(known_.size()) <= outputs) known_.resize(outputs + 1, -1);
    if (known_[outputs] < 0) known_[outputs] = std::max<int64_t>(1, pack_axis(axis_, kernel_, outputs).pitch);
    return known_[outputs];
  }
  int64_t count() const { return axis_.count; }
  int64_t inputs() const { return std::min(axis_.in_size, axis_.count * axis_.in_step); }

 private:
  const AxisMap& axis_;
  int64_t kernel_, clipped_ = 0;
  double touched_ = 0;
  std::vector<int64_t> known_;
};

// The microkernel for tiles that span their axes and are clipped, null if there is none for these.
const Microkernel* clipped_microkernel(const Tiling& t, int64_t rows, int64_t cols) {
  if (t.rows != rows || t.cols != cols) return nullptr;
  return find_microkernel(t.rows, t.cols * t.batch * VECS, t.batch * VECS);
}

struct Footprint {
  int64_t rows, cols;  // packed positions of a tile
  double touched;      // share of its outputs that an entry touches
  bool clipped;
};
Footprint footprint(Pitches& y, Pitches& x, const Tiling& t) {
  const double touched = y.touched() * x.touched();
  if (y.clipped() && x.clipped() && touched < 1 && clipped_microkernel(t, y.count(), x.count()))
    return {y.clipped(), x.clipped(), touched, true};
  return {y(t.rows), x(t.cols), 1, false};
}

// Cycles for one line to be loaded from where a working set of so many bytes lives.
struct Level {
  double bytes, cycles;
};
constexpr size_t LEVELS = 7;

// What cost() knows of a processor, in cycles. Levels are as measured with loads alone, but above 256 KB on Zen 5,
// where they are what ranks tilings as their times do. Those of Zen 4 and of Sapphire Rapids and newer Xeons, and what
// stands beside them, were fitted to times of tilings: 36,000 of 32 passes, 19,500 of 137. The defaults are Cascade
// Lake's.
struct Machine {
  Level level[LEVELS];
  int64_t strip_bytes = L2_BUDGET;  // most that a strip of several tiles may take packed; beyond, it is read from L3
  double pack_blocks = 12;    // to pack a line of a tile of several blocks of images, which nothing fetches ahead
  double pack_row = 6;        // to pack a line of a row of one block of images
  double pack_features = 12;  // to pack a line of a linear layer's rows
  double pack_again = 6;      // to pack a line of a row that was packed just before
  double run = 15;            // of each run of packed lines
  double record = 25;         // of each record beside its lines
  double entry = 1.5;         // of each entry beside its lines
  double dot_entry = 2.5;     // of an entry of a weight gradient, beside `entry`
  double first_load = 0;      // how often a weight gradient's tile loads a line of its strip of several from L2
  double sums = 1.6;          // to load and store a line of sums, over what loading one takes
  double unpack = 1;          // to unpack a line of sums, beside loading it
  double beside = 64 << 10;   // bytes that share the caches with the sums
  double clipped_run = 15;    // of each run of a clipped record's entries of one class
  double clipped_dots = 15;   // the same of a weight gradient
  int64_t partial_bytes = 384 << 10;  // of weight gradients summed at a time; on Zen 4 they leave L2
};

constexpr Machine CASCADE_LAKE{{{26 << 10, 0.5}, {64 << 10, 1.0}, {128 << 10, 1.2}, {256 << 10, 1.35},
                                {512 << 10, 1.6}, {1 << 20, 2.4}, {4 << 20, 5.0}}};

constexpr Machine sapphire_rapids() {
  Machine m{{{44 << 10, 0.63}, {64 << 10, 1.01}, {128 << 10, 1.22}, {256 << 10, 1.65},
             {768 << 10, 1.99}, {1536 << 10, 9.2}, {4 << 20, 25}}};
  m.pack_blocks = 28, m.pack_row = 11, m.pack_features = 16, m.pack_again = 3, m.run = 15.5;
  m.record = 7.7, m.entry = 1.65, m.dot_entry = 2.1, m.first_load = 1;
  m.sums = 2.1, m.unpack = 0.12, m.beside = 171 << 10;
  m.clipped_run = 14.3, m.clipped_dots = 25.5;
  return m;
}

constexpr Machine zen_4() {
  Machine m{{{26 << 10, 1.04}, {64 << 10, 1.24}, {128 << 10, 1.72}, {256 << 10, 1.82},
             {512 << 10, 2.9}, {1 << 20, 5.5}, {4 << 20, 5.6}}};
  m.pack_blocks = 7, m.pack_row = m.pack_again = 5.5, m.pack_features = 0.5, m.run = 18;
  m.record = 8, m.entry = 1, m.dot_entry = 0.9;
  m.sums = 1.6, m.unpack = 0, m.beside = 96 << 10;
  m.clipped_run = 10.5, m.clipped_dots = 10.5, m.partial_bytes = 1536 << 10;
  return m;
}

constexpr Machine zen_5() {
  Machine m{{{44 << 10, 1.0}, {64 << 10, 1.15}, {128 << 10, 1.4}, {256 << 10, 1.6},
             {512 << 10, 1.8}, {1 << 20, 2.6}, {4 << 20, 8}}};
  m.strip_bytes = 3 << 20, m.pack_blocks = 30, m.record = 8, m.entry = 2.5;
  return m;
}

const Machine& machine() {
  static constexpr Machine SAPPHIRE_RAPIDS = sapphire_rapids(), ZEN_4 = zen_4(), ZEN_5 = zen_5();
  switch (processor()) {
    case Processor::SAPPHIRE_RAPIDS: return SAPPHIRE_RAPIDS;
    case Processor::AMD: return ZEN_4;
    case Processor::ZEN_5: return ZEN_5;
    case Processor::OTHER: break;
  }
  return CASCADE_LAKE;
}

constexpr double READ_BACK = 3;  // cycles to read a line back from L3

double load_cycles(double bytes) {
  const Level(&level)[LEVELS] = machine().level;
  if (bytes <= level[0].bytes) return level[0].cycles;
  for (size_t i = 1; i < LEVELS; ++i) {
    const auto [low, below] = level[i - 1];
    const auto [high, above] = level[i];
    if (bytes <= high) return below + (above - below) * std::log(bytes / low) / std::log(high / low);
  }
  return level[LEVELS - 1].cycles;
}

// Cycles of a tiling, from the lines it moves. The constants are measured on AVX-512 and only rank candidates.
double cost(const Sizes& s, Pitches& y, Pitches& x, const Tiling& t) {
  const double vectors = double(t.rows * t.cols * t.batch * VECS);
  const Footprint f = footprint(y, x, t);
  const double tile_bytes = double(f.rows * f.cols * t.batch * LINE);
  const int64_t strip_rows = f.clipped ? f.rows : y(t.rows * t.strip_rows);
  const double strip_lines = double(strip_rows * (f.clipped ? f.cols : x(t.cols * t.strip_cols)) * t.batch);
  const double chunks = double(ceil_div(s.live, t.chunk)), blocks = double(ceil_div(s.outputs, t.block));
  const double per_cell = double(s.entries) / (chunks * s.outputs);
  const double records = chunks * s.outputs * (1 - std::exp(-per_cell));
  const Machine& m = machine();
  const double acc = load_cycles(double(t.block) * vectors * LANES * 4 + m.beside);
  double tile = load_cycles(t.chunk * tile_bytes) * vectors * f.touched + m.entry + (s.kind == WGRAD ? m.dot_entry : 0);
  tile *= double(s.entries);
  tile += records * (m.record + vectors * (s.kind == WGRAD ? 1.0 : m.sums) * acc);
  if (s.kind != WGRAD) {  // the last record of an output in a whole tile neither stores nor unpacks its sums
    const int64_t inside = y.count() / t.rows * t.rows * (x.count() / t.cols * t.cols);
    const double whole = double(inside) / double(y.count() * x.count());
    tile -= whole * double(s.outputs) * vectors * (m.sums * acc * (chunks > 1 ? 0.5 : 1) + acc);
  }
  const double run_cycles = s.kind == WGRAD ? m.clipped_dots : m.clipped_run;
  if (f.clipped) tile += records * CLASSES * (1 - std::exp(-per_cell / CLASSES)) * run_cycles;
  const double units = s.kind == WGRAD ? blocks * std::ceil(s.entries / blocks * 4 / double(m.partial_bytes)) : blocks;
  tile += units / blocks * double(s.outputs) * vectors * (m.unpack + acc);  // unpack the sums, or pack the gradient
  const double strips = double(ceil_div(y.count(), t.rows * t.strip_rows) *
                               ceil_div(x.count(), t.cols * t.strip_cols) * ceil_div(s.blocks, t.batch));
  const double tiles = double(ceil_div(y.count(), t.rows) * ceil_div(x.count(), t.cols) * ceil_div(s.blocks, t.batch));
  tile += double(s.outputs * t.rows * t.batch) * 10;  // each row of a tile is a run of its own
  const double runs = double(s.live * strip_rows * t.batch);
  const double line = t.batch == 1 ? m.pack_row : y.count() * x.count() == 1 ? m.pack_features : m.pack_blocks;
  const double lines = strips * blocks * double(s.live) * strip_lines * VECS;
  // Rows that strips share, and strips that follow each other for another block, are read from L2.
  const double inputs = double(s.live * y.inputs() * x.inputs() * s.blocks * VECS) * (s.kind == WGRAD ? blocks : 1);
  const double again = t.batch == 1 ? std::max(0.0, lines - inputs) : 0;
  const double packing = (lines - again) * line + again * m.pack_again + strips * blocks * runs * m.run;
  const double items = strips * blocks;
  if (s.kind == WGRAD && t.strip_rows * t.strip_cols > 1)  // its strip is packed into L2, a single tile into L1
    tile += double(s.live) * tile_bytes / LINE * VECS * m.first_load * load_cycles(double(s.live) * strip_lines * LINE);
  double back = 0;
  if (t.strip_rows * t.strip_cols > 1 && double(s.live) * strip_lines * LINE > L2_BUDGET) {
    if (items < 4 * s.threads) return INFINITY;
    back = items * double(s.live) * strip_lines * VECS * READ_BACK;
  }
  // Threads share the strips of a weight gradient, or the cells of one strip.
  const double shares = s.kind == WGRAD ? std::min<double>(s.threads, std::max(strips, blocks * chunks)) : items;
  const double parallel = std::ceil(shares / s.threads) * s.threads / shares;
  return (tiles * tile + packing + back) * parallel;
}

Tiling choose(const Sizes& s, const AxisMap& axis_y, const AxisMap& axis_x, const int64_t* kernel) {
  Pitches y(axis_y, kernel[0]), x(axis_x, kernel[1]);
  int count = 0;
  const Microkernel* table = microkernels(&count);
  const int64_t most = s.kind == WGRAD ? L2_BUDGET : machine().strip_bytes;
  // Strips narrower than an axis pay where the columns that they share are cheap to pack again.
  const bool shares = kernel[1] > 1 && machine().pack_again < machine().pack_row;
  Tiling best{};
  double best_cost = INFINITY;
  const auto consider = [&](const Tiling& t) {
    const double c = cost(s, y, x, t);
    if (c >= best_cost) return;
    best_cost = c;
    best = t;
  };
  for (int k = 0; k < count; ++k) {
    const Microkernel& m = table[k];
    if (!m.fma || m.vectors % VECS || m.rows > y.count()) continue;
    const int64_t lines = m.vectors / VECS;
    for (int64_t batch = 1; batch <= lines && batch <= s.blocks; ++batch) {
      if (lines % batch || lines / batch > x.count()) continue;
      Tiling t{m.rows, lines / batch, batch, 1, 1, 1, 1};
      const Footprint f = footprint(y, x, t);
      if (m.column && !f.clipped) continue;
      const int64_t tile_bytes = f.rows * f.cols * batch * LINE, acc = t.rows * lines * LINE;
      const int64_t whole_y = ceil_div(y.count(), t.rows), whole_x = ceil_div(x.count(), t.cols);
      for (int64_t budget : CHUNK_BUDGETS)
        for (int64_t parts : {1, 2, 4, 8}) {
          t.chunk = ceil_div(s.live, ceil_div(s.live, std::clamp<int64_t>(budget / tile_bytes, 1, s.live)));
          t.block = ceil_div(s.outputs, parts);
          if (parts > 1 && (t.block < 16 || t.block * acc < ACC_BUDGET / 4)) continue;
          for (int64_t sy : {int64_t(1), int64_t(2), int64_t(4), whole_y})
            for (int64_t sx : {int64_t(1), int64_t(2), int64_t(4), whole_x}) {
              if (sx != 1 && sx != whole_x && !shares) continue;
              t.strip_rows = std::min(sy, whole_y);
              t.strip_cols = std::min(sx, whole_x);
              const int64_t strip = y(t.rows * t.strip_rows) * x(t.cols * t.strip_cols) * batch * LINE;
              if (t.strip_rows * t.strip_cols == 1 || s.live * strip <= most) consider(t);
            }
        }
    }
  }
  return best;
}

// With lanes over pixels a tile is rows x cols outputs, flattened over the packed rows and cut into native vectors.
const Microkernel* pixel_microkernel(int64_t rows, int64_t cols, int64_t pitch) {
  const int64_t vectors = ceil_div((rows - 1) * pitch + cols, LANES);
  int count = 0;
  const Microkernel *table = microkernels(&count), *best = nullptr;
  for (int k = 0; k < count; ++k)
    if (table[k].fma && table[k].rows == 1 && table[k].vectors >= vectors && (!best || table[k].vectors < best->vectors))
      best = table + k;
  return best;
}

Tiling choose_pixels(const Sizes& s, const AxisMap& axis_y, const AxisMap& axis_x, const int64_t* kernel) {
  Pitches y(axis_y, kernel[0]), x(axis_x, kernel[1]);
  Tiling best{};
  double best_cost = INFINITY;
  for (int64_t cols = x.count(); best_cost == INFINITY; cols = ceil_div(cols, 2))
    for (int64_t rows = 1; rows <= y.count(); ++rows) {
      const Microkernel* m = pixel_microkernel(rows, cols, x(cols));
      if (!m) break;
      const int64_t channel = y(rows) * x(cols) * 4;
      const int64_t strips = ceil_div(y.count(), rows) * ceil_div(x.count(), cols);
      for (int64_t budget : {L1_BUDGET, L2_BUDGET, INT64_MAX / 2}) {
        Tiling t{rows, cols, 1, 1, 1, 1, 1};
        t.chunk = ceil_div(s.live, ceil_div(s.live, std::clamp<int64_t>(budget / channel, 1, s.live)));
        t.block = ceil_div(s.outputs, std::max<int64_t>(1, ceil_div(s.threads * 2, strips * s.blocks)));
        const double chunks = double(ceil_div(s.live, t.chunk));
        const double records = chunks * s.outputs * (1 - std::exp(-double(s.entries) / (chunks * s.outputs)));
        double c = double(s.entries) * (1.6 * load_cycles(double(t.chunk * channel)) * m->vectors + 1.5);
        c += records * (14 + m->vectors * 1.6) + double(s.outputs) * m->vectors * 2;
        c += double(ceil_div(s.outputs, t.block) * s.live) * double(y(rows)) * (x(cols) / double(LANES) + 4);
        if (c * strips >= best_cost) continue;
        best_cost = c * strips;
        best = t;
      }
    }
  return best;
}

void finish(PhasePlan& p, const Pattern& pattern, const PassPlan& pass) {
  const Tiling& t = p.tiling;
  const int64_t* kernel = pattern.shape.kernel;
  const bool pixels = pass.kind == PIXELS;
  p.kernel = pixels ? pixel_microkernel(t.rows, t.cols, pack_axis(p.x, kernel[1], t.cols).pitch)
                    : find_microkernel(t.rows, t.cols * t.batch * VECS);
  const Microkernel* const clipping = pixels ? nullptr : clipped_microkernel(t, p.y.count, p.x.count);
  const bool clipped = clipping && pack_clipped(p.y, kernel[0], &p.pack_y) && pack_clipped(p.x, kernel[1], &p.pack_x) &&
                       (!p.kernel || p.pack_y.clips() || p.pack_x.clips());
  if (clipped) p.kernel = clipping;
  if (!p.kernel || t.chunk < 1 || t.block < 1 || t.strip_rows < 1 || t.strip_cols < 1)
    throw std::invalid_argument("no microkernel for this tiling");
  if (!clipped) {
    p.pack_y = pack_axis(p.y, kernel[0], t.rows * t.strip_rows);
    p.pack_x = pack_axis(p.x, kernel[1], t.cols * t.strip_cols);
  }
  p.cell_bytes = pixels ? 4 : t.batch * LINE;
  p.row_bytes = p.pack_x.pitch * p.cell_bytes;
  p.channel_bytes = p.pack_y.pitch * p.row_bytes;
  p.tail_bytes = (int64_t(p.pack_y.source.size()) - p.pack_y.pitch) * p.row_bytes +
                 (int64_t(p.pack_x.source.size()) - p.pack_x.pitch) * p.cell_bytes;
  if (pixels) p.tail_bytes += p.tile_bytes();  // the last vectors read past the last row
  p.strips_y = ceil_div(p.y.count, t.rows * t.strip_rows);
  p.strips_x = ceil_div(p.x.count, t.cols * t.strip_cols);
  p.batches = ceil_div(pass.blocks, t.batch);
  std::vector<int64_t> tap(pattern.shape.taps(), -1);
  std::vector<uint8_t> tap_class(clipped ? tap.size() : 0);
  for (int64_t r = 0; r < kernel[0]; ++r)
    for (int64_t s = 0; s < kernel[1]; ++s)
      if (p.pack_y.tap_start[r] >= 0 && p.pack_x.tap_start[s] >= 0) {
        tap[r * kernel[1] + s] = p.pack_y.tap_start[r] * p.row_bytes + p.pack_x.tap_start[s] * p.cell_bytes;
        if (clipped) tap_class[r * kernel[1] + s] = p.pack_y.clip[r] * CLIPS + p.pack_x.clip[s];
      }
  if (p.packed_bytes(t.chunk) > int64_t(UINT32_MAX)) throw std::length_error("a packed chunk exceeds 4 GiB");
  p.lists = make_lists(pattern, pass.kind == DGRAD, tap, tap_class, p.channel_bytes, t.chunk, t.block, p.kernel->group);
}

}  // namespace

int64_t partial_budget() { return machine().partial_bytes; }

int64_t out_size(const ConvShape& s, int a, int64_t size) {
  return (size + 2 * s.pad[a] - s.dilation[a] * (s.kernel[a] - 1) - 1) / s.stride[a] + 1;
}

std::shared_ptr<const PassPlan> make_pass(const Pattern& pattern, PassKind kind, int64_t h, int64_t w, int64_t blocks,
                                          int threads, const Tiling* wanted) {
  const auto start = std::chrono::steady_clock::now();
  const ConvShape& s = pattern.shape;
  const int64_t oh = out_size(s, 0, h), ow = out_size(s, 1, w);
  auto pass = std::make_shared<PassPlan>();
  *pass = {kind, s.in, s.out, h, w, oh, ow, blocks, threads, 0, {}};
  if (kind == DGRAD) *pass = {kind, s.out, s.in, oh, ow, h, w, blocks, threads, 0, {}};
  const auto axis = kind == DGRAD ? dgrad_axis : fprop_axis;
  for (const AxisMap& y : axis(s.kernel[0], s.stride[0], s.pad[0], s.dilation[0], h, oh))
    for (const AxisMap& x : axis(s.kernel[1], s.stride[1], s.pad[1], s.dilation[1], w, ow)) {
      PhasePlan p{};
      p.y = y;
      p.x = x;
      std::vector<int64_t> allowed(s.taps(), -1);
      for (int64_t r : y.tap)
        for (int64_t c : x.tap) allowed[r * s.kernel[1] + c] = 0;
      int64_t entries = 0;
      const int64_t live = int64_t(live_inputs(pattern, kind == DGRAD, allowed, &entries).size());
      const Sizes sizes{kind, std::max<int64_t>(1, live), pass->out_channels, entries, blocks, threads};
      p.tiling = wanted ? *wanted : kind == PIXELS ? choose_pixels(sizes, y, x, s.kernel) : choose(sizes, y, x, s.kernel);
      finish(p, pattern, *pass);
      pass->phases.push_back(std::move(p));
    }
  // The largest first: threads run out of work on small items.
  std::stable_sort(pass->phases.begin(), pass->phases.end(), [](const PhasePlan& a, const PhasePlan& b) {
    return a.lists.entries() > b.lists.entries();
  });
  pass->build_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  return pass;
}

const uint32_t* Layer::columns(bool last) {
  if (!last) return pattern.column.data();
  std::lock_guard<std::mutex> lock(mutex);
  if (channels_last.empty()) {
    const int64_t taps = pattern.shape.taps(), inputs = pattern.shape.in / pattern.shape.groups;
    for (uint32_t column : pattern.column) channels_last.push_back(uint32_t(column % taps * inputs + column / taps));
  }
  return channels_last.data();
}

std::shared_ptr<const PassPlan> Layer::pass(PassKind kind, int64_t h, int64_t w, int64_t blocks, int threads) {
  std::lock_guard<std::mutex> lock(mutex);
  for (size_t i = 0; i < passes.size(); ++i) {
    const PassPlan& p = *passes[i];
    const int64_t ph = kind == DGRAD ? p.out_h : p.in_h, pw = kind == DGRAD ? p.out_w : p.in_w;
    if (p.kind != kind || ph != h || pw != w || p.blocks != blocks || p.threads != threads) continue;
    std::rotate(passes.begin() + i, passes.begin() + i + 1, passes.end());
    return passes.back();
  }
  if (passes.size() >= KEPT_PASSES) passes.erase(passes.begin());
  passes.push_back(make_pass(pattern, kind, h, w, blocks, threads, wanted[kind].get()));
  return passes.back();
}

}  // namespace sfx
