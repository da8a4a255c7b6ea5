// The CPU kernels of neurons::glu_ and neurons::flush_. Of torch's headers they need that of at::parallel_for alone.
#include <ATen/Parallel.h>

#include <algorithm>

#include "neurons.h"

// One build that runs on older machines and is fast on new ones: the hot loops are compiled for each of these, and the
// loader picks. GCC alone does this for arch= levels; other compilers build for their default target.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
const char* neurons::cpu_vector() {
  return __builtin_cpu_supports("x86-64-v4") ? "x86-64-v4" : __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3" : "x86-64";
}
bool neurons::cpu_fast_bfloat16() { return __builtin_cpu_supports("avx512bf16"); }
#else
#define CLONES
const char* neurons::cpu_vector() { return "the compiler's default"; }
bool neurons::cpu_fast_bfloat16() { return false; }
#endif

namespace {

using namespace neurons;

// ------------------------------------------------------------------------------------------------ number formats

struct Float {
  using Bits = float;
  static constexpr bool kLow = false;
  NEURONS_FN static float load(Bits x) { return x; }
  NEURONS_FN static Bits store(float x) { return x; }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr bool kLow = true;
  NEURONS_FN static float load(Bits x) { return float_of(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)); }
  // Rounds to nearest even. NaN stays NaN with no test for it: one that comes of bfloat16 numbers or of arithmetic has 16
  // zeros at its end, so that rounding carries nothing out of its payload.
  NEURONS_FN static Bits store(float x) {
    const uint32_t i = static_cast<uint32_t>(bits_of(x));
    return static_cast<Bits>((i + 0x7fff + ((i >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr bool kLow = true;
  NEURONS_FN static float load(Bits x) {
    const int32_t magnitude = (x & 0x7fff) << 13;
    // 2^112 moves the exponent's offset, subnormals included; infinity and NaN get the full exponent instead
    const int32_t scaled = bits_of(float_of(magnitude) * 5.192296858534828e33f);
    const int32_t full = magnitude | 0x7f800000;
    return float_of(((x & 0x8000) << 16) | (magnitude >= 0x0f800000 ? full : scaled));
  }
  NEURONS_FN static Bits store(float x) {  // round to nearest even
    const int32_t i = bits_of(x), sign = (i >> 16) & 0x8000, magnitude = i & 0x7fffffff;
    const int32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
    // below 2^-14: adding 0.5 leaves the result's units (2^-24) in the lowest bits, rounded
    const int32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    int32_t h = magnitude < 0x38800000 ? small : normal;
    h = magnitude >= 0x477ff000 ? 0x7c00 : h;
    h = magnitude > 0x7f800000 ? 0x7e00 : h;
    return static_cast<Bits>(sign | h);
  }
};

// ------------------------------------------------------------------------------------------------------ products

// What the statistics of a tile need of it, in the first-level cache.
struct Tile { float gate[kTile], act[kTile], product[kTile]; };

// gate <- act(gate) * up for n columns; with Keep (n <= kTile), the parts are left in tile.
template <class T, int Act, bool Keep>
NEURONS_FN void columns(typename T::Bits* __restrict gate, const typename T::Bits* __restrict up, int n, Tile* __restrict tile) {
  for (int j = 0; j < n; ++j) {
    const float g = T::load(gate[j]);
    const float a = act_<T::kLow>(Act, g);
    const float h = up ? a * T::load(up[j]) : a;
    if (Keep) {
      tile->gate[j] = g;
      tile->act[j] = a;
      tile->product[j] = h;
    }
    gate[j] = T::store(h);
  }
}

// A loop of its own for each case: the arguments that choose it are constants there.
template <class T, int Act>
NEURONS_FN void one_act(typename T::Bits* gate, const typename T::Bits* up, int n, Tile* tile) {
  if (tile) up ? columns<T, Act, true>(gate, up, n, tile) : columns<T, Act, true>(gate, nullptr, n, tile);
  else up ? columns<T, Act, false>(gate, up, n, nullptr) : columns<T, Act, false>(gate, nullptr, n, nullptr);
}

template <class T>
NEURONS_FN void any_act(typename T::Bits* gate, const typename T::Bits* up, int n, int act, Tile* tile) {
  switch (act) {
    case kSilu: return one_act<T, kSilu>(gate, up, n, tile);
    case kGelu: return one_act<T, kGelu>(gate, up, n, tile);
    case kGeluTanh: return one_act<T, kGeluTanh>(gate, up, n, tile);
    default: return one_act<T, kRelu>(gate, up, n, tile);
  }
}

// Overloads: GCC clones no template.
CLONES void products(Float, float* g, const float* u, int n, int act, Tile* t) { any_act<Float>(g, u, n, act, t); }
CLONES void products(BFloat16, uint16_t* g, const uint16_t* u, int n, int act, Tile* t) { any_act<BFloat16>(g, u, n, act, t); }
CLONES void products(Float16, uint16_t* g, const uint16_t* u, int n, int act, Tile* t) { any_act<Float16>(g, u, n, act, t); }

// ---------------------------------------------------------------------------------------------------- statistics

// The sketch is counted late: a column's counters lie in some five cache lines of their own, and a decode step, of one token a
// row, would wait for memory at most increments. Instead a tile's bins are written, row by row, into the ring of their group; when
// that holds kPendingRows rows of a column, they are counted in a small table and added in one sweep of each group's sketch.
// Of the parts of a tile one is due every kDueRows rows, so that no call has much more to do than another.
constexpr int kParts = 8, kPart = kTile / kParts, kDueRows = kPendingRows / kParts;
static_assert(kTile % kParts == 0 && kPendingRows % kParts == 0 && (kPendingRows & (kPendingRows - 1)) == 0, "all come out even");

int ring_row(int row) { return row & (kPendingRows - 1); }

// A part is counted when this row is the next to write, so that from here on lie its uncounted rows, oldest first.
int due_row(int part) { return ring_row((part + 1) * kDueRows); }

// Adds the chosen rows of columns [first, first + n) to their counts and their part of the sketch, one group's.
CLONES void count_rows(const Pending& pending, const int16_t* rows, int used, int first, int n, int32_t* __restrict count,
                       int32_t* __restrict sketch) {
  constexpr int kSide = 16;  // columns side by side, so that an increment need not wait for the one before
  for (int j = 0; j < n; j += kSide) {
    const int side = n - j < kSide ? n - j : kSide;
    alignas(64) int32_t table[kSide][kBins + 8] = {};
    for (int k = 0; k < side * kBins; k += 16) __builtin_prefetch(sketch + j * kBins + k, 0, 2);
    for (int k = 0; k < used; ++k) {
      __builtin_prefetch(pending.bin_plus_1[rows[k + 12 < used ? k + 12 : k]] + first + j);
      const uint16_t* bin_plus_1 = pending.bin_plus_1[rows[k]] + first + j;
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) ++table[i][bin_plus_1[i]];
    }
    for (int i = 0; i < side; ++i) count[j + i] += used - table[i][0];
    for (int i = 0; i < side; ++i)
      for (int b = 0; b < kBins; ++b) sketch[(j + i) * kBins + b] += table[i][b + 1];
  }
}

// Counts the oldest `size` uncounted rows of a part of a tile.
void count_part(const Args& a, const Pending& pending, int64_t tile, int part, int size) {
  const int64_t first = tile * kTile + part * kPart;
  if (first >= a.width) return;
  const int n = static_cast<int>(std::min<int64_t>(kPart, a.width - first)), begin = due_row(part);
  int16_t rows[kPendingRows];
  bool counted[kPendingRows] = {};
  for (int done = 0, k = 0; done < size; ++k) {  // group by group, of those that the rows name
    if (counted[k]) continue;
    const int group = pending.group_plus_1[ring_row(begin + k)] - 1;
    int used = 0;
    for (int i = k; i < size; ++i) {
      const int row = ring_row(begin + i);
      const bool mine = pending.group_plus_1[row] == group + 1;
      rows[used] = static_cast<int16_t>(row);
      used += mine;
      counted[i] |= mine;
    }
    done += used;
    if (group < 0 || group >= a.groups) continue;
    const int64_t column = group * a.width + first;
    count_rows(pending, rows, used, part * kPart, n, a.count + column, a.sketch + column * kBins);
  }
}

// Adds a token's n columns to the moments of its group, and notes their bins.
CLONES void add_moments(const Tile& tile, int n, double* __restrict sum, double* __restrict squares,
                        uint16_t* __restrict bin_plus_1) {
  for (int j = 0; j < n; ++j) {
    const double h = tile.product[j];
    sum[j] += h;
    squares[j] += h * h;
  }
  for (int j = 0; j < n; ++j) bin_plus_1[j] = tile.gate[j] > 0.f ? bin_(tile.act[j]) + 1 : 0;
}

// Adds a token's n columns of a tile to the statistics of its group.
NEURONS_FN void add_statistics(const Args& a, const Tile& parts, int64_t tile, int n, int group) {
  const int64_t first = tile * kTile, column = group * a.width + first;
  double* sum = a.moments + 2 * group * a.width + first;
  if (a.pending) {
    Pending& pending = a.pending[group % a.rings * int64_t{a.tiles()} + tile];
    const int row = ring_row(pending.next_row), part = row / kDueRows;
    add_moments(parts, n, sum, sum + a.width, pending.bin_plus_1[row]);
    pending.group_plus_1[row] = group + 1;
    pending.next_row = ring_row(row + 1);
    if (pending.next_row == due_row(part)) count_part(a, pending, tile, part, kPendingRows);
    return;
  }
  uint16_t bin_plus_1[kTile];
  add_moments(parts, n, sum, sum + a.width, bin_plus_1);
  for (int j = 0; j < n; ++j) {
    if (bin_plus_1[j] == 0) continue;
    ++a.count[column + j];
    ++a.sketch[(column + j) * kBins + bin_plus_1[j] - 1];
  }
}

constexpr int kBlock = 4 * kTile;  // columns that one call handles where nothing is observed

// A token's columns from `tile` on: a tile's where statistics are gathered, else a block's.
template <class T, bool Statistics>
void token(const Args& a, int64_t t, int tile, int tiles) {
  constexpr int size = Statistics ? kTile : kBlock;
  const int64_t first = int64_t{kTile} * tile;
  const int n = static_cast<int>(std::min<int64_t>(size, a.width - first));
  auto* gate = static_cast<typename T::Bits*>(a.gate) + t * a.gate_stride + first;
  auto* up = a.up ? static_cast<const typename T::Bits*>(a.up) + t * a.up_stride + first : nullptr;
  const int profile = a.token_profile ? a.token_profile[t] : 0, several = std::min(size / kTile, tiles - tile);
  const Span edits = edits_of(a, profile, tile, several, tiles);

  // The edited columns' activations are computed apart, from gates that are read before they are overwritten.
  float edited[kBlock];
  int used = 0;
  for (int k = edits.begin; k < edits.end && used < size; ++k) {
    const int64_t j = a.edit_index[k] - first;
    edited[used++] = j < 0 || j >= n ? 0.f : T::load(gate[j]);
  }
  if (used) products(Float{}, edited, nullptr, used, a.act, nullptr);

  const int group = Statistics ? a.token_group[t] : -1;
  const bool observed = group >= 0 && group < a.groups;
  Tile parts;
  if (Statistics && t + 1 < a.tokens) {  // a tile's rows lie too far apart for the machine to see what comes next
    for (int j = 0; j < n; j += 64 / sizeof(*gate)) {
      __builtin_prefetch(gate + a.gate_stride + j, 1);
      if (up) __builtin_prefetch(up + a.up_stride + j);
    }
  }
  products(T{}, gate, up, n, a.act, observed ? &parts : nullptr);

  for (int i = 0; i < used; ++i) {
    const int64_t j = a.edit_index[edits.begin + i] - first;
    if (j < 0 || j >= n) continue;
    gate[j] = T::store(edit_(a.edit_value[edits.begin + i], edited[i], up ? T::load(up[j]) : 1.f));
  }
  if (observed) add_statistics(a, parts, tile, n, group);
}

template <class T>
void glu(const Args& a) {
  const int tiles = a.tiles();
  constexpr int64_t kGrain = 8192;  // elements that are worth another thread
  if (a.token_group) {
    // One thread owns a tile's columns for all tokens of a share of the rings: statistics need no atomics, and their sums one
    // fixed order. Where there are fewer tiles than threads, as in the narrow experts of a mixture, there is more than one share.
    const int shares = tiles ? std::min<int>(std::max(a.rings, 1), ceil_div(at::get_num_threads(), tiles)) : 1;
    at::parallel_for(0, tiles * shares, kGrain / kTile * shares / std::max<int64_t>(a.tokens, 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int tile = static_cast<int>(i % tiles);
        for (int64_t t = 0; t < a.tokens; ++t)
          if (shares == 1 || (a.token_group[t] < 0 ? t : a.token_group[t] % a.rings) % shares == i / tiles)
            token<T, true>(a, t, tile, tiles);
      }
    });
  } else {
    const int64_t blocks = ceil_div(a.width, kBlock);
    at::parallel_for(0, a.tokens * blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      int64_t t = begin / blocks, block = begin % blocks;
      for (int64_t i = begin; i < end; ++i) {
        token<T, false>(a, t, static_cast<int>(block) * (kBlock / kTile), tiles);
        if (++block == blocks) block = 0, ++t;
      }
    });
  }
}

}  // namespace

void neurons::glu_cpu(const Args& args) {
  if (args.dtype == kFloat32) glu<Float>(args);
  else if (args.dtype == kBFloat16) glu<BFloat16>(args);
  else glu<Float16>(args);
}

void neurons::flush_cpu(const Args& a) {
  at::parallel_for(0, int64_t{a.rings} * a.tiles(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Pending& ring = a.pending[i];
      for (int part = 0; part < kParts; ++part) count_part(a, ring, i % a.tiles(), part, ring_row(ring.next_row - due_row(part)));
      memset(&ring, 0, sizeof(ring));
    }
  });
}
