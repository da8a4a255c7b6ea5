// neurons::glu_: the activation and product of a gated MLP, written over gate, with sparse neuron edits and activation
// statistics in the same pass. Op schema, checks, CPU kernels, Meta kernel, and the glue to neurons_cuda.cu.
#include <Python.h>  // first, as Python asks; missing: install python3-dev (Debian) or python3-devel
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "neurons.h"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#ifndef NEURONS_SOURCE
#define NEURONS_SOURCE unknown
#endif

#ifdef NEURONS_CUDA
// Implemented in neurons_cuda.cu: returns null, or what went wrong.
extern "C" const char* neurons_glu_cuda(const neurons::Args* args, void* stream);
// Part of libtorch's C interface, declared here because its header wants the CUDA toolkit's.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

// One build that runs on older machines and is fast on new ones: the hot loops are compiled for each of these, and the
// loader picks. GCC alone does this for arch= levels; other compilers build for their default target.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

using neurons::Args;
using neurons::Edit;
using neurons::kBins;
using neurons::kTile;
using at::Tensor;
using OptTensor = std::optional<Tensor>;

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
  NEURONS_FN static float load(Bits x) { return neurons::float_of(static_cast<int32_t>(static_cast<uint32_t>(x) << 16)); }
  // Rounds to nearest even. NaN stays NaN with no test for it: one that comes of bfloat16 numbers or of arithmetic has 16
  // zeros at its end, so that rounding carries nothing out of its payload.
  NEURONS_FN static Bits store(float x) {
    const uint32_t i = static_cast<uint32_t>(neurons::bits_of(x));
    return static_cast<Bits>((i + 0x7fff + ((i >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr bool kLow = true;
  NEURONS_FN static float load(Bits x) {
    const int32_t magnitude = (x & 0x7fff) << 13;
    // 2^112 moves the exponent's offset, subnormals included; infinity and NaN get the full exponent instead
    const int32_t scaled = neurons::bits_of(neurons::float_of(magnitude) * 5.192296858534828e33f);
    const int32_t full = magnitude | 0x7f800000;
    return neurons::float_of(((x & 0x8000) << 16) | (magnitude >= 0x0f800000 ? full : scaled));
  }
  NEURONS_FN static Bits store(float x) {  // round to nearest even
    const int32_t i = neurons::bits_of(x), sign = (i >> 16) & 0x8000, magnitude = i & 0x7fffffff;
    const int32_t normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112 << 23)) >> 13;
    // below 2^-14: adding 0.5 leaves the result's units (2^-24) in the lowest bits, rounded
    const int32_t small = neurons::bits_of(neurons::float_of(magnitude) + 0.5f) - neurons::bits_of(0.5f);
    int32_t h = magnitude < 0x38800000 ? small : normal;
    h = magnitude >= 0x477ff000 ? 0x7c00 : h;
    h = magnitude > 0x7f800000 ? 0x7e00 : h;
    return static_cast<Bits>(sign | h);
  }
};

// --------------------------------------------------------------------------------------------------- CPU kernels

// What the statistics of a tile need of it, in the first-level cache.
struct Tile {
  float gate[kTile], act[kTile], product[kTile];
};

// gate <- act(gate) * up for n <= kTile columns; with Keep, the parts are left in tile.
template <class T, bool Keep, int Act>
NEURONS_FN void columns(typename T::Bits* __restrict gate, const typename T::Bits* __restrict up, int n,
                        Tile* __restrict tile) {
  for (int j = 0; j < n; ++j) {
    const float g = T::load(gate[j]);
    const float a = neurons::act_<T::kLow>(Act, g);
    const float h = up ? a * T::load(up[j]) : a;
    if (Keep) {
      tile->gate[j] = g;
      tile->act[j] = a;
      tile->product[j] = h;
    }
    gate[j] = T::store(h);
  }
}

template <class T, bool Keep>
NEURONS_FN void any_act(typename T::Bits* gate, const typename T::Bits* up, int n, int act, Tile* tile) {
#define NEURONS_ACT(A) \
  up ? columns<T, Keep, A>(gate, up, n, tile) : columns<T, Keep, A>(gate, nullptr, n, tile)
  switch (act) {
    case neurons::kSilu: NEURONS_ACT(neurons::kSilu); break;
    case neurons::kGelu: NEURONS_ACT(neurons::kGelu); break;
    case neurons::kGeluTanh: NEURONS_ACT(neurons::kGeluTanh); break;
    default: NEURONS_ACT(neurons::kRelu);
  }
#undef NEURONS_ACT
}

CLONES void plain_f32(float* g, const float* u, int n, int act) { any_act<Float, false>(g, u, n, act, nullptr); }
CLONES void plain_bf16(uint16_t* g, const uint16_t* u, int n, int act) { any_act<BFloat16, false>(g, u, n, act, nullptr); }
CLONES void plain_f16(uint16_t* g, const uint16_t* u, int n, int act) { any_act<Float16, false>(g, u, n, act, nullptr); }
CLONES void acts(float* x, int n, int act) { any_act<Float, false>(x, nullptr, n, act, nullptr); }
CLONES void keep_f32(float* g, const float* u, int n, int act, Tile* t) { any_act<Float, true>(g, u, n, act, t); }
CLONES void keep_bf16(uint16_t* g, const uint16_t* u, int n, int act, Tile* t) { any_act<BFloat16, true>(g, u, n, act, t); }
CLONES void keep_f16(uint16_t* g, const uint16_t* u, int n, int act, Tile* t) { any_act<Float16, true>(g, u, n, act, t); }

template <class T> void plain(typename T::Bits* g, const typename T::Bits* u, int n, int act);
template <> void plain<Float>(float* g, const float* u, int n, int act) { plain_f32(g, u, n, act); }
template <> void plain<BFloat16>(uint16_t* g, const uint16_t* u, int n, int act) { plain_bf16(g, u, n, act); }
template <> void plain<Float16>(uint16_t* g, const uint16_t* u, int n, int act) { plain_f16(g, u, n, act); }
template <class T> void keep(typename T::Bits* g, const typename T::Bits* u, int n, int act, Tile* t);
template <> void keep<Float>(float* g, const float* u, int n, int act, Tile* t) { keep_f32(g, u, n, act, t); }
template <> void keep<BFloat16>(uint16_t* g, const uint16_t* u, int n, int act, Tile* t) { keep_bf16(g, u, n, act, t); }
template <> void keep<Float16>(uint16_t* g, const uint16_t* u, int n, int act, Tile* t) { keep_f16(g, u, n, act, t); }

// The sketch is counted late. A column's counters lie in some five cache lines of their own, so that a decode step, which has
// one token a row, would wait for memory at most increments. Instead a tile's bins are written, row by row, into a ring, and
// when that holds kLogRows rows of a column, they are counted in a small table and added to the sketch in one sweep. Of the
// eight parts of a tile one is due every kLogRows / 8 rows, so that no call has much more to do than another. Zeros are empty.
constexpr int kLogRows = 512, kPart = kTile / 8;

struct alignas(64) Log {
  uint16_t bin[kLogRows][kTile];  // 1 + the bin; 0 where the activation was not positive
  int16_t group[kLogRows];
  int32_t next;  // the row to write
};
static_assert(kTile % kPart == 0 && kLogRows % (kTile / kPart) == 0, "rows and parts come out even");

// Adds the chosen rows of columns [first, first + n) to their counts and their part of the sketch, one group's.
CLONES void count_rows(const Log& log, const int16_t* rows, int used, int first, int n, int32_t* __restrict count, int32_t* __restrict sketch) {
  constexpr int kSide = 16;  // columns side by side, so that an increment need not wait for the one before
  for (int j = 0; j < n; j += kSide) {
    const int side = n - j < kSide ? n - j : kSide;
    alignas(64) int32_t table[kSide][kBins + 8] = {};
    for (int k = 0; k < side * kBins; k += 16) __builtin_prefetch(sketch + j * kBins + k, 0, 2);
    for (int k = 0; k < used; ++k) {
      __builtin_prefetch(log.bin[rows[k + 12 < used ? k + 12 : k]] + first + j);
      const uint16_t* bin = log.bin[rows[k]] + first + j;
#pragma GCC unroll 16
      for (int i = 0; i < kSide; ++i) ++table[i][bin[i]];
    }
    for (int i = 0; i < side; ++i) count[j + i] += used - table[i][0];
    for (int i = 0; i < side; ++i)
      for (int b = 0; b < kBins; ++b) sketch[(j + i) * kBins + b] += table[i][b + 1];
  }
}

// Counts `size` rows, from row `begin` on, of part `part` of a tile.
void count_part(const Log& log, int part, int64_t tile, int begin, int size, int32_t* count, int32_t* sketch, int64_t width, int groups) {
  const int n = static_cast<int>(std::min<int64_t>(kTile, width - tile * kTile)), first = part * kPart;
  if (first >= n) return;
  int16_t rows[kLogRows];
  bool counted[kLogRows] = {};
  for (int done = 0, k = 0; done < size; ++k) {  // group by group, of those that the rows name
    if (counted[k]) continue;
    const int group = log.group[(begin + k) % kLogRows];
    int used = 0;
    for (int i = k; i < size; ++i) {
      const int row = (begin + i) % kLogRows;
      const bool mine = log.group[row] == group;
      rows[used] = static_cast<int16_t>(row);
      used += mine;
      counted[i] |= mine;
    }
    const int64_t column = group * width + tile * kTile + first;
    if (group >= 0 && group < groups) count_rows(log, rows, used, first, std::min(kPart, n - first), count + column, sketch + column * kBins);
    done += used;
  }
}

// The first row that a part has not counted yet.
int uncounted(int part) { return (part + 1) * (kLogRows * kPart / kTile) % kLogRows; }

// Adds one token's n columns to the moments of its group; bin: what a Log holds of them.
CLONES void add_statistics(const Tile& tile, int n, double* __restrict sum, double* __restrict squares, uint16_t* __restrict bin) {
  for (int j = 0; j < n; ++j) {
    const double h = tile.product[j];
    sum[j] += h;
    squares[j] += h * h;
  }
  for (int j = 0; j < n; ++j) bin[j] = tile.gate[j] > 0.f ? neurons::bin_(tile.act[j]) + 1 : 0;
}

struct Span {
  int begin, end;
};

constexpr int kBlock = 4 * kTile;  // columns that one call handles where nothing is observed

// The edits of token t in `several` tiles from `tile`; an empty span for profile 0 and for anything out of range.
Span edits_of(const Args& a, int64_t t, int64_t tile, int64_t several, int64_t tiles) {
  const int p = a.token_profile ? a.token_profile[t] : 0;
  if (p <= 0 || p >= a.profiles) return {0, 0};
  const int32_t* ptr = a.edit_ptr + p * (tiles + 1);
  return {std::max(ptr[tile], 0), std::min(ptr[std::min(tile + several, tiles)], a.capacity)};
}

// One token's columns from `tile` on: a tile's where statistics are gathered, else a block's.
template <class T, bool Statistics>
void one_block(const Args& a, int64_t t, int64_t tile, int64_t tiles) {
  constexpr int size = Statistics ? kTile : kBlock;
  const int64_t first = tile * kTile;
  const int n = static_cast<int>(std::min<int64_t>(size, a.width - first));
  auto* gate = static_cast<typename T::Bits*>(a.gate) + t * a.gate_stride + first;
  auto* up = a.up ? static_cast<const typename T::Bits*>(a.up) + t * a.up_stride + first : nullptr;
  const Span edits = edits_of(a, t, tile, size / kTile, tiles);

  // The edited columns' activations are computed apart, from gates that are read before they are overwritten.
  float edited[kBlock];
  int used = 0;
  for (int k = edits.begin; k < edits.end && used < size; ++k) {
    const int64_t j = a.edit_index[k] - first;
    edited[used++] = j < 0 || j >= n ? 0.f : T::load(gate[j]);
  }
  if (used) acts(edited, used, a.act);

  const int g = Statistics ? a.token_group[t] : -1;
  const bool observed = g >= 0 && g < a.groups;
  Tile parts;
  if (Statistics && t + 1 < a.tokens) {  // a tile's rows lie too far apart for the machine to see what comes next
    for (int j = 0; j < n; j += 64 / sizeof(*gate)) {
      __builtin_prefetch(gate + a.gate_stride + j, 1);
      if (up) __builtin_prefetch(up + a.up_stride + j);
    }
  }
  if (observed) keep<T>(gate, up, n, a.act, &parts);
  else plain<T>(gate, up, n, a.act);

  for (int i = 0; i < used; ++i) {
    const int64_t j = a.edit_index[edits.begin + i] - first;
    if (j < 0 || j >= n) continue;
    gate[j] = T::store(neurons::edit_(a.edit_value[edits.begin + i], edited[i], up ? T::load(up[j]) : 1.f));
  }
  if (observed) {
    const int64_t column = g * a.width + first;
    double* sum = a.moments + 2 * g * a.width + first;
    uint16_t own[kTile];
    Log* log = a.log ? static_cast<Log*>(a.log) + tile : nullptr;
    const int row = log ? log->next & (kLogRows - 1) : 0;
    uint16_t* bin = log ? log->bin[row] : own;
    add_statistics(parts, n, sum, sum + a.width, bin);
    if (log) {
      log->group[row] = static_cast<int16_t>(g);
      log->next = (row + 1) % kLogRows;
      constexpr int kDue = kLogRows * kPart / kTile;
      if (log->next % kDue == 0) count_part(*log, row / kDue, tile, log->next, kLogRows, a.count, a.sketch, a.width, a.groups);
    } else {
      for (int j = 0; j < n; ++j) {
        if (bin[j] == 0) continue;
        ++a.count[column + j];
        ++a.sketch[(column + j) * kBins + bin[j] - 1];
      }
    }
  }
}

template <class T>
void glu_cpu(const Args& a) {
  const int64_t tiles = (a.width + kTile - 1) / kTile, blocks = (a.width + kBlock - 1) / kBlock;
  constexpr int64_t kGrain = 8192;  // elements that are worth another thread
  if (a.token_group) {
    // One thread owns a tile's columns for all tokens: statistics need no atomics, and their sums one fixed order.
    at::parallel_for(0, tiles, std::max<int64_t>(1, kGrain / kTile / std::max<int64_t>(a.tokens, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        for (int64_t t = 0; t < a.tokens; ++t) one_block<T, true>(a, t, tile, tiles);
      }
    });
  } else {
    at::parallel_for(0, a.tokens * blocks, kGrain / kBlock, [&](int64_t begin, int64_t end) {
      int64_t t = begin / blocks, block = begin % blocks;
      for (int64_t i = begin; i < end; ++i) {
        one_block<T, false>(a, t, block * (kBlock / kTile), tiles);
        if (++block == blocks) block = 0, ++t;
      }
    });
  }
}

// -------------------------------------------------------------------------------------------------------- checks

// What messages are made of: strings alone. Printing numbers through a stream crashes where a toolchain links its own
// libstdc++ into this library beside the one that torch uses.
std::string text(int64_t x) { return std::to_string(x); }
std::string text(at::ScalarType x) { return c10::toString(x); }
std::string text(const c10::Device& x) { return x.str(); }
std::string text(at::IntArrayRef x) {
  std::string all = "[";
  for (size_t d = 0; d < x.size(); ++d) all += (d ? ", " : "") + std::to_string(x[d]);
  return all + "]";
}

void check_table(const OptTensor& x, const char* name, const Tensor& gate, at::ScalarType type,
                 std::initializer_list<int64_t> shape) {  // -1 in shape: any size
  TORCH_CHECK(x->device() == gate.device(), name, ": expected on ", text(gate.device()), " like gate, got ", text(x->device()));
  TORCH_CHECK(x->scalar_type() == type, name, ": expected dtype ", text(type), ", got ", text(x->scalar_type()));
  bool same = x->dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; same && d < shape.size(); ++d) same = shape.begin()[d] < 0 || x->size(d) == shape.begin()[d];
  TORCH_CHECK(same, name, ": expected shape ", text(at::IntArrayRef(shape)), " (-1: any), got ", text(x->sizes()));
  TORCH_CHECK(x->is_contiguous(), name, ": expected contiguous, got strides ", text(x->strides()));
}

void check_rows(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 2, name, ": expected 2 dimensions [tokens, d_ff], got shape ", text(x.sizes()));
  TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1, name, ": expected last stride 1, got strides ", text(x.strides()));
  TORCH_CHECK(x.size(0) <= 1 || x.stride(0) >= x.size(1), name, ": expected rows that do not overlap, got strides ",
              text(x.strides()), " for shape ", text(x.sizes()));
}

// Checks all that can be checked without reading data, and gathers the pointers.
Args checked(const Tensor& gate, const OptTensor& up, int64_t act, const OptTensor& token_profile,
             const OptTensor& edit_ptr, const OptTensor& edit_index, const OptTensor& edit_value,
             const OptTensor& token_group, const OptTensor& count, const OptTensor& sketch, const OptTensor& moments,
             const OptTensor& log) {
  Args a{};
  check_rows(gate, "gate");
  const auto type = gate.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "gate: expected float32, bfloat16 or float16, got ", text(type));
  TORCH_CHECK(act >= 0 && act < neurons::kActs, "act: expected 0 (silu), 1 (gelu), 2 (gelu_tanh) or 3 (relu), got ", text(act));
  a.tokens = gate.size(0);
  a.width = gate.size(1);
  a.gate_stride = gate.stride(0);
  a.act = static_cast<int>(act);
  a.dtype = type == at::kFloat ? neurons::kFloat32 : type == at::kBFloat16 ? neurons::kBFloat16 : neurons::kFloat16;
  TORCH_CHECK(a.width < (int64_t{1} << 31) / kBins, "gate: at most ", text((int64_t{1} << 31) / kBins - 1), " columns, got ", text(a.width));
  TORCH_CHECK(a.tokens < (int64_t{1} << 30), "gate: at most 2^30 rows, got ", text(a.tokens));
  const int64_t tiles = (a.width + kTile - 1) / kTile;
  if (up) {
    check_rows(*up, "up");
    TORCH_CHECK(up->sizes() == gate.sizes(), "up: expected shape ", text(gate.sizes()), " like gate, got ", text(up->sizes()));
    TORCH_CHECK(up->scalar_type() == type, "up: expected dtype ", text(type), " like gate, got ", text(up->scalar_type()));
    TORCH_CHECK(up->device() == gate.device(), "up: expected on ", text(gate.device()), " like gate, got ", text(up->device()));
    a.up_stride = up->stride(0);
  }
  const int edits = token_profile.has_value() + edit_ptr.has_value() + edit_index.has_value() + edit_value.has_value();
  TORCH_CHECK(edits == 0 || edits == 4, "token_profile, edit_ptr, edit_index and edit_value: all four or none, got ", text(edits));
  if (edits) {
    check_table(token_profile, "token_profile", gate, at::kInt, {a.tokens});
    check_table(edit_ptr, "edit_ptr", gate, at::kInt, {-1, tiles + 1});
    check_table(edit_index, "edit_index", gate, at::kInt, {-1});
    check_table(edit_value, "edit_value", gate, at::kFloat, {edit_index->size(0), 4});
    a.profiles = static_cast<int>(edit_ptr->size(0));
    a.capacity = static_cast<int>(edit_index->size(0));
  }
  const int observed = token_group.has_value() + count.has_value() + sketch.has_value() + moments.has_value();
  TORCH_CHECK(observed == 0 || observed == 4, "token_group, count, sketch and moments: all four or none, got ", text(observed));
  if (observed) {
    check_table(token_group, "token_group", gate, at::kInt, {a.tokens});
    check_table(count, "count", gate, at::kInt, {-1, a.width});
    a.groups = static_cast<int>(count->size(0));
    check_table(sketch, "sketch", gate, at::kInt, {a.groups, a.width, kBins});
    check_table(moments, "moments", gate, at::kDouble, {a.groups, 2, a.width});
  }
  if (log) {
    TORCH_CHECK(observed, "log: expected with count, sketch and moments, got it alone");
    TORCH_CHECK(!gate.is_cuda(), "log: expected none on a GPU, which counts at once");
    check_table(log, "log", gate, at::kByte, {tiles, static_cast<int64_t>(sizeof(Log))});
    TORCH_CHECK(a.groups <= INT16_MAX, "log: at most ", text(INT16_MAX), " groups, got ", text(a.groups));
  }
  return a;
}

#define GLU_PARAMETERS                                                                                            \
  Tensor &gate, const OptTensor &up, int64_t act, const OptTensor &token_profile, const OptTensor &edit_ptr,      \
      const OptTensor &edit_index, const OptTensor &edit_value, const OptTensor &token_group,                     \
      const OptTensor &count, const OptTensor &sketch, const OptTensor &moments, const OptTensor &log
#define GLU_ARGUMENTS \
  gate, up, act, token_profile, edit_ptr, edit_index, edit_value, token_group, count, sketch, moments, log

// Byte ranges may interleave (the halves of a fused gate_up do), so compare within the rows of their common stride.
void check_overlap(const Tensor& gate, const Tensor& up) {
  const auto size = gate.element_size();
  const auto g = reinterpret_cast<intptr_t>(gate.data_ptr()), u = reinterpret_cast<intptr_t>(up.data_ptr());
  const auto span = [&](const Tensor& x) { return ((x.size(0) - 1) * x.stride(0) + x.size(1)) * size; };
  if (gate.numel() == 0 || g >= u + static_cast<intptr_t>(span(up)) || u >= g + static_cast<intptr_t>(span(gate))) return;
  const int64_t row = gate.stride(0) * size, columns = gate.size(1) * size;
  const int64_t apart = row > 0 ? (((u - g) % row) + row) % row : 0;
  TORCH_CHECK(gate.stride(0) == up.stride(0) && apart >= columns && row - apart >= columns,
              "gate and up: expected separate memory, got overlapping tensors of strides ", text(gate.strides()), " and ", text(up.strides()));
}

Log* log_of(const Tensor& log) {
  void* data = log.data_ptr();
  TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % alignof(Log) == 0, "log: expected memory aligned to ", text(alignof(Log)), " bytes");
  return static_cast<Log*>(data);
}

Args with_pointers(GLU_PARAMETERS) {
  Args a = checked(GLU_ARGUMENTS);
  if (up) check_overlap(gate, *up);
  a.gate = gate.data_ptr();
  a.up = up ? up->data_ptr() : nullptr;
  if (token_profile) {
    a.token_profile = token_profile->const_data_ptr<int32_t>();
    a.edit_ptr = edit_ptr->const_data_ptr<int32_t>();
    a.edit_index = edit_index->const_data_ptr<int32_t>();
    a.edit_value = reinterpret_cast<const Edit*>(edit_value->const_data_ptr<float>());
  }
  if (token_group) {
    a.token_group = token_group->const_data_ptr<int32_t>();
    a.count = count->data_ptr<int32_t>();
    a.sketch = sketch->data_ptr<int32_t>();
    a.moments = moments->data_ptr<double>();
    a.log = log ? log_of(*log) : nullptr;
  }
  return a;
}

void glu_on_cpu(GLU_PARAMETERS) {
  const Args a = with_pointers(GLU_ARGUMENTS);
  if (a.dtype == neurons::kFloat32) glu_cpu<Float>(a);
  else if (a.dtype == neurons::kBFloat16) glu_cpu<BFloat16>(a);
  else glu_cpu<Float16>(a);
}

// Counts what log holds, and empties it.
void drain(Tensor& count, Tensor& sketch, Tensor& log) {
  TORCH_CHECK(sketch.dim() == 3, "sketch: expected 3 dimensions [groups, d_ff, bins], got shape ", text(sketch.sizes()));
  const int64_t groups = sketch.size(0), width = sketch.size(1), tiles = (width + kTile - 1) / kTile;
  check_table(sketch, "sketch", log, at::kInt, {groups, width, kBins});
  check_table(count, "count", log, at::kInt, {groups, width});
  check_table(log, "log", sketch, at::kByte, {tiles, static_cast<int64_t>(sizeof(Log))});
  Log* logs = log_of(log);
  int32_t *counts = count.data_ptr<int32_t>(), *bins = sketch.data_ptr<int32_t>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      Log& one = logs[tile];
      const int next = one.next & (kLogRows - 1);
      for (int part = 0; part < kTile / kPart; ++part) {
        const int from = uncounted(part);
        count_part(one, part, tile, from, (next - from + kLogRows) % kLogRows, counts, bins, width, static_cast<int>(groups));
      }
      memset(&one, 0, sizeof(Log));
    }
  });
}

void glu_on_meta(GLU_PARAMETERS) {
  // With symbolic sizes there is nothing to compare yet: the real kernel checks them when it runs.
  if (!gate.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
      !(up && up->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) &&
      !(token_profile && token_profile->unsafeGetTensorImpl()->has_symbolic_sizes_strides()) &&
      !(token_group && token_group->unsafeGetTensorImpl()->has_symbolic_sizes_strides()))
    checked(GLU_ARGUMENTS);
}

#ifdef NEURONS_CUDA
void glu_on_cuda(GLU_PARAMETERS) {
  const Args a = with_pointers(GLU_ARGUMENTS);
  if (a.tokens == 0 || a.width == 0) return;
  const c10::DeviceGuard guard(gate.device());
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream(gate.device().index(), &stream) == 0, "no CUDA stream on ", text(gate.device()));
  const char* error = neurons_glu_cuda(&a, stream);
  TORCH_CHECK(!error, "neurons::glu_ on ", text(gate.device()), ": ", error);
}
#endif

// Forward works without no_grad; backward raises. torch's own fallback for ops without a derivative marks what they return,
// and this one returns nothing: a backward through it would pass gradients on as if gate had not changed.
void glu_below(GLU_PARAMETERS) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("neurons::glu_", "").typed<decltype(glu_below)>();
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(GLU_ARGUMENTS);
}

struct NoDerivative : torch::autograd::Function<NoDerivative> {
  static Tensor forward(torch::autograd::AutogradContext* context, Tensor gate, const OptTensor& up, const std::function<void(Tensor&)>& run) {
    context->mark_dirty({gate});
    run(gate);
    return gate;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, const torch::autograd::variable_list&) {
    TORCH_CHECK(false, "neurons::glu_: the derivative is not implemented");
  }
};

void glu_with_grad(GLU_PARAMETERS) {
  if (at::GradMode::is_enabled() && (gate.requires_grad() || (up && up->requires_grad())))
    NoDerivative::apply(gate, up, [&](Tensor& gate) { glu_below(GLU_ARGUMENTS); });
  else
    glu_below(GLU_ARGUMENTS);
}

}  // namespace

TORCH_LIBRARY(neurons, m) {
  m.def(
      "glu_(Tensor(a!) gate, Tensor? up, int act, Tensor? token_profile, Tensor? edit_ptr, Tensor? edit_index, "
      "Tensor? edit_value, Tensor? token_group, Tensor(b!)? count, Tensor(c!)? sketch, Tensor(d!)? moments, Tensor(e!)? log=None) -> ()",
      {at::Tag::pt2_compliant_tag});
  m.def("drain_(Tensor(a!) count, Tensor(b!) sketch, Tensor(c!) log) -> ()", {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(neurons, CPU, m) {
  m.impl("glu_", glu_on_cpu);
  m.impl("drain_", drain);
}
TORCH_LIBRARY_IMPL(neurons, Meta, m) {
  m.impl("glu_", glu_on_meta);
  m.impl("drain_", [](Tensor&, Tensor&, Tensor&) {});
}
TORCH_LIBRARY_IMPL(neurons, Autograd, m) { m.impl("glu_", glu_with_grad); }
#ifdef NEURONS_CUDA
TORCH_LIBRARY_IMPL(neurons, CUDA, m) { m.impl("glu_", glu_on_cuda); }
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Build facts of neurons::glu_, and the constants that Python shares with it.";
  m.attr("source") = TEXT(NEURONS_SOURCE);  // digest of csrc/: a build of other sources is refused
#ifdef NEURONS_CUDA
  m.attr("cuda") = TEXT(NEURONS_CUDA); // the architectures it was compiled for
#else
  m.attr("cuda") = "";
#endif
  m.attr("tile") = kTile;
  m.attr("log_bytes") = sizeof(Log);  // of one tile
  m.attr("bins") = kBins;
  m.attr("acts") = std::vector<std::string>{"silu", "gelu", "gelu_tanh", "relu"};
  std::vector<float> edges;
  for (int b = 0; b <= kBins; ++b) edges.push_back(neurons::bin_edge(b));
  m.attr("edges") = edges;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  m.attr("vector") = __builtin_cpu_supports("x86-64-v4") ? "x86-64-v4" : __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3" : "x86-64";
  m.attr("fast_bfloat16") = static_cast<bool>(__builtin_cpu_supports("avx512bf16"));
#else
  m.attr("vector") = "the compiler's default";
  m.attr("fast_bfloat16") = false;
#endif
}
