// Scalar formulas, sketch constants and the argument block of neurons::glu_, written once for the
// CPU kernels (neurons.cpp) and the CUDA kernels (neurons_cuda.cu). Includes no torch header.
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

constexpr int kTile = 256;   // columns of d_ff that one owner handles: 32 lanes of eight, or 1 KiB of float
constexpr int kBins = 304;   // bins of the sketch, logarithmic on [2^kLowExponent, 2^kHighExponent]
constexpr int kLowExponent = -11;
constexpr int kHighExponent = 6;

enum Act : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kActs = 4 };
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct alignas(16) Edit {
  float cap, scale, shift, bias;
};

// Everything that a kernel needs, as plain pointers. Strides and sizes are in elements.
struct Args {
  void* gate;        // [tokens, width], row stride gate_stride; overwritten with the result
  const void* up;    // the same shape, row stride up_stride; null for a non-gated MLP
  int64_t tokens, width, gate_stride, up_stride;
  int act, dtype;
  const int32_t* token_profile;  // [tokens]; null or 0: no edit
  const int32_t* edit_ptr;       // [profiles, tiles + 1], offsets into edit_index
  const int32_t* edit_index;     // [capacity], sorted within a profile
  const Edit* edit_value;        // [capacity]
  int profiles, capacity;
  const int32_t* token_group;    // [tokens]; null or -1: not observed
  int groups;
  int32_t* count;                // [groups, width]
  int32_t* sketch;               // [groups, width, kBins]
  double* moments;               // [groups, 2, width]: sum and sum of squares of the product
  void* log;                     // on the CPU, [tiles] of its Log, or null: what the sketch is to count later
};

NEURONS_FN int32_t bits_of(float x) {
  int32_t i;
  memcpy(&i, &x, 4);
  return i;
}

NEURONS_FN float float_of(int32_t i) {
  float x;
  memcpy(&x, &i, 4);
  return x;
}

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

// Low: the data are bfloat16 or float16. NaN stays NaN.
template <bool Low>
NEURONS_FN float silu_(float x) {
  return sigmoid_of<Low>(x, x);
}

// x/2 (1 + tanh u) is x sigmoid(2u): one exponential.
template <bool Low>
NEURONS_FN float gelu_tanh_(float x) {
  const float u = x * (1.59576912f + 0.07135481f * x * x);
  return sigmoid_of<Low>(u, x);
}

NEURONS_FN float relu_(float x) { return x < 0.f ? 0.f : x; }

template <bool Low>
NEURONS_FN float act_(int act, float x) {
  switch (act) {
    case kSilu: return silu_<Low>(x);
    case kGelu: return gelu_<Low>(x);
    case kGeluTanh: return gelu_tanh_<Low>(x);
    default: return relu_(x);
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
  int32_t low = (127 + kLowExponent) << 23, high = (127 + kHighExponent) << 23;
  if (b >= kBins) return float_of(high);
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (bin_(float_of(middle)) >= b) high = middle;
    else low = middle + 1;
  }
  return float_of(low);
}

}  // namespace neurons
