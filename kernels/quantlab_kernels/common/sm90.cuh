// Hopper's asynchronous machinery in plain functions: mbarriers, the bulk tensor copy engine (TMA), clusters and
// distributed shared memory, warpgroup MMA descriptors. No header is included, so NVRTC needs none.
// The instruction texts follow the PTX ISA manual, version 8.0 and later.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// A CUtensorMap, passed to the kernel by value as a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

#define DEVICE __device__ __forceinline__

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// The same value in all lanes, which the compiler then keeps in uniform registers.
DEVICE int uniform(int value) { return __shfl_sync(0xffffffff, value, 0); }

// ---- mbarriers (addresses are shared-memory addresses of this CTA) ----

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the copy engine and to the other CTAs of the cluster.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void barrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Lanes that arrive for their warp when all of it has met: one. racecheck takes what the others have read for races, so
// for it all arrive (tools/small_calls.py; DECISIONS.md, 0093).
#ifdef EVERY_LANE
constexpr int ARRIVALS = 32;
#else
constexpr int ARRIVALS = 1;
#endif

// The same offset in the shared memory of CTA `rank` of the cluster.
DEVICE u32 cluster_address(u32 address, u32 rank) {
  u32 result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

// Orders nothing between CTAs but what the barrier itself counts: enough to hand back a buffer that only the copy engine
// and asynchronous stores write. (.release.cluster would put a membar.gpu before every arrival.)
DEVICE void barrier_arrive_cluster(u32 barrier, u32 rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(cluster_address(barrier, rank)) : "memory");
}

DEVICE void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}

// A barrier among `threads` threads of the CTA; ids 1 to 15 (0 is __syncthreads).
DEVICE void named_barrier_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters ----

DEVICE u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Every thread of the cluster is here. Orders no memory accesses by itself.
DEVICE void cluster_sync_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Writes into another CTA's shared memory (`address`, `barrier`: cluster addresses) and counts the bytes there.
DEVICE void store_cluster_async(u32 address, u32 barrier, float a, float b, float c, float d) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(
                   address),
               "r"(barrier), "f"(a), "f"(b), "f"(c), "f"(d)
               : "memory");
}

// ---- hand-over between CTAs through global memory ----

DEVICE void flag_set(u32* flag) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory"); }

// Waits for the flag and clears it for the next launch. A whole warp does the same: if one lane went alone, the compiler
// would keep nothing in uniform registers from there on, not even in the inner loop.
DEVICE void flag_take(u32* flag) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    value = uniform(value);
  } while (value == 0);
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(0) : "memory");
}

// ---- bulk tensor copies ----

DEVICE void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(map)) : "memory");
}

// Cache policies of `createpolicy`, as the fixed encodings that it returns.
constexpr u64 kEvictNormal = 0x1000000000000000ull;
constexpr u64 kEvictFirst = 0x12F0000000000000ull;

DEVICE void tma_load(u32 destination, const TensorMap* map, u32 barrier, int x, int y, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(x), "r"(y), "l"(policy)
      : "memory");
}

// Writes the box at the same offset in every CTA whose bit is set in `mask`, and signals the barrier there.
DEVICE void tma_load_multicast(u32 destination, const TensorMap* map, u32 barrier, int x, int y, u16 mask, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
      " [%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(destination),
      "l"(reinterpret_cast<u64>(map)), "r"(barrier), "r"(x), "r"(y), "h"(mask), "l"(policy)
      : "memory");
}

// `bytes` in a row, a multiple of 16 like both addresses; no tensor map.
DEVICE void bulk_load(u32 destination, const void* source, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          destination),
      "l"(reinterpret_cast<u64>(source)), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

DEVICE void tma_store(const TensorMap* map, u32 source, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(
                   reinterpret_cast<u64>(map)),
               "r"(source), "r"(x), "r"(y)
               : "memory");
}

DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most `pending` of this thread's stores still have to read their shared memory.
template <int pending>
DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

template <int pending>
DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

// Between ordinary writes to shared memory and their reading by the copy engine or the tensor cores.
DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroup MMA (the instruction itself, one function per N, is generated: see wgmma.py) ----

// Descriptor of an operand in shared memory: rows of 128 bytes along K, 128-byte swizzle, 8 rows every 1024 bytes. The
// upper half is a constant; a step of 32 bytes along K adds 2 to the lower half.
constexpr u32 kDescriptorHigh = (1u << 30) | (1024 >> 4);

DEVICE u32 descriptor_low(u32 address) { return (1u << 16) | ((address & 0x3FFFF) >> 4); }

DEVICE u64 descriptor(u32 low) {
  u64 result;
  asm("mov.b64 %0, {%1, %2};" : "=l"(result) : "r"(low), "n"(kDescriptorHigh));
  return result;
}

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators across a wgmma fence or wait.
template <int n>
DEVICE void pin(float (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int count>
DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// ---- dependent launch: no-ops unless the launch asked for it ----

// Until the kernels before this one in the stream have finished and their writes are visible.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// ---- 16-bit output ----

struct BFloat16 {
  static DEVICE u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static DEVICE float unpack(u16 bits) { return __uint_as_float(static_cast<u32>(bits) << 16); }
};

struct Float16 {
  static DEVICE u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
  }
  static DEVICE float unpack(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
};

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// The same, each matrix transposed: lane l gives the address of column l % 8 of matrix l / 8.
DEVICE void store_matrix_x4_transposed(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}
DEVICE void load_matrix_x4(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
DEVICE void load_matrix_x4_transposed(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
}
