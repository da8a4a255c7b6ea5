// CUDA kernels of neurons::glu_ and their launcher. Includes no torch header: nvcc alone compiles it, and the CPU build
// of torch, which lacks the toolkit's headers, can still check it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "neurons.h"

namespace {

using namespace neurons;

template <class T> __device__ __forceinline__ float to_float(T x);
template <> __device__ __forceinline__ float to_float(float x) { return x; }
template <> __device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }

// V neighbouring elements, moved by one instruction: 16 bytes, or one element where rows are not aligned.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T x[V];
};

constexpr int kPerLane = 8;  // columns of a token that one lane handles

// A team of lanes shares a token's Team * 8 neighbouring columns. Lane l's element i is column column(l, i):
// neighbouring lanes touch neighbouring vectors.
template <int Team, int V>
__device__ __forceinline__ int column(int lane, int i) {
  return (i / V) * Team * V + lane * V + i % V;
}

template <class T, int Team, int V>
__device__ __forceinline__ void load(const T* row, int lane, int n, T (&raw)[kPerLane]) {
#pragma unroll
  for (int c = 0; c < kPerLane / V; ++c) {
    const int j = column<Team, V>(lane, c * V);
    Vector<T, V> v;
    if (j < n) v = *reinterpret_cast<const Vector<T, V>*>(row + j);
    else
#pragma unroll
      for (int i = 0; i < V; ++i) v.x[i] = from_float<T>(0.f);
#pragma unroll
    for (int i = 0; i < V; ++i) raw[c * V + i] = v.x[i];
  }
}

template <class T, int Team, int V>
__device__ __forceinline__ void store(T* row, int lane, int n, const float (&h)[kPerLane]) {
#pragma unroll
  for (int c = 0; c < kPerLane / V; ++c) {
    const int j = column<Team, V>(lane, c * V);
    Vector<T, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.x[i] = from_float<T>(h[c * V + i]);
    if (j < n) *reinterpret_cast<Vector<T, V>*>(row + j) = v;
  }
}

template <bool Low>
__device__ __forceinline__ void activate(int act, const float (&g)[kPerLane], float (&a)[kPerLane]) {
#define NEURONS_EACH(f)                                    \
  _Pragma("unroll") for (int i = 0; i < kPerLane; ++i) a[i] = f(g[i]); \
  break
  switch (act) {  // the same for every thread: outside the loop
    case kSilu: NEURONS_EACH(silu_<Low>);
    case kGelu: NEURONS_EACH(gelu_<Low>);
    case kGeluTanh: NEURONS_EACH(gelu_tanh_<Low>);
    default: NEURONS_EACH(relu_);
  }
#undef NEURONS_EACH
}

struct Span {
  int begin, end;
};

// The edits of token t in a tile; empty for profile 0 and for anything out of range.
__device__ __forceinline__ Span edits_of(const Args& a, int64_t t, int tile, int tiles) {
  const int p = a.token_profile ? __ldg(a.token_profile + t) : 0;
  if (p <= 0 || p >= a.profiles) return {0, 0};
  const int32_t* ptr = a.edit_ptr + static_cast<int64_t>(p) * (tiles + 1) + tile;
  return {max(__ldg(ptr), 0), min(__ldg(ptr + 1), a.capacity)};
}

// Overwrites the edited ones of a team's columns, which it has just stored. Activations and up pass through shared
// memory, since the lane that holds an edit rarely holds its column. row points at column `first` of the token.
template <class T, int Team, int V>
__device__ __forceinline__ void edit(const Args& args, Span edits, T* row, int first, int n, int lane, unsigned mask,
                                     const float (&a)[kPerLane], const float (&u)[kPerLane], float* sa, float* su) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    sa[column<Team, V>(lane, i)] = a[i];
    su[column<Team, V>(lane, i)] = u[i];
  }
  __syncwarp(mask);  // orders the team's stores to row before the edited ones, too
  for (int k = edits.begin + lane; k < edits.end; k += Team) {
    const int j = __ldg(args.edit_index + k) - first;
    if (j < 0 || j >= n) continue;
    const float4 v = __ldg(reinterpret_cast<const float4*>(args.edit_value + k));
    row[j] = from_float<T>(edit_({v.x, v.y, v.z, v.w}, sa[j], su[j]));
  }
  __syncwarp(mask);
}

// No statistics. A warp owns (token, tile): 256 columns. Bytes moved: tokens * width * (gate read, up read, gate
// written) * sizeof(T), and the edits.
constexpr int kThreads = 256;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) glu_kernel(const Args args, const int tiles) {
  extern __shared__ float shared[];  // 2 * kTile floats a warp, where there are edits
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + warp;
  const int64_t t = unit / tiles;
  if (t >= args.tokens) return;
  const int tile = static_cast<int>(unit - t * tiles), first = tile * kTile;
  const int n = static_cast<int>(min(static_cast<int64_t>(kTile), args.width - first));
  T* row = static_cast<T*>(args.gate) + t * args.gate_stride + first;
  T graw[kPerLane], uraw[kPerLane];
  load<T, 32, V>(row, lane, n, graw);
  if (args.up) load<T, 32, V>(static_cast<const T*>(args.up) + t * args.up_stride + first, lane, n, uraw);
  const Span edits = edits_of(args, t, tile, tiles);  // its loads overlap with those above

  float g[kPerLane], a[kPerLane], u[kPerLane], h[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) g[i] = to_float(graw[i]), u[i] = args.up ? to_float(uraw[i]) : 1.f;
  activate<sizeof(T) == 2>(args.act, g, a);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) h[i] = a[i] * u[i];
  store<T, 32, V>(row, lane, n, h);
  if (edits.begin < edits.end) {
    float* sa = shared + warp * 2 * kTile;
    edit<T, 32, V>(args, edits, row, first, n, lane, 0xffffffffu, a, u, sa, sa + kTile);
  }
}

// With statistics. A block owns 64 columns for one group's tokens (group 0's also takes the unobserved ones), so
// that sums have one fixed order and nothing needs a float atomic. Teams of 8 lanes take every 32nd token.
// With Shared, the block's sketch is kept in shared memory, two 16-bit bins a word, and added once at the end:
// that pays from some hundred tokens on. Else each positive activation is an integer atomic in global memory.
constexpr int kTeam = 8, kColumns = kTeam * kPerLane, kTeams = kThreads / kTeam, kWarps = kThreads / 32;
constexpr int kSketchBytes = kColumns * kBins * 2;
constexpr int kEditBytes = kTeams * 2 * kColumns * 4;
constexpr int kSumBytes = kWarps * kColumns * (2 * 8 + 4);

template <class T, int V, bool Shared>
__global__ void __launch_bounds__(kThreads, 2) glu_statistics_kernel(const Args args, const int tiles) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  float* parts = reinterpret_cast<float*>(dynamic);  // kEditBytes, where there are edits
  unsigned* bins = reinterpret_cast<unsigned*>(dynamic + (args.token_profile ? kEditBytes : 0));
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam, warp = threadIdx.x / 32;
  const unsigned mask = 0xffu << (threadIdx.x % 32 / kTeam * kTeam);
  const int first = blockIdx.x * kColumns, group = blockIdx.y;
  const int n = static_cast<int>(min(static_cast<int64_t>(kColumns), args.width - first));
  int32_t* sketch = args.sketch + (group * args.width + first) * kBins;
  if (Shared) {
    for (int w = threadIdx.x; w < kSketchBytes / 4; w += kThreads) bins[w] = 0;
    __syncthreads();
  }

  double sum[kPerLane] = {}, squares[kPerLane] = {};
  int count[kPerLane] = {};
  for (int64_t t = team; t < args.tokens; t += kTeams) {
    const int owner = __ldg(args.token_group + t);
    const bool observed = owner == group;
    if (!observed && (group != 0 || (owner > 0 && owner < args.groups))) continue;
    T* row = static_cast<T*>(args.gate) + t * args.gate_stride + first;
    T graw[kPerLane], uraw[kPerLane];
    load<T, kTeam, V>(row, lane, n, graw);
    if (args.up) load<T, kTeam, V>(static_cast<const T*>(args.up) + t * args.up_stride + first, lane, n, uraw);
    const Span edits = edits_of(args, t, first / kTile, tiles);
    float g[kPerLane], a[kPerLane], u[kPerLane], h[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) g[i] = to_float(graw[i]), u[i] = args.up ? to_float(uraw[i]) : 1.f;
    activate<sizeof(T) == 2>(args.act, g, a);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) h[i] = a[i] * u[i];
    store<T, kTeam, V>(row, lane, n, h);
    if (edits.begin < edits.end) {
      float* sa = parts + team * 2 * kColumns;
      edit<T, kTeam, V>(args, edits, row, first, n, lane, mask, a, u, sa, sa + kColumns);
    }
    if (!observed) continue;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const double d = h[i];
      sum[i] += d;
      squares[i] += d * d;
      if (g[i] > 0.f) {  // columns beyond the width were loaded as 0
        ++count[i];
        const int b = column<kTeam, V>(lane, i) * kBins + bin_(a[i]);
        if (Shared) atomicAdd(bins + b / 2, 1u << (b % 2 * 16));
        else atomicAdd(sketch + b, 1);
      }
    }
  }

  // The four teams of a warp, then the warps, in a fixed order.
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
#pragma unroll
    for (int d = kTeam; d < 32; d *= 2) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], d);
      squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], d);
      count[i] += __shfl_xor_sync(0xffffffffu, count[i], d);
    }
  }
  if (Shared) {
    __syncthreads();
    for (int w = threadIdx.x; w < n * kBins / 2; w += kThreads) {
      const unsigned two = bins[w];
      if (two & 0xffffu) sketch[2 * w] += two & 0xffffu;
      if (two >> 16) sketch[2 * w + 1] += two >> 16;
    }
  }
  __syncthreads();  // the sums take the place of the sketch or the edits
  double* sums = reinterpret_cast<double*>(dynamic);  // [2][kWarps][kColumns]
  int* counts = reinterpret_cast<int*>(sums + 2 * kWarps * kColumns);
  if (threadIdx.x % 32 < kTeam) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int at = warp * kColumns + column<kTeam, V>(lane, i);
      sums[at] = sum[i];
      sums[kWarps * kColumns + at] = squares[i];
      counts[at] = count[i];
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) {
    double s = 0, q = 0;
    int c = 0;
    for (int w = 0; w < kWarps; ++w) {
      s += sums[w * kColumns + threadIdx.x];
      q += sums[(kWarps + w) * kColumns + threadIdx.x];
      c += counts[w * kColumns + threadIdx.x];
    }
    const int64_t j = first + threadIdx.x;
    args.moments[2 * group * args.width + j] += s;
    args.moments[(2 * group + 1) * args.width + j] += q;
    args.count[group * args.width + j] += c;
  }
}

constexpr int64_t kSharedFrom = 256;     // tokens from which a sketch in shared memory pays
constexpr int64_t kTokensALaunch = 32768;  // 16-bit bins can't overflow

template <class Kernel>
cudaError_t allow(Kernel kernel, int bytes) {  // above 48 KiB a kernel must be told
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class T, int V>
cudaError_t launch(const Args& args, cudaStream_t stream) {
  const int tiles = static_cast<int>((args.width + kTile - 1) / kTile);
  if (!args.token_group) {
    const int64_t units = args.tokens * tiles, blocks = (units + kThreads / 32 - 1) / (kThreads / 32);
    const int bytes = args.token_profile ? kThreads / 32 * 2 * kTile * 4 : 0;
    glu_kernel<T, V><<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(args, tiles);
    return cudaGetLastError();
  }
  const dim3 grid(static_cast<unsigned>((args.width + kColumns - 1) / kColumns), static_cast<unsigned>(args.groups));
  const int edits = args.token_profile ? kEditBytes : 0;
  for (int64_t begin = 0; begin < args.tokens; begin += kTokensALaunch) {
    Args part = args;
    part.tokens = begin + kTokensALaunch < args.tokens ? kTokensALaunch : args.tokens - begin;
    part.gate = static_cast<T*>(args.gate) + begin * args.gate_stride;
    if (args.up) part.up = static_cast<const T*>(args.up) + begin * args.up_stride;
    if (args.token_profile) part.token_profile += begin;
    part.token_group += begin;
    if (part.tokens >= kSharedFrom) {
      const int bytes = edits + kSketchBytes > kSumBytes ? edits + kSketchBytes : kSumBytes;
      const cudaError_t error = allow(glu_statistics_kernel<T, V, true>, kEditBytes + kSketchBytes);
      if (error != cudaSuccess) return error;
      glu_statistics_kernel<T, V, true><<<grid, kThreads, bytes, stream>>>(part, tiles);
    } else {
      const int bytes = edits > kSumBytes ? edits : kSumBytes;
      glu_statistics_kernel<T, V, false><<<grid, kThreads, bytes, stream>>>(part, tiles);
    }
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

bool aligned(const void* x, int64_t stride, int size) {
  return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride * size % 16 == 0;
}

template <class T>
cudaError_t dispatch(const Args& args, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool wide = args.width % V == 0 && aligned(args.gate, args.gate_stride, sizeof(T)) &&
                    (!args.up || aligned(args.up, args.up_stride, sizeof(T)));
  return wide ? launch<T, V>(args, stream) : launch<T, 1>(args, stream);
}

}  // namespace

extern "C" const char* neurons_glu_cuda(const neurons::Args* args, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  cudaError_t error;
  if (args->dtype == kFloat32) error = dispatch<float>(*args, s);
  else if (args->dtype == kBFloat16) error = dispatch<__nv_bfloat16>(*args, s);
  else error = dispatch<__half>(*args, s);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
