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
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }

// V neighbouring elements as one machine word, moved by one instruction: 16 or 8 bytes, or one element where rows are not
// aligned. They stay a word until they are used: taking a word apart waits for the load that brings it.
template <int Bytes> struct WordOf;
template <> struct WordOf<16> { using Type = uint4; };
template <> struct WordOf<8> { using Type = uint2; };
template <> struct WordOf<4> { using Type = unsigned; };
template <> struct WordOf<2> { using Type = unsigned short; };

template <class T, int V, int N>
struct Raw {
  using Word = typename WordOf<sizeof(T) * V>::Type;
  Word words[N / V];

  __device__ __forceinline__ void get(float (&x)[N]) const {
#pragma unroll
    for (int c = 0; c < N / V; ++c) {
      T parts[V];
      memcpy(parts, &words[c], sizeof(Word));
#pragma unroll
      for (int i = 0; i < V; ++i) x[c * V + i] = to_float(parts[i]);
    }
  }
};

// A team of lanes shares a token's Team * N neighbouring columns. Lane l's element i is column column(l, i):
// neighbouring lanes touch neighbouring vectors.
template <int Team, int V>
__device__ __forceinline__ int column(int lane, int i) {
  return (i / V) * Team * V + lane * V + i % V;
}

template <int Team, int V, class T, int N>
__device__ __forceinline__ void load(const T* row, int lane, int n, Raw<T, V, N>& raw) {
#pragma unroll
  for (int c = 0; c < N / V; ++c) {
    const int j = column<Team, V>(lane, c * V);
    raw.words[c] = {};
    if (j < n) raw.words[c] = *reinterpret_cast<const typename Raw<T, V, N>::Word*>(row + j);
  }
}

template <int Team, int V, class T, int N>
__device__ __forceinline__ void store(T* row, int lane, int n, const float (&h)[N]) {
#pragma unroll
  for (int c = 0; c < N / V; ++c) {
    const int j = column<Team, V>(lane, c * V);
    T parts[V];
#pragma unroll
    for (int i = 0; i < V; ++i) parts[i] = from_float<T>(h[c * V + i]);
    typename Raw<T, V, N>::Word word;
    memcpy(&word, parts, sizeof(word));
    if (j < n) *reinterpret_cast<decltype(word)*>(row + j) = word;
  }
}

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

// A lane of a team applies every Team-th edit of a token. The first: column j of the team's (-1: none), and what is to stand
// there. It is computed from gate and up as they lie in memory, before the team stores over them, so that its chain of loads
// overlaps with the team's own.
struct LaneEdit { int j; float value; };

template <class T>
__device__ __forceinline__ LaneEdit lane_edit(const Args& args, Span e, int lane, const T* gate, const T* up, int first, int n) {
  const int k = e.begin + lane;
  if (k >= e.end) return {-1, 0.f};
  const int j = __ldg(args.edit_index + k) - first;
  if (j < 0 || j >= n) return {-1, 0.f};
  const float4 v = __ldg(reinterpret_cast<const float4*>(args.edit_value + k));
  const float a = act_<sizeof(T) == 2>(args.act, to_float(gate[j]));
  return {j, edit_({v.x, v.y, v.z, v.w}, a, up ? to_float(up[j]) : 1.f)};
}

// The further edits of a team that has more than lanes: their activations and up pass through shared memory.
template <int Team, int V, int N>
__device__ __forceinline__ void share(int lane, const float (&a)[N], const float (&u)[N], float* sa, float* su) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sa[column<Team, V>(lane, i)] = a[i];
    su[column<Team, V>(lane, i)] = u[i];
  }
}

// Overwrites the edited ones of a team's columns, which it has just stored. row is column `first` of the token.
template <int Team, class T>
__device__ __forceinline__ void edit(const Args& args, Span e, LaneEdit own, T* row, int first, int n, int lane, unsigned mask,
                                     const float* sa, const float* su) {
  __syncwarp(mask);  // orders the team's stores to row before the edited ones, too
  if (own.j >= 0) row[own.j] = from_float<T>(own.value);
  for (int k = e.begin + Team + lane; k < e.end; k += Team) {
    const int j = __ldg(args.edit_index + k) - first;
    const float4 v = __ldg(reinterpret_cast<const float4*>(args.edit_value + k));
    if (j >= 0 && j < n) row[j] = from_float<T>(edit_({v.x, v.y, v.z, v.w}, sa[j], su[j]));
  }
  __syncwarp(mask);
}

// No statistics. A warp owns 256 columns of a token. Bytes moved: tokens * width * (gate read, up read, gate written) *
// sizeof(T), and the edits.
constexpr int kThreads = 256, kWarps = kThreads / 32;

template <class T, int V, bool Edited>
__global__ void __launch_bounds__(kThreads, V == 1 ? 4 : Edited && sizeof(T) == 4 ? 5 : 6)
glu_kernel(const Args args, const int tiles, const int begin) {
  constexpr int N = kTile / 32;
  __shared__ float shared[Edited ? kWarps * 2 * kTile : 1];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tile = blockIdx.x * (blockDim.x / 32) + warp, first = tile * kTile;
  if (tile >= tiles) return;
  const int n = static_cast<int>(min(static_cast<int64_t>(kTile), args.width - first));
  float* const sa = shared + warp * 2 * kTile;
  const int64_t t = begin + blockIdx.y;
  T* const row = static_cast<T*>(args.gate) + t * args.gate_stride + first;
  Raw<T, V, N> graw, uraw;
  load<32, V>(row, lane, n, graw);
  const T* up = args.up ? static_cast<const T*>(args.up) + t * args.up_stride + first : nullptr;
  if (up) load<32, V>(up, lane, n, uraw);
  const Span edits = Edited ? edits_of(args, __ldg(args.token_profile + t), tile, 1, tiles) : Span{0, 0};
  const LaneEdit own = Edited ? lane_edit(args, edits, lane, row, up, first, n) : LaneEdit{-1, 0.f};
  float g[N], a[N], u[N];
  graw.get(g);
  activate<sizeof(T) == 2>(args.act, g, a);
  if (up) uraw.get(u);
  else for (float& each : u) each = 1.f;
  const bool any = Edited && edits.begin < edits.end;
  if (any) __syncwarp();  // every lane has read what it edits, before another stores over it
  if (Edited && edits.end - edits.begin > 32) share<32, V>(lane, a, u, sa, sa + kTile);
#pragma unroll
  for (int i = 0; i < N; ++i) a[i] *= u[i];
  store<32, V>(row, lane, n, a);
  if (any) edit<32>(args, edits, own, row, first, n, lane, 0xffffffffu, sa, sa + kTile);
}

// With statistics. A block owns 32 columns for one group's tokens (group 0's also takes the unobserved ones), so that
// sums have one fixed order and nothing needs a float atomic. Teams of 8 lanes take every 32nd token, and load the next
// one while they work on this. With Shared, the block's sketch is kept in shared memory and added once at the end: that
// pays from some hundred tokens on. Else each positive activation is an integer atomic in global memory. Bytes moved: as
// above, and the touched parts of the sketch.
constexpr int kTeam = 8, kEach = 4, kColumns = kTeam * kEach, kTeams = kThreads / kTeam;
constexpr int kSketchBytes = kColumns * kBins * 4, kEditBytes = kTeams * 2 * kColumns * 4;
constexpr int kSumBytes = kWarps * kColumns * (2 * 8 + 4);

// *at += 1 where g > 0, without a branch.
__device__ __forceinline__ void add_if_positive(float g, unsigned shared_address) {
  asm volatile("{ .reg .pred p; setp.gt.f32 p, %0, 0f00000000; @p red.shared.add.u32 [%1], 1; }" ::"f"(g), "r"(shared_address));
}
__device__ __forceinline__ void add_if_positive(float g, int32_t* global_address) {
  asm volatile("{ .reg .pred p; setp.gt.f32 p, %0, 0f00000000; @p red.global.add.u32 [%1], 1; }" ::"f"(g), "l"(global_address));
}

template <class T, int V, bool Shared, bool Edited>
__global__ void __launch_bounds__(kThreads, Shared && V > 1 ? 4 : 2) glu_statistics_kernel(const Args args, const int tiles) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  float* parts = reinterpret_cast<float*>(dynamic);
  int* bins = reinterpret_cast<int*>(dynamic + (Edited ? kEditBytes : 0));
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam, warp = threadIdx.x / 32;
  const unsigned mask = 0xffu << (threadIdx.x % 32 / kTeam * kTeam);
  const int first = blockIdx.x * kColumns, group = blockIdx.y, tile = first / kTile;
  const int n = static_cast<int>(min(static_cast<int64_t>(kColumns), args.width - first));
  int32_t* sketch = args.sketch + (group * args.width + first) * kBins;
  if (Shared) {
    for (int w = threadIdx.x; w < kColumns * kBins; w += kThreads) bins[w] = 0;
    __syncthreads();
  }
  const unsigned my_bins = Shared ? static_cast<unsigned>(__cvta_generic_to_shared(bins)) : 0;
  float* const sa = parts + team * 2 * kColumns;

  double sum[kEach] = {}, squares[kEach] = {};
  int count[kEach] = {};
  const int tokens = static_cast<int>(args.tokens);
  const auto owner_of = [&](int t) { return t < tokens ? __ldg(args.token_group + t) : group; };
  // Whose a token is: 1 ours and observed, 0 ours and not observed, -1 another block's.
  const auto claim = [&](int owner) { return owner == group ? 1 : group == 0 && (owner < 0 || owner >= args.groups) ? 0 : -1; };
  const auto row_of = [&](int t) { return static_cast<T*>(args.gate) + t * args.gate_stride + first; };
  const auto fetch = [&](int t, int columns, Raw<T, V, kEach>& gate, Raw<T, V, kEach>& up) {
    load<kTeam, V>(row_of(t), lane, columns, gate);
    if (args.up) load<kTeam, V>(static_cast<const T*>(args.up) + t * args.up_stride + first, lane, columns, up);
  };
  constexpr bool kAhead = !Edited || sizeof(T) == 2;  // with edits of float32, registers are too dear
  Raw<T, V, kEach> next_gate, next_up;
  int next = claim(owner_of(team)), after = kAhead ? owner_of(team + kTeams) : 0;
  if (kAhead && team < tokens) fetch(team, next >= 0 ? n : 0, next_gate, next_up);
  for (int t = team; t < tokens; t += kTeams) {
    if (!kAhead) {
      next = claim(owner_of(t));
      if (next >= 0) fetch(t, n, next_gate, next_up);
    }
    const int mine = next;
    const Span edits = Edited && mine >= 0 ? edits_of(args, __ldg(args.token_profile + t), tile, 1, tiles) : Span{0, 0};
    const T* up = args.up ? static_cast<const T*>(args.up) + t * args.up_stride + first : nullptr;
    const LaneEdit own = Edited ? lane_edit(args, edits, lane, row_of(t), up, first, n) : LaneEdit{-1, 0.f};
    float g[kEach], a[kEach], u[kEach], h[kEach];
    next_gate.get(g);
    if (up) next_up.get(u);
    else for (float& each : u) each = 1.f;
    if (kAhead) {
      next = claim(after);
      after = owner_of(t + 2 * kTeams);
      if (t + kTeams < tokens) fetch(t + kTeams, next >= 0 ? n : 0, next_gate, next_up);
    }
    if (mine < 0) continue;
    activate<sizeof(T) == 2>(args.act, g, a);
    const bool any = Edited && edits.begin < edits.end;
    if (any) __syncwarp(mask);  // as in glu_kernel
    if (Edited && edits.end - edits.begin > kTeam) share<kTeam, V>(lane, a, u, sa, sa + kColumns);
#pragma unroll
    for (int i = 0; i < kEach; ++i) h[i] = a[i] * u[i];
    store<kTeam, V>(row_of(t), lane, n, h);
    if (any) edit<kTeam>(args, edits, own, row_of(t), first, n, lane, mask, sa, sa + kColumns);
    if (mine == 0) continue;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {  // columns beyond the width were loaded as 0
      const double d = h[i];
      sum[i] += d;
      squares[i] += d * d;
      const int b = column<kTeam, V>(lane, i) * kBins + bin_(a[i]);
      if (Shared) {
        add_if_positive(g[i], my_bins + 4 * b);
      } else {
        add_if_positive(g[i], sketch + b);
        count[i] += g[i] > 0.f;
      }
    }
  }

  // The four teams of a warp, then the warps, in a fixed order.
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int d = kTeam; d < 32; d *= 2) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], d);
      squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], d);
      if (!Shared) count[i] += __shfl_xor_sync(0xffffffffu, count[i], d);
    }
  }
  __syncthreads();
  if (Shared) {
    for (int j = warp; j < n; j += kWarps) {
      int counted = 0;
      for (int b = threadIdx.x % 32; b < kBins; b += 32) {
        const int more = bins[j * kBins + b];
        if (more) atomicAdd(sketch + j * kBins + b, more);  // nobody else adds here: it only spares the wait for a load
        counted += more;
      }
      counted = __reduce_add_sync(0xffffffffu, counted);
      if (threadIdx.x % 32 == 0) args.count[group * args.width + first + j] += counted;
    }
    __syncthreads();  // the sums take the place of the sketch or the edits
  }
  double* sums = reinterpret_cast<double*>(dynamic);  // [2][kWarps][kColumns]
  int* counts = reinterpret_cast<int*>(sums + 2 * kWarps * kColumns);
  if (threadIdx.x % 32 < kTeam) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
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
    if (!Shared) args.count[group * args.width + j] += c;
  }
}

template <class T, int V, bool Edited>
cudaError_t launch(const Args& args, cudaStream_t stream) {
  const int tiles = args.tiles();
  if (!args.token_group) {
    const int warps = tiles < kWarps ? tiles : kWarps;
    constexpr int64_t kMost = 65535;  // of a grid's second dimension
    for (int64_t begin = 0; begin < args.tokens; begin += kMost) {
      const int64_t rows = args.tokens - begin < kMost ? args.tokens - begin : kMost;
      const dim3 grid((tiles + warps - 1) / warps, static_cast<unsigned>(rows));
      glu_kernel<T, V, Edited><<<grid, warps * 32, 0, stream>>>(args, tiles, static_cast<int>(begin));
    }
    return cudaGetLastError();
  }
  constexpr int W = V < kEach ? V : kEach, kEdits = Edited ? kEditBytes : 0;
  const dim3 grid(static_cast<unsigned>(ceil_div(args.width, kColumns)), static_cast<unsigned>(args.groups));
  const bool shared = args.tokens >= 192;  // from here on a sketch in shared memory pays
  const auto kernel = shared ? glu_statistics_kernel<T, W, true, Edited> : glu_statistics_kernel<T, W, false, Edited>;
  const int bytes = shared ? kEdits + kSketchBytes : kEdits > kSumBytes ? kEdits : kSumBytes;
  if (shared) {  // above 48 KiB a kernel must be told
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, kThreads, bytes, stream>>>(args, tiles);
  return cudaGetLastError();
}

template <class T>
cudaError_t dispatch(const Args& args, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto aligned = [](const void* x, int64_t stride) {
    return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride * static_cast<int>(sizeof(T)) % 16 == 0;
  };
  const bool wide = args.width % V == 0 && aligned(args.gate, args.gate_stride) && aligned(args.up, args.up_stride);
  if (args.token_profile) return wide ? launch<T, V, true>(args, stream) : launch<T, 1, true>(args, stream);
  return wide ? launch<T, V, false>(args, stream) : launch<T, 1, false>(args, stream);
}

}  // namespace

const char* neurons::glu_cuda(const Args& args, void* stream) {
  const auto f = args.dtype == kFloat32 ? dispatch<float> : args.dtype == kBFloat16 ? dispatch<__nv_bfloat16> : dispatch<__half>;
  const cudaError_t error = f(args, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
