// Enough of CUDA to run neurons_cuda.cu on a CPU, so that what its kernels read, edit, count and add up is tested where there is no
// GPU. A block's threads are coroutines that go on until they wait for each other, at __syncthreads() or at what a warp does
// together; blocks, and threads between two waits, run in a random order, and some warps as late as can be, so that what hangs on
// order shows; so does an address beyond the end of shared memory, or one that is not aligned: as a signal, which ends the tests.
// What does not: the device's own branches of neurons.h (exp, erf), atomics that are missing between two waits, and speed.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__

using std::max;
using std::min;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half2 { __half x, y; };
template <class To, class From>
To bits_as(From x) {
  To y;
  memcpy(&y, &x, sizeof(y));
  return y;
}
inline float __bfloat162float(__nv_bfloat16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return {static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return x.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float x) {
  const float size = std::fabs(x);
  const uint32_t sign = bits_as<uint32_t>(x) >> 16 & 0x8000, bits = bits_as<uint32_t>(size);
  const uint32_t half = x != x ? 0x7e00 : size >= 65520.f ? 0x7c00
      : size < 6.103515625e-5f ? static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24)))
                               : (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  return {static_cast<uint16_t>(sign | half)};
}

inline __nv_bfloat162 each_of(__nv_bfloat162 p, __nv_bfloat162 q, float (*f)(float, float)) {
  const auto of = [&](auto a, auto b) { return __float2bfloat16_rn(f(__bfloat162float(a), __bfloat162float(b))); };
  return {of(p.x, q.x), of(p.y, q.y)};
}
inline __nv_bfloat162 __hmax2(__nv_bfloat162 p, __nv_bfloat162 q) { return each_of(p, q, fmaxf); }
inline __nv_bfloat162 __hmin2(__nv_bfloat162 p, __nv_bfloat162 q) { return each_of(p, q, fminf); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace cuda_on_cpu {

inline const char* failed = nullptr;  // what the last launch did wrong

enum Wait { kNone, kWarp, kBlock, kDone };
struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned number;
  Wait waits;
};

constexpr int kStack = 64 * 1024, kShared = 227 * 1024;
inline int processors, room;    // of the card: multiprocessors, and bytes of shared memory that a block may have
inline std::map<const void*, size_t> told;  // bytes that a launch of a kernel may ask for, if not 48 KiB
inline size_t given;                        // and that the last one did
inline ucontext_t scheduler;
inline std::vector<Thread> threads(1024);
inline Thread* now;
inline dim3 block_index, block_size;
inline std::function<void()> body;
inline uint64_t slots[32][32];  // by warp and lane: what lanes tell each other
inline std::mt19937 random{0};
// The end of a block's shared memory is followed by memory that can't be touched.
inline unsigned char* const shared_end = [] {
  const size_t page = sysconf(_SC_PAGESIZE), pages = (kShared + page - 1) / page * page;
  void* all = mmap(nullptr, pages + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(static_cast<char*>(all) + pages, page, PROT_NONE)) abort();
  return static_cast<unsigned char*>(all) + pages;
}();
inline unsigned char* shared;

inline void wait(Wait what) {
  now->waits = what;
  swapcontext(&now->context, &scheduler);
}
inline void begin() {
  body();
  now->waits = kDone;
}

// Lets the waiting threads [first, end) go on, if those that are not done all wait for the same.
inline bool release(unsigned first, unsigned end, Wait what) {
  bool any = false;
  for (unsigned k = first; k < end; ++k) {
    if (threads[k].waits != kDone && threads[k].waits != what) return false;
    any |= threads[k].waits == what;
  }
  for (unsigned k = first; k < end; ++k)
    if (threads[k].waits == what) threads[k].waits = kNone;
  return any;
}

inline void run_block(size_t bytes) {
  const unsigned count = block_size.x;
  memset(shared, 0xab, bytes);  // nothing is zero by itself
  std::vector<unsigned> order(count);
  for (unsigned k = 0; k < count; ++k) {
    Thread& thread = threads[order[k] = k];
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    thread.number = k;
    thread.waits = kNone;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = &scheduler;
    makecontext(&thread.context, begin, 0);
  }
  unsigned asleep = random();  // warps, a bit each, that go on only when the others can't: whoever fails to wait for them shows
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    bool more = false;
    for (unsigned k : order) {
      if (threads[k].waits != kNone || (asleep >> k / 32 & 1)) continue;
      now = &threads[k];
      swapcontext(&scheduler, &now->context);
      more = true;
    }
    for (unsigned first = 0; first < count; first += 32) more |= release(first, std::min(first + 32, count), kWarp);
    if (more) continue;
    if (release(0, count, kBlock)) asleep = random();
    else if (asleep) asleep = 0;
    else break;
  }
  for (unsigned k = 0; k < count; ++k)
    if (threads[k].waits != kDone) failed = "a thread waits for others that do not come";
}

template <class Call>
void launch(const void* kernel, dim3 grid, dim3 size, size_t bytes, Call call) {
  const bool fine = size.x <= 1024 && size.x % 32 == 0 && bytes <= std::max(told[kernel], size_t{48 * 1024})
                    && grid.x && grid.y && grid.y <= 65535;
  failed = fine ? nullptr : "no such grid or block can be launched";
  if (failed) return;
  block_size = size;
  given = bytes;
  shared = shared_end - (bytes + 15) / 16 * 16;
  body = call;
  std::vector<unsigned> order(grid.x * grid.y);
  for (unsigned k = 0; k < order.size(); ++k) order[k] = k;
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned k : order) {
    block_index = dim3(k % grid.x, k / grid.x);
    run_block(bytes);
  }
}

inline uint64_t& slot(unsigned lane) { return slots[now->number / 32][lane]; }

inline void add_shared(unsigned address) {
  if (address % 4 || address + 4 > given) failed = "an address beyond the shared memory";
  else ++*reinterpret_cast<unsigned*>(shared + address);
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() { return cuda_on_cpu::failed ? cudaErrorInvalidValue : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::failed; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
  using namespace cuda_on_cpu;
  failed = bytes <= room && room <= kShared ? nullptr : "more shared memory than there is";
  told[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaGetLastError();
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) {
  return *value = what == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::processors : cuda_on_cpu::room, cudaSuccess;
}

#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define threadIdx dim3(cuda_on_cpu::now->number)

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::kBlock); }
template <class T>
T __ldg(const T* address) { return *address; }
inline int atomicAdd(int* address, int more) { return (*address += more) - more; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline size_t __cvta_generic_to_shared(const void* address) {
  return static_cast<const unsigned char*>(address) - cuda_on_cpu::shared;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  using namespace cuda_on_cpu;
  const unsigned lane = now->number % 32;
  memcpy(&slot(lane), &value, sizeof(T));
  wait(kWarp);
  memcpy(&value, &slot(lane ^ distance), sizeof(T));
  wait(kWarp);
  return value;
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  using namespace cuda_on_cpu;
  slot(now->number % 32) = mine;
  wait(kWarp);
  unsigned all = 0;
  for (unsigned lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(slot(lane)) << lane;
  wait(kWarp);
  return all;
}
inline int __reduce_add_sync(unsigned, int value) {
  using namespace cuda_on_cpu;
  slot(now->number % 32) = value;
  wait(kWarp);
  int all = 0;
  for (unsigned lane = 0; lane < 32; ++lane) all += static_cast<int>(slot(lane));
  wait(kWarp);
  return all;
}
