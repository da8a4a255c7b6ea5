// CUDA kernels of neurons::glu_ and their launcher. Includes no torch header: nvcc alone compiles it, and the CPU build
// of torch, which lacks the toolkit's headers, can still check it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <type_traits>

#include "neurons.h"

namespace {

using namespace neurons;

// Element i of a register, which holds one float or up to two elements of 16 bits; and the way back.
__device__ __forceinline__ float element(unsigned x, int, float) { return float_of(x); }
__device__ __forceinline__ float element(unsigned x, int i, __nv_bfloat16) { return float_of(i ? x & 0xffff0000u : x << 16); }
__device__ __forceinline__ float element(unsigned x, int i, __half) { return __half2float(same_bits<__half2>(x >> 16 * i).x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half_rn(x); }

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

// Of bfloat16, an activation's bin is looked up: there are only 128 gates an octave. Where a gate is beyond the sketch's range, so
// is act(gate), since act(x) <= x and act(2^6) = 2^6: the first and the last entry stand for those.
constexpr int kFirstGate = (127 + kLowExponent) << 7, kGates = (kHighExponent - kLowExponent) * 128 + 1;

// V neighbouring elements of a token, a lane's, as one machine word, moved by one instruction: 16 bytes, or one element where rows
// are not aligned. They stay a word until they are used: taking a word apart waits for the load that brings it.
template <class T, int V>
struct Word {
  using Register = std::conditional_t<V == 1 && sizeof(T) == 2, unsigned short, unsigned>;
  static constexpr int kEach = sizeof(Register) / sizeof(T), kRegisters = V / kEach;
  using Whole = std::conditional_t<V == 1, Register, uint4>;
  Register registers[kRegisters];

  __device__ __forceinline__ void load(const T* from) {
    const Whole whole = *reinterpret_cast<const Whole*>(from);
    memcpy(registers, &whole, sizeof(whole));
  }
  __device__ __forceinline__ void get(float (&x)[V]) const {
    for (int i = 0; i < V; ++i) x[i] = element(registers[i / kEach], i % kEach, T{});
  }
  __device__ __forceinline__ static void store(T* here, const float (&x)[V]) {
    alignas(16) T elements[V];
    Whole whole;
    for (int i = 0; i < V; ++i) from_float(x[i], elements[i]);
    memcpy(&whole, elements, sizeof(whole));
    *reinterpret_cast<Whole*>(here) = whole;
  }
  // Element i. Registers have no index: it is picked by masks, since from a choice nvcc makes an address.
  __device__ __forceinline__ float at(int i) const {
    unsigned picked = 0;
    for (int r = 0; r < kRegisters; ++r) picked |= registers[r] & (i / kEach == r ? 0xffffffffu : 0);
    return element(picked, i % kEach, T{});
  }
  // Of gates in bfloat16: where their bins' counters are among their columns', in bytes. What is not positive is no matter.
  __device__ __forceinline__ void places(const unsigned char* table, int (&place)[V]) const {
    constexpr unsigned kFirst = kFirstGate * 0x10001u, kLast = kFirst + (kGates - 1) * 0x10001u;
    const auto two = [](unsigned x) { return same_bits<__nv_bfloat162>(x); };
    for (int r = 0; r < kRegisters; ++r) {
      const unsigned entries = (same_bits<unsigned>(__hmin2(__hmax2(two(registers[r]), two(kFirst)), two(kLast))) - kFirst) * 2;
      place[2 * r] = *reinterpret_cast<const uint16_t*>(table + (entries & 0xffff));
      place[2 * r + 1] = *reinterpret_cast<const uint16_t*>(table + (entries >> 16));
    }
  }
};

// The edits of V columns from `column` on, among those that a profile makes in their tile.
template <int V>
__device__ __forceinline__ Span lane_edits(const Args& args, int profile, int column) {
  const Span all = edits_of(args, profile, column / kTile, 1, args.tiles());
  int begin = all.begin, end = all.end;
  while (begin < end) {
    const int middle = begin + (end - begin) / 2;
    if (__ldg(args.edit_index + middle) < column) begin = middle + 1;
    else end = middle;
  }
  while (end < all.end && __ldg(args.edit_index + end) < column + V) ++end;
  return {begin, end};
}

// Puts the edited ones into h, a lane's products.
template <class T, int V>
__device__ __forceinline__ void edit(const Args& args, Span edits, int column, const Word<T, V>& gate, const Word<T, V>& up,
                                     float (&h)[V]) {
#pragma unroll 1
  for (int k = edits.begin; k < edits.end; ++k) {
    const int j = __ldg(args.edit_index + k) - column;
    const float4 v = __ldg(reinterpret_cast<const float4*>(args.edit_value + k));
    const float x = edit_({v.x, v.y, v.z, v.w}, act_<sizeof(T) == 2>(args.act, gate.at(j)), args.up ? up.at(j) : 1.f);
    for (int i = 0; i < V; ++i) h[i] = i == j ? x : h[i];
  }
}

// No statistics. A warp has 32 words of each of `several` tokens, and loads the next token's while it works on one: that hides
// the chain of loads behind an edit. Bytes moved: tokens * width * (gate read, up read, gate written) * sizeof(T), and the edits.
constexpr int kPlainThreads = 128;
template <class T, int V, bool Edited>
__global__ void __launch_bounds__(kPlainThreads, Edited ? 9 : 10) glu_kernel(const Args args, const int several) {
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (column >= args.width) return;
  int t = blockIdx.y * several;
  const int end = min(t + several, static_cast<int>(args.tokens));
  T* row = static_cast<T*>(args.gate) + t * args.gate_stride + column;
  const T* up = args.up ? static_cast<const T*>(args.up) + t * args.up_stride + column : row;  // read, not used
  Word<T, V> next_gate, next_up;
  next_gate.load(row), next_up.load(up);
  int next = Edited ? __ldg(args.token_profile + t) : 0, profile = 0;
  Span edits = {0, 0};
  while (true) {
    if (Edited && next != profile) edits = lane_edits<V>(args, profile = next, column);
    const Word<T, V> gate_word = next_gate, up_word = next_up;
    float g[V], a[V], u[V], h[V];
    gate_word.get(g), up_word.get(u);
    T* const here = row;
    if (++t < end) {
      next_gate.load(row += args.gate_stride), next_up.load(up += args.up ? args.up_stride : args.gate_stride);
      if (Edited) next = __ldg(args.token_profile + t);
    }
    activate<sizeof(T) == 2>(args.act, g, a);
    for (int i = 0; i < V; ++i) h[i] = args.up ? a[i] * u[i] : a[i];
    if (Edited) edit(args, edits, column, gate_word, up_word, h);
    Word<T, V>::store(here, h);
    if (t >= end) break;
  }
}

template <bool Shared> constexpr int kThreads = Shared ? 512 : 256;  // of a block, which has a multiprocessor, or half of one
template <bool Shared> constexpr int kStage = Shared ? 2048 : 256;   // tokens that are looked through together
// Where a block has what in its shared memory, in bytes: the table of bins; counters, one a lane, for activations that are not
// positive, cheaper than a branch; its tokens; how many of each 32 are its own; its sketch. At the end its sums are there instead.
constexpr int kNowhere = (kGates + 7) / 8 * 16, kList = kNowhere + 32 * 4, kFound = kList + kStage<true> * 8;
constexpr int kSketch = kFound + kStage<true> / 32 * 4;

struct alignas(8) Own { int token, profile; };  // the profile with the sign bit where the token is not observed
// Lists a block's own of a stage's tokens, in order, and says how many. Group 0's are also those of no group. All threads come.
template <bool Shared, bool Edited>
__device__ __forceinline__ int list_own(const Args& args, int64_t from, Own* list, int* found) {
  constexpr int kEach = kStage<Shared> / kThreads<Shared>, kWarps = kThreads<Shared> / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Own mine[kEach];
  unsigned own[kEach];  // a bit a lane
  for (int e = 0; e < kEach; ++e) {
    const int64_t t = from + e * kThreads<Shared> + threadIdx.x;
    const int owner = t < args.tokens ? __ldg(args.token_group + t) : 0;
    const bool nobody = owner < 0 || owner >= args.groups;
    const int profile = Edited && t < args.tokens ? max(__ldg(args.token_profile + t), 0) : 0;
    mine[e] = {static_cast<int>(t), nobody ? profile | INT32_MIN : profile};
    own[e] = __ballot_sync(0xffffffffu, t < args.tokens && (nobody ? 0 : owner) == blockIdx.y);
    if (lane == 0) found[e * kWarps + warp] = __popc(own[e]);
  }
  __syncthreads();
  const int first = lane < kEach * kWarps ? found[lane] : 0, second = lane + 32 < kEach * kWarps ? found[lane + 32] : 0;
  for (int e = 0; e < kEach; ++e) {
    const int k = e * kWarps + warp, before = __reduce_add_sync(0xffffffffu, (lane < k ? first : 0) + (lane + 32 < k ? second : 0));
    if (own[e] >> lane & 1) list[before + __popc(own[e] & ((1u << lane) - 1))] = mine[e];
  }
  __syncthreads();
  return __reduce_add_sync(0xffffffffu, first + second);
}

// The end of a block's work, if it had any: its sums go to its n columns' moments, added in a fixed order; its counters, or with
// Shared its sketch, to theirs. Nobody else adds there, but atomics spare the wait for loads.
template <int V, bool Shared>
__device__ __forceinline__ void add_to_statistics(const Args& args, int lanes, int first, int n, const double (&sum)[V],
                                                  const double (&squares)[V], const int (&count)[V], int* bins, double* sums) {
  constexpr int kEach = (kBins + 31) / 32, kAll = kThreads<Shared>;
  const int group = blockIdx.y, teams = min(kAll / lanes, static_cast<int>(args.tokens));
  int32_t* const counts = args.count + group * args.width + first;
  int32_t* const sketch = args.sketch + (group * args.width + first) * kBins;
  __syncthreads();
  for (int j = threadIdx.x / 32; Shared && j < n; j += kAll / 32) {
    int more[kEach], counted = 0;
    for (int k = 0; k < kEach; ++k) {
      const int b = k * 32 + threadIdx.x % 32;
      more[k] = b < kBins ? bins[j * kBins + b] : 0;
      counted += more[k];
    }
    for (int k = 0; k < kEach; ++k)
      if (more[k]) atomicAdd(sketch + j * kBins + k * 32 + threadIdx.x % 32, more[k]);
    counted = __reduce_add_sync(0xffffffffu, counted);
    if (threadIdx.x % 32 == 0) atomicAdd(counts + j, counted);
  }
  if (Shared) __syncthreads();  // the sums take the place of the sketch
  for (int i = 0; i < V; ++i) {  // [2 or 3][V][threads]
    sums[i * kAll + threadIdx.x] = sum[i];
    sums[(V + i) * kAll + threadIdx.x] = squares[i];
    if (!Shared) sums[(2 * V + i) * kAll + threadIdx.x] = count[i];
  }
  const int results = (Shared ? 2 : 3) * V * lanes, parts = kAll / results, part = threadIdx.x / results, k = threadIdx.x % results;
  double all = 0;
  __syncthreads();
  for (int team = part; part < parts && team < teams; team += parts) all += sums[k / lanes * kAll + team * lanes + k % lanes];
  __syncthreads();
  sums[threadIdx.x] = all;  // of every parts'th team
  __syncthreads();
  const int which = k / lanes / V, j = k % lanes * V + k / lanes % V;
  if (part > 0 || j >= n) return;
  for (int p = 1; p < parts; ++p) all += sums[p * results + k];
  if (which < 2) args.moments[(2 * group + which) * args.width + first + j] += all;
  else counts[j] += static_cast<int>(all);
}

// With statistics. A block owns `lanes` words of columns for one group's tokens (group 0's also takes the unobserved ones), so that
// sums have one fixed order and nothing needs a float atomic. Its teams of so many lanes take a token each, and have the next ones'
// loads under way. With Shared, which pays from some hundred tokens on, the block's sketch is in shared memory and added once at
// the end; else each positive activation is an integer atomic. Bytes moved: as above, and the touched parts of the sketch.
template <class T, int V, bool Shared, bool Edited>
__global__ void __launch_bounds__(kThreads<Shared>, Shared ? 1 : 2)
glu_statistics_kernel(const Args args, const int lanes) {
  constexpr int kDepth = !Shared ? 1 : V > 1 ? 3 : 8;  // tokens whose loads are under way
  constexpr bool kLookup = Shared && V > 1 && std::is_same_v<T, __nv_bfloat16>;
  using Stride = std::conditional_t<V == 1, int64_t, unsigned>;  // in bytes; with less than 4 GB a product is one instruction
  extern __shared__ __align__(16) unsigned char dynamic[];
  int* const bins = reinterpret_cast<int*>(dynamic + kSketch);  // [lanes * V][kBins]
  Own* const list = reinterpret_cast<Own*>(dynamic + kList);
  const int lane = threadIdx.x % lanes, team = threadIdx.x / lanes, teams = blockDim.x / lanes, group = blockIdx.y;
  const int first = blockIdx.x * lanes * V, column = first + lane * V;
  const int n = static_cast<int>(min(static_cast<int64_t>(lanes * V), args.width - first));
  int32_t* const sketch = args.sketch + (group * args.width + column) * kBins;
  Span edits = {0, 0};
  int known = 0, seen = 0, count[V] = {};  // seen: tokens of the group, the same in all threads
  double sum[V] = {}, squares[V] = {};
  for (int w = threadIdx.x; Shared && w < lanes * V * kBins / 4; w += blockDim.x) reinterpret_cast<uint4*>(bins)[w] = {};
  for (int k = threadIdx.x; kLookup && k < kGates; k += blockDim.x)
    reinterpret_cast<uint16_t*>(dynamic)[k] = 4 * bin_(act_<true>(args.act, float_of((kFirstGate + k) << 16)));
  const unsigned lane_bins = static_cast<unsigned>(__cvta_generic_to_shared(bins + lane * V * kBins));
  const unsigned nowhere = static_cast<unsigned>(__cvta_generic_to_shared(dynamic + kNowhere)) + threadIdx.x % 32 * 4;
  const Stride gate_bytes = args.gate_stride * sizeof(T), up_bytes = (args.up ? args.up_stride : args.gate_stride) * sizeof(T);
  char* const gate = reinterpret_cast<char*>(static_cast<T*>(args.gate) + column);
  const char* const up = args.up ? reinterpret_cast<const char*>(static_cast<const T*>(args.up) + column) : gate;  // read, not used
  for (int64_t from = 0; from < args.tokens; from += kStage<Shared>) {
    const int own = list_own<Shared, Edited>(args, from, list, reinterpret_cast<int*>(dynamic + kFound));
    if (seen += own; team >= teams || lane * V >= n || team >= own) continue;
    Word<T, V> gates[kDepth], ups[kDepth];
    Own who[kDepth] = {};
    const auto row = [&](int d) { return reinterpret_cast<T*>(gate + uint64_t(unsigned(who[d].token)) * gate_bytes); };
    const auto fetch = [&](int k, int d) {  // beyond the end the last one, for nothing: that spares a branch
      who[d] = list[min(k, own - 1)];
      gates[d].load(row(d));
      ups[d].load(reinterpret_cast<const T*>(up + uint64_t(unsigned(who[d].token)) * up_bytes));
    };
#pragma unroll
    for (int d = 0; d < kDepth; ++d) fetch(team + d * teams, d);
    for (int begin = team; begin < own; begin += kDepth * teams) {
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (begin + d * teams >= own) break;
        const int profile = who[d].profile & INT32_MAX;
        if (Edited && profile != known) edits = lane_edits<V>(args, known = profile, column);
        float g[V], a[V], u[V], h[V];
        gates[d].get(g), ups[d].get(u);
        activate<sizeof(T) == 2>(args.act, g, a);
        for (int i = 0; i < V; ++i) h[i] = args.up ? a[i] * u[i] : a[i];
        if (who[d].profile >= 0) {
          int place[V];  // of the counters, in bytes; looked up all at once
          if constexpr (kLookup) gates[d].places(dynamic, place);
          for (int i = 0; i < V; ++i) {
            const double x = h[i];
            sum[i] += x;
            squares[i] += x * x;
            if (!kLookup) place[i] = 4 * bin_(a[i]);
            if (Shared) {
              const unsigned counter = g[i] > 0.f ? lane_bins + 4 * i * kBins + place[i] : nowhere;
              asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(counter));
            } else {
              if (g[i] > 0.f) atomicAdd(sketch + i * kBins + place[i] / 4, 1);
              count[i] += g[i] > 0.f;
            }
          }
        }
        if (Edited) edit(args, edits, column, gates[d], ups[d], h);
        Word<T, V>::store(row(d), h);  // before its place is taken
        fetch(begin + (d + kDepth) * teams, d);
      }
    }
  }
  if (seen) add_to_statistics<V, Shared>(args, lanes, first, n, sum, squares, count, bins, reinterpret_cast<double*>(dynamic));
}

template <class T, int V, bool Edited>
cudaError_t launch(const Args& args, cudaStream_t stream) {
  const int64_t words = ceil_div(args.width, V), threads = words < kPlainThreads ? ceil_div(words, 32) * 32 : kPlainThreads;
  const int64_t across = ceil_div(words, threads);
  constexpr int64_t kMost = 65535;  // of a grid's second dimension
  int64_t several = Edited && args.tokens * across >= 1024 ? 2 : 1;  // once that leaves enough blocks to fill the card
  if (several * kMost < args.tokens) several = ceil_div(args.tokens, kMost);
  const dim3 grid(static_cast<unsigned>(across), static_cast<unsigned>(ceil_div(args.tokens, several)));
  glu_kernel<T, V, Edited><<<grid, static_cast<unsigned>(threads), 0, stream>>>(args, static_cast<int>(several));
  return cudaGetLastError();
}

// Of a group at least, so that no grid is empty. With Shared a multiprocessor has a block of words at a time: as wide as lets all
// finish soonest, in whole sectors of 32 bytes, with a thread for each of its sums.
template <class T, int V, bool Shared>
cudaError_t launch_statistics(const Args& args, cudaStream_t stream) {
  const auto kernel = args.token_profile ? glu_statistics_kernel<T, V, Shared, true> : glu_statistics_kernel<T, V, Shared, false>;
  const auto bytes = [](int n) { return max(kSketch + Shared * n * V * kBins * 4, (3 - Shared) * V * kThreads<Shared> * 8); };
  int device, processors, room, best = V == 1 ? 32 : 8;
  double least = INFINITY;
  if (Shared) {  // beyond 48 KiB a kernel must be told: always the most there is, lest another thread's launch finds less
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
    if (error) return error;
    for (int lanes = 2; lanes <= 128 && 2 * V * lanes <= kThreads<Shared> && bytes(lanes) <= room; lanes += 2) {
      const int64_t rounds = ceil_div(ceil_div(args.width, lanes * V) * args.groups, processors);
      const double time = rounds * (1. * V * kThreads<Shared> / (kThreads<Shared> / lanes) + 16);  // 16: what a block takes besides
      if (time <= least) least = time, best = lanes;
    }
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(args.width, best * V)), static_cast<unsigned>(args.groups));
  kernel<<<grid, kThreads<Shared>, bytes(best), stream>>>(args, best);
  return cudaGetLastError();
}

template <class T>
cudaError_t dispatch(const Args& args, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto aligned = [](const void* x, int64_t stride) {
    return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride % V == 0 && stride >> 30 == 0;  // rows of less than 4 GB
  };
  const bool wide = args.width % V == 0 && aligned(args.gate, args.gate_stride) && aligned(args.up, args.up_stride);
  if (args.groups && args.tokens < 192)  // beyond, a shared sketch pays
    return wide ? launch_statistics<T, V, false>(args, stream) : launch_statistics<T, 1, false>(args, stream);
  if (args.groups) return wide ? launch_statistics<T, V, true>(args, stream) : launch_statistics<T, 1, true>(args, stream);
  if (args.token_profile) return wide ? launch<T, V, true>(args, stream) : launch<T, 1, true>(args, stream);
  return wide ? launch<T, V, false>(args, stream) : launch<T, 1, false>(args, stream);
}

}  // namespace

const char* neurons::glu_cuda(const Args& args, void* stream) {
  const auto f = args.dtype == kFloat32 ? dispatch<float> : args.dtype == kBFloat16 ? dispatch<__nv_bfloat16> : dispatch<__half>;
  const cudaError_t error = f(args, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : (cudaGetLastError(), cudaGetErrorString(error));  // or torch tells it again
}
