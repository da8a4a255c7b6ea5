// CUDA kernels of neurons::glu_ and their launcher. Includes no torch header: nvcc alone compiles it, and the CPU build
// of torch, which lacks the toolkit's headers, can still check it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "neurons.h"

namespace {

using namespace neurons;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half_rn(x); }

// V neighbouring elements as one machine word, moved by one instruction: 16 bytes, or one element where rows are not
// aligned. They stay a word until they are used: taking a word apart waits for the load that brings it.
template <int Bytes> struct WordOf;
template <> struct WordOf<16> { using Type = uint4; };
template <> struct WordOf<4> { using Type = unsigned; };
template <> struct WordOf<2> { using Type = unsigned short; };

// A team of lanes shares a token's Team * N neighbouring columns: a lane has N / V words of V columns, Team * V columns apart,
// the first at lane * V. gate, up and here point to that one; left: how many columns there are from it on.
template <int Team, class T, int V, int N>
struct Words {
  using Word = typename WordOf<sizeof(T) * V>::Type;
  Word gates[N / V], ups[N / V];

  __device__ __forceinline__ void load(const T* gate, const T* up, int left) {
#pragma unroll
    for (int c = 0; c < N / V; ++c) {
      const bool inside = c * Team * V < left;
      gates[c] = inside ? *reinterpret_cast<const Word*>(gate + c * Team * V) : Word{};
      ups[c] = inside && up ? *reinterpret_cast<const Word*>(up + c * Team * V) : Word{};
    }
  }
  __device__ __forceinline__ void get(bool gated, float (&g)[N], float (&u)[N]) const {
    T gate[N], up[N];
    memcpy(gate, gates, sizeof(gate));
    memcpy(up, ups, sizeof(up));
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = to_float(gate[i]), u[i] = gated ? to_float(up[i]) : 1.f;
  }
  __device__ __forceinline__ static void store(T* here, int left, const float (&h)[N]) {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) from_float(h[i], elements[i]);
#pragma unroll
    for (int c = 0; c < N / V; ++c) {
      Word word;
      memcpy(&word, elements + c * V, sizeof(word));
      if (c * Team * V < left) *reinterpret_cast<Word*>(here + c * Team * V) = word;
    }
  }
};

template <bool Low, int N>
__device__ __forceinline__ void activate(int act, const float (&g)[N], float (&a)[N]) {
#define NEURONS_EACH(A) _Pragma("unroll") for (int i = 0; i < N; ++i) a[i] = act_<Low>(A, g[i]); break
  switch (act) {  // the same for every thread: outside the loop
    case kSilu: NEURONS_EACH(kSilu);
    case kGelu: NEURONS_EACH(kGelu);
    case kGeluTanh: NEURONS_EACH(kGeluTanh);
    default: NEURONS_EACH(kRelu);
  }
}

// The edits of a lane's columns, which begin with `column`, among those that a profile makes in a tile. They are neighbours where
// a lane has one word; else all of the tile's are taken, and edit() picks.
template <int V, int N>
__device__ __forceinline__ Span lane_edits(const Args& args, int profile, int tile, int column) {
  const Span all = edits_of(args, profile, tile, 1, args.tiles());
  if (N != V) return all;
  const int any = all.begin + threadIdx.x % 32;  // whoever's it is: so that edit() finds the tile's edits in the cache
  if (any < all.end) asm volatile("{ .reg .f32 x; ld.global.nc.f32 x, [%0]; }" ::"l"(args.edit_value + any));
  int begin = all.begin, end = all.end;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (__ldg(args.edit_index + middle) < column) begin = middle + 1;
    else end = middle;
  }
  while (end < all.end && __ldg(args.edit_index + end) < column + N) ++end;
  return {begin, end};
}

// Puts the edited ones into h, a lane's products. Registers have no index: the edited one is picked by comparisons.
template <int Team, int V, int N>
__device__ __forceinline__ void edit(const Args& args, Span edits, int column, const float (&a)[N], const float (&u)[N],
                                     float (&h)[N]) {
#pragma unroll 1
  for (int k = edits.begin; k < edits.end; ++k) {
    const int j = __ldg(args.edit_index + k) - column, mine = j / (Team * V) * V + j % V;
    if (j < 0 || j >= Team * N || j / V % Team) continue;
    const float4 v = __ldg(reinterpret_cast<const float4*>(args.edit_value + k));
    float x = 0.f, y = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) x = i == mine ? a[i] : x, y = i == mine ? u[i] : y;
    x = edit_({v.x, v.y, v.z, v.w}, x, y);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] = i == mine ? x : h[i];
  }
}

// No statistics. A warp has 32 words of each of `several` tokens, and loads the next token's while it works on one: that hides
// the chain of loads behind an edit. Bytes moved: tokens * width * (gate read, up read, gate written) * sizeof(T), and the edits.
constexpr int kPlainThreads = 128;

template <class T, int V, bool Edited>
__global__ void __launch_bounds__(kPlainThreads, V == 1 ? 6 : Edited ? 8 : 10)
glu_kernel(const Args args, const int several) {
  constexpr int N = V == 1 ? 8 : V;
  const int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 32 * N, column = first + threadIdx.x % 32 * V;
  const int left = static_cast<int>(min(static_cast<int64_t>(first + 32 * N), args.width)) - column;
  if (left <= 0) return;
  int t = blockIdx.y * several;
  const int end = min(t + several, static_cast<int>(args.tokens));
  T* row = static_cast<T*>(args.gate) + t * args.gate_stride + column;
  const T* up = args.up ? static_cast<const T*>(args.up) + t * args.up_stride + column : nullptr;
  Words<32, T, V, N> words;
  words.load(row, up, left);
  int next = Edited ? __ldg(args.token_profile + t) : 0, profile = 0;
  Span edits = {0, 0};
  while (true) {
    if (Edited && next != profile) {
      profile = next;
      edits = lane_edits<V, N>(args, profile, first / kTile, column);
    }
    float g[N], a[N], u[N], h[N];
    words.get(up, g, u);
    T* const here = row;
    if (++t < end) {
      row += args.gate_stride;
      words.load(row, up ? up += args.up_stride : up, left);
      if (Edited) next = __ldg(args.token_profile + t);
    }
    activate<sizeof(T) == 2>(args.act, g, a);
#pragma unroll
    for (int i = 0; i < N; ++i) h[i] = a[i] * u[i];
    if (Edited) edit<32, V>(args, edits, column, a, u, h);
    words.store(here, left, h);
    if (t >= end) break;
  }
}

constexpr int kStage = 2048;   // tokens whose groups and profiles are read together
constexpr int kNowhere = 32;   // counters, one a lane, for activations that are not positive: cheaper than a branch
template <int Team> constexpr int kThreadsOf = Team == 2 ? 512 : 256;  // where there are few blocks, they are larger

// The end of a block's work: its sums go to the moments of its n columns, the teams' of a warp together, then the warps', in a
// fixed order; its counters, or with Shared its sketch, to theirs. Nobody else adds there: atomics spare the wait for loads.
template <int V, int Team, bool Shared, int Threads, int N>
__device__ __forceinline__ void add_to_statistics(const Args& args, int first, int n, double (&sum)[N], double (&squares)[N],
                                                  int (&count)[N], unsigned char* dynamic) {
  constexpr int kColumns = Team * N, kWarps = Threads / 32, kEach = (kBins + 31) / 32, kSums = Shared ? 2 : 3;
  const int group = blockIdx.y, warp = threadIdx.x / 32;
  int32_t* const counts = args.count + group * args.width + first;
  int32_t* const sketch = args.sketch + (group * args.width + first) * kBins;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int d = Team; d < 32; d *= 2) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], d);
      squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], d);
      if (!Shared) count[i] += __shfl_xor_sync(0xffffffffu, count[i], d);
    }
  }
  __syncthreads();
  for (int j = warp; Shared && j < n; j += kWarps) {
    int more[kEach], counted = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int b = k * 32 + threadIdx.x % 32;
      more[k] = b < kBins ? reinterpret_cast<int*>(dynamic)[j * kBins + b] : 0;
      counted += more[k];
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      if (more[k]) atomicAdd(sketch + j * kBins + k * 32 + threadIdx.x % 32, more[k]);
    counted = __reduce_add_sync(0xffffffffu, counted);
    if (threadIdx.x % 32 == 0) atomicAdd(counts + j, counted);
  }
  if (Shared) __syncthreads();  // the sums take the place of the sketch
  double* const sums = reinterpret_cast<double*>(dynamic);  // [kSums][kWarps][kColumns]
  if (threadIdx.x % 32 < Team) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int at = warp * kColumns + i / V * Team * V + threadIdx.x % 32 * V + i % V;
      sums[at] = sum[i];
      sums[kWarps * kColumns + at] = squares[i];
      if (!Shared) sums[2 * kWarps * kColumns + at] = count[i];
    }
  }
  __syncthreads();
  for (int k = threadIdx.x; k < kSums * kColumns; k += Threads) {
    const int which = k / kColumns, j = k % kColumns;
    if (j >= n) continue;
    double all = 0;
    for (int w = 0; w < kWarps; ++w) all += sums[(which * kWarps + w) * kColumns + j];
    if (which < 2) args.moments[(2 * group + which) * args.width + first + j] += all;
    else counts[j] += static_cast<int>(all);
  }
}

// With statistics. A block owns Team words of columns for one group's tokens (group 0's also takes the unobserved ones), so that
// sums have one fixed order and nothing needs a float atomic. Its teams take a token each, and have the next ones' loads under
// way. With Shared, which pays from some hundred tokens on, the block's sketch is in shared memory and added once at the end,
// and so is whose the tokens are; else each positive activation is an integer atomic in global memory. Bytes moved: as above,
// and the touched parts of the sketch.
template <class T, int V, int Team, bool Shared, bool Edited>
__global__ void __launch_bounds__(kThreadsOf<Team>, V == 1 ? 1 : 512 / kThreadsOf<Team>)
glu_statistics_kernel(const Args args) {
  constexpr int N = 16 / sizeof(T), kColumns = Team * N, kThreads = kThreadsOf<Team>, kTeams = kThreads / Team;
  constexpr int kDepth = !Shared ? 1 : Edited || V == 1 ? 2 : 3;  // tokens whose loads are under way: as registers allow
  extern __shared__ __align__(16) unsigned char dynamic[];
  int* const bins = reinterpret_cast<int*>(dynamic);  // [kColumns][kBins], kNowhere
  const int lane = threadIdx.x % Team, team = threadIdx.x / Team, group = blockIdx.y;
  const int first = blockIdx.x * kColumns, column = first + lane * V;
  const int n = static_cast<int>(min(static_cast<int64_t>(kColumns), args.width - first)), left = n - lane * V;
  int32_t* const sketch = args.sketch + (group * args.width + first) * kBins;
  const bool gated = args.up;
  const auto mine = [&](int owner) { return owner == group || (group == 0 && (owner < 0 || owner >= args.groups)); };
  const auto whose = [&](int64_t t) { return int2{__ldg(args.token_group + t), Edited ? __ldg(args.token_profile + t) : 0}; };
  const int64_t row_step = kTeams * args.gate_stride, up_step = gated ? kTeams * args.up_stride : 0;
  Words<Team, T, V, N> words[kDepth];
  Span edits = {0, 0};
  int profile = 0, count[N] = {};
  double sum[N] = {}, squares[N] = {};
  constexpr int kZeros = Shared ? (kColumns * kBins + kNowhere) / 4 : 0;
  for (int w = threadIdx.x; w < kZeros; w += kThreads) reinterpret_cast<uint4*>(dynamic)[w] = {};
  int2* const maps = reinterpret_cast<int2*>(bins + kColumns * kBins + kNowhere);
  const unsigned lane_bins = Shared ? static_cast<unsigned>(__cvta_generic_to_shared(bins + lane * V * kBins)) : 0;
  const unsigned nowhere = Shared ? static_cast<unsigned>(__cvta_generic_to_shared(bins + kColumns * kBins + threadIdx.x % 32)) : 0;
  for (int64_t from = 0; from < args.tokens; from += kStage) {
    const int tokens = static_cast<int>(min(args.tokens - from, static_cast<int64_t>(kStage)));
    if (Shared) {
      __syncthreads();
      for (int t = threadIdx.x; t < tokens; t += kThreads) maps[t] = whose(from + t);
      __syncthreads();
    }
    T* row = static_cast<T*>(args.gate) + (from + team) * args.gate_stride + column;
    const T* up = static_cast<const T*>(args.up) + (gated ? (from + team) * args.up_stride + column : 0);
    const auto who = [&](int t) { return Shared ? maps[t] : whose(from + t); };
    const auto fetch = [&](int t, int d, const T* row_then, const T* up_then) {
      if (t < tokens && mine(who(t).x)) words[d].load(row_then, gated ? up_then : nullptr, left);
    };
#pragma unroll
    for (int d = 0; d < kDepth; ++d) fetch(team + d * kTeams, d, row + d * row_step, up + d * up_step);
    for (int begin = team; begin < tokens; begin += kDepth * kTeams) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d, row += row_step, up += up_step) {
        const int t = begin + d * kTeams;
        if (t >= tokens) break;
        const int2 now = who(t);
        if (Edited && now.y != profile) {
          profile = now.y;
          edits = lane_edits<V, N>(args, profile, first / kTile, column);
        }
        float g[N], a[N], u[N], h[N], stored[N];
        words[d].get(gated, g, u);
        fetch(t + kDepth * kTeams, d, row + kDepth * row_step, up + kDepth * up_step);
        if (!mine(now.x)) continue;
        activate<sizeof(T) == 2>(args.act, g, a);
#pragma unroll
        for (int i = 0; i < N; ++i) stored[i] = h[i] = a[i] * u[i];
        if (Edited) edit<Team, V>(args, edits, column, a, u, stored);
        words[d].store(row, left, stored);
        if (now.x != group) continue;
#pragma unroll
        for (int i = 0; i < N; ++i) {  // columns beyond the width were loaded as 0
          const double x = h[i];
          sum[i] += x;
          squares[i] += x * x;
          const int b = (i / V * Team * V + i % V) * kBins + bin_(a[i]);
          if (Shared) {
            asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(g[i] > 0.f ? lane_bins + 4 * b : nowhere));
          } else {
            if (g[i] > 0.f) atomicAdd(sketch + lane * V * kBins + b, 1);
            count[i] += g[i] > 0.f;
          }
        }
      }
    }
  }

  add_to_statistics<V, Team, Shared, kThreads>(args, first, n, sum, squares, count, dynamic);
}

template <class T, int V, bool Edited>
cudaError_t launch(const Args& args, cudaStream_t stream) {
  constexpr int64_t N = V == 1 ? 8 : V, kWarps = kPlainThreads / 32;
  const int64_t parts = ceil_div(args.width, 32 * N), warps = parts < kWarps ? parts : kWarps, across = ceil_div(parts, warps);
  constexpr int64_t kMost = 65535;  // of a grid's second dimension
  int64_t several = Edited && args.tokens * across >= 1024 ? 2 : 1;  // once that leaves enough blocks to fill the card
  if (several * kMost < args.tokens) several = ceil_div(args.tokens, kMost);
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(ceil_div(args.tokens, several)));
  glu_kernel<T, V, Edited><<<grid, static_cast<unsigned>(warps) * 32, 0, stream>>>(args, static_cast<int>(several));
  return cudaGetLastError();
}

template <class T, int V, int Team, bool Shared>
cudaError_t launch_statistics(const Args& args, cudaStream_t stream) {  // of one group at least: no empty grid is launched
  constexpr int kColumns = Team * 16 / sizeof(T), kSums = 3 * kThreadsOf<Team> / 32 * kColumns * 8;
  constexpr int kSketch = (kColumns * kBins + kNowhere) * 4 + kStage * 8, bytes = Shared && kSketch > kSums ? kSketch : kSums;
  const auto kernel = args.token_profile ? glu_statistics_kernel<T, V, Team, Shared, true>
                                         : glu_statistics_kernel<T, V, Team, Shared, false>;
  if (bytes > 48 * 1024) {  // a kernel must be told
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(args.width, kColumns)), static_cast<unsigned>(args.groups));
  kernel<<<grid, kThreadsOf<Team>, bytes, stream>>>(args);
  return cudaGetLastError();
}

template <class T, int V>
cudaError_t launch_any_statistics(const Args& args, cudaStream_t stream) {
  if (args.tokens < 192) return launch_statistics<T, V, 8, false>(args, stream);  // from there on a sketch in shared memory pays
  const int64_t words = args.width * args.groups * sizeof(T) / 16, enough = 192;  // blocks, to keep the card busy
  if constexpr (V > 1) {
    if (words < enough * 4) return launch_statistics<T, V, 2, true>(args, stream);
    if (words < enough * 8) return launch_statistics<T, V, 4, true>(args, stream);
  }
  return launch_statistics<T, V, 8, true>(args, stream);
}

template <class T>
cudaError_t dispatch(const Args& args, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto aligned = [](const void* x, int64_t stride) {
    return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride * static_cast<int>(sizeof(T)) % 16 == 0;
  };
  const bool wide = args.width % V == 0 && aligned(args.gate, args.gate_stride) && aligned(args.up, args.up_stride);
  if (args.groups) return wide ? launch_any_statistics<T, V>(args, stream) : launch_any_statistics<T, 1>(args, stream);
  if (args.token_profile) return wide ? launch<T, V, true>(args, stream) : launch<T, 1, true>(args, stream);
  return wide ? launch<T, V, false>(args, stream) : launch<T, 1, false>(args, stream);
}

}  // namespace

const char* neurons::glu_cuda(const Args& args, void* stream) {
  const auto f = args.dtype == kFloat32 ? dispatch<float> : args.dtype == kBFloat16 ? dispatch<__nv_bfloat16> : dispatch<__half>;
  const cudaError_t error = f(args, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
