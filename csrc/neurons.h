// neurons::glu_, a PyTorch operator for CPU and CUDA: the activation and product of a gated MLP, written over its gate, with
// edits of some neurons and statistics of all in the same pass. It returns nothing and has no autograd: backward raises.
//
//   glu_(gate, up, act, token_profile, edit_ptr, edit_index, edit_value, token_group, count, sketch, moments, pending=None)
//
// For each token (row) t and neuron (column) j, with p = token_profile[t] and g = token_group[t], in float32:
//
//   a = act(gate[t, j]);  u = up[t, j], or 1 without up
//   gate[t, j] <- (scale[p, j] * min(a, cap[p, j]) + shift[p, j]) * u + bias[p, j]  where profile p edits j; elsewhere a * u
//   moments[g, 0, j] += a * u;  moments[g, 1, j] += (a * u)^2                       if g is a group: unedited, not yet rounded
//   count[g, j] += 1;  sketch[g, j, bin_(a)] += 1                                   if g is a group and gate[t, j] was > 0
//
//   gate           float32, bfloat16 or float16 [tokens, d_ff]; overwritten
//   up             the same, but only read; or None
//   act            0: silu, 1: gelu, 2: gelu with tanh, 3: relu
//   token_profile  int32 [tokens]; profile 0 has no edits: its rows are bit for bit those of a call without edits
//   edit_ptr       int32 [profiles, tiles + 1], tiles = ceil(d_ff / 256): profile p's edits of columns 256 i to 256 i + 255 are
//                  entries edit_ptr[p, i] to edit_ptr[p, i + 1] - 1 of edit_index and edit_value; ascending, from 0 to capacity
//   edit_index     int32 [capacity]: column j, ascending within a profile, none twice
//   edit_value     float32 [capacity, 4], 16-byte aligned: cap, scale, shift, bias
//   token_group    int32 [tokens]
//   count, sketch  int32 [groups, d_ff] and [groups, d_ff, 304]; added to. A counter holds less than 2^31
//   moments        float64 [groups, 2, d_ff]; added to, in float64
//   pending        uint8 [rings, tiles, pending_bytes], 64-byte aligned, zeros at first; on a CPU only
//
// The four tensors of edits are given together or are None, the four of statistics too; pending needs the latter. All lie on one
// device. A profile or column out of range edits nothing; a group out of range, such as -1, is not observed. gate and up have
// last stride 1 and a row stride each, at least d_ff (one tensor's halves will do); they may not overlap. The rest is contiguous.
//
// count and sketch are exact: those of parts of the tokens add up to those of all. Moments do within 1e-12, relatively: their
// last bits may depend on how tokens are split into calls, and on the GPU, but, like all else, not on the number of threads.
//
// pending keeps bins that count and sketch have yet to count, those of fewer than 512 tokens a ring and neuron: counting them
// together is faster, the fewer groups they are of. Group g has ring g % rings. flush_(count, sketch, pending) counts them and
// leaves zeros; only then are count and sketch complete. Each count and sketch have a pending of their own.
//
// Below: what the kernels (neurons_cpu.cpp, neurons_cuda.cu) and the checks (neurons.cpp) share. Includes no torch header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define NEURONS_FN __host__ __device__ __forceinline__
#else
#define NEURONS_FN inline __attribute__((always_inline))
#endif

namespace neurons {

constexpr int kTile = 256;  // columns of d_ff that one owner handles: 32 lanes of eight, or 1 KiB of float
constexpr int kBins = 304, kLowExponent = -11, kHighExponent = 6;  // the sketch's bins, logarithmic on [2^-11, 2^6]
constexpr int kPendingRows = 512;  // of a ring

enum Act : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kActs = 4 };
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct alignas(16) Edit { float cap, scale, shift, bias; };

// What is pending in a tile of some groups: a ring of rows, one for each observed token. Zeros are empty.
struct alignas(64) Pending {
  uint16_t bin_plus_1[kPendingRows][kTile];  // 0 where the gate was not positive
  int32_t group_plus_1[kPendingRows];
  int32_t next_row;  // the row to write
};

NEURONS_FN int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Everything that a kernel needs, as plain pointers: the contract's arguments. Strides and sizes are in elements.
struct Args {
  void* gate;
  const void* up;
  int64_t tokens, width, gate_stride, up_stride;
  int act, dtype;
  const int32_t *token_profile, *edit_ptr, *edit_index;
  const Edit* edit_value;
  int profiles, capacity, groups, rings;
  const int32_t* token_group;
  int32_t *count, *sketch;
  double* moments;
  Pending* pending;

  NEURONS_FN int tiles() const { return static_cast<int>(ceil_div(width, kTile)); }
};

void glu_cpu(const Args& args);
void flush_cpu(const Args& args);  // wants width, groups, rings, count, sketch and pending
const char* cpu_vector();          // the instruction set that the CPU kernels use here
bool cpu_fast_bfloat16();          // whether this CPU multiplies matrices of bfloat16 by instructions made for that
const char* glu_cuda(const Args& args, void* stream);  // returns null, or what went wrong

NEURONS_FN int32_t read_(const int32_t* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return *p;
#endif
}

struct Span { int begin, end; };  // of edit_index and edit_value

// The edits of profile p in `several` tiles from `tile` on; none for profile 0 and for whatever is out of range.
NEURONS_FN Span edits_of(const Args& a, int p, int tile, int several, int tiles) {
  if (p <= 0 || p >= a.profiles) return {0, 0};
  const int32_t* ptr = a.edit_ptr + static_cast<int64_t>(p) * (tiles + 1) + tile;
  const int begin = read_(ptr), end = read_(ptr + several);
  return {begin > 0 ? begin : 0, end < a.capacity ? end : a.capacity};
}

template <class To, class From>
NEURONS_FN To same_bits(From x) {
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
NEURONS_FN int32_t bits_of(float x) { return same_bits<int32_t>(x); }
NEURONS_FN float float_of(int32_t i) { return same_bits<float>(i); }

// exp(x), on the host: a polynomial that the compiler vectorises. Relative error at most 2e-7, or, where Low says that the
// result is rounded to bfloat16 or float16 anyway, 8e-5 (their half ulp: 2e-3, 5e-4).
template <bool Low>
inline __attribute__((always_inline)) float exp_(float x) {
  // Clamped as an integer: from two comparisons with constants GCC 12 makes a loop of several paths, three times as slow.
  const int32_t i = bits_of(x), magnitude = i & 0x7fffffff, most = 0x42ae0000;  // 87
  x = float_of((magnitude < most ? magnitude : most) | (i & (1 << 31)));
  const float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float t = x * 1.44269504f;
  const float n = (t + round) - round;
  float p;
  if (Low) {
    const float f = t - n;
    p = 0.99992806f + f * (0.69326097f + f * (0.24261123f + f * 0.05517166f));
  } else {
    const float f = x - n * 0.693359375f + n * 2.12194440e-4f;  // n ln 2 in two parts, so that nothing of x is lost
    p = 0.16667637f + f * (0.041897975f + f * 0.0082903067f);
    p = 1.f + f * (0.9999997f + f * (0.49999151f + f * p));
  }
  return float_of(bits_of(p) + (static_cast<int32_t>(n) << 23));
}

// x / (1 + exp(-u)). On the device, for 16-bit data, in five instructions: the approximate exponential and reciprocal
// (2 ulp each) flush to 0 and infinity without the scaling that their safe forms add.
template <bool Low>
NEURONS_FN float sigmoid_of(float u, float x) {
#ifdef __CUDA_ARCH__
  if (Low) {
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(u * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.f + e));
    return x * r;
  }
  return __fdividef(x, 1.f + expf(-u));  // within 2 ulp; 0 for a quotient below 1e-36
#else
  // exp_ stops at exp(87), so x stops there too, lest a huge -x comes through
  return (x < -88.f ? -88.f : x) / (1.f + exp_<Low>(-u));
#endif
}

// The share of the normal distribution below x, times x.
template <bool Low>
NEURONS_FN float gelu_(float x) {
#ifdef __CUDA_ARCH__
  return 0.5f * x * (1.f + erff(x * 0.70710678f));
#else
  // tail(z) = exp(-z^2 / 2) * R(z) is the share above z >= 0. R is a polynomial in 1 / (1 + 0.3 z), fitted to
  // 0.5 erfcx(z / sqrt 2) on [0, 14] with relative error 6e-8, so that small results keep their digits.
  const float z = std::fabs(x);
  const float t = 1.f / (1.f + 0.3f * z);
  float r = 0.22867221f + t * (-0.16917229f + t * 0.03837962f);
  r = 0.09468021f + t * (0.14254395f + t * (-0.07651955f + t * r));
  r = 7.1740008e-6f + t * (0.11948759f + t * (0.12192112f + t * r));
  const float tail = exp_<Low>(-0.5f * z * z) * r;
  return x > 0.f ? x - x * tail : (x < -14.f ? -14.f : x) * tail;  // exp_ stops where it is 0 for any use
#endif
}

// act(x). Low: the data are bfloat16 or float16. NaN stays NaN.
template <bool Low>
NEURONS_FN float act_(int act, float x) {
  switch (act) {
    case kSilu: return sigmoid_of<Low>(x, x);
    case kGelu: return gelu_<Low>(x);
    case kGeluTanh: return sigmoid_of<Low>(x * (1.59576912f + 0.07135481f * x * x), x);  // x/2 (1 + tanh u) is x sigmoid(2u)
    default: return x < 0.f ? 0.f : x;
  }
}

// Capped before shifted, as in NPTI: the order changes the answer. NaN passes through the cap.
NEURONS_FN float edit_(const Edit& e, float a, float u) {
  const float capped = e.cap < a ? e.cap : a;
  return (e.scale * capped + e.shift) * u + e.bias;
}

// The sketch bin of an activation a > 0, clamped to the first and last bin. log2(a) in fixed point, its fractional
// part m + m (1 - m) (0.41 - m / 8): integers only, so that every machine and device puts a value into the same bin. Bins
// are 3.8 to 4.0 % wide, so that one value (2 low high / (low + high)) is within 2 % of all that a bin holds.
NEURONS_FN int bin_(float a) {
  const int32_t low = (127 + kLowExponent) << 23, high = ((127 + kHighExponent) << 23) - 1;
  int32_t i = bits_of(a);
  i = i < low ? low : i;
  i = (i > high ? high : i) - low;
  const int32_t octaves = i >> 8, m = octaves & 0x7fff;  // 15 fractional bits
  const int32_t log2 = octaves + ((((m * (32768 - m)) >> 15) * (108500 - m)) >> 18);
  return (log2 * 143) >> 18;  // 143 / 2^3 = 17.875 bins an octave
}

// The smallest float in bin b or above; bin_edge(kBins) is the upper end of the range.
inline float bin_edge(int b) {
  int32_t i = (127 + kLowExponent) << 23;
  const int32_t high = (127 + kHighExponent) << 23;
  for (int32_t step = 1 << 27; step > 0; step /= 2) {
    if (i + step <= high && bin_(float_of(i + step - 1)) < b) i += step;
  }
  return float_of(i);
}

}  // namespace neurons
