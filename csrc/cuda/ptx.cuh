// Instructions without a name in CUDA C++, one function each. The tests compile the kernels with a C++ compiler and
// replace these by plain C++ of the same meaning.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifdef DSPA_CUDA_SHIM
#include <ptx_on_cpu.h>
#else

namespace dspa::cuda::ptx {

// ---- memory ---------------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char dspa_dynamic_shared[];
  return dspa_dynamic_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// For data that is read once: the first to be evicted from the cache.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes that are not written during the kernel. Not volatile: the compiler may issue several loads in a row.
__device__ __forceinline__ uint4 load_streaming(const void* address, uint64_t policy) {
  uint4 value;
  asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(address), "l"(policy));
  return value;
}

__device__ __forceinline__ uint2 load_8(const void* address) { return *static_cast<const uint2*>(address); }
__device__ __forceinline__ uint4 load_16(const void* address) { return *static_cast<const uint4*>(address); }

// Brings a multiple of 16 bytes, from a multiple of 16, into the second-level cache in the background.
__device__ __forceinline__ void prefetch(const void* address, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#else
  for (uint32_t offset = 0; offset < bytes; offset += 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(address) + offset));
#endif
}

// Acquire and release: writes of this thread, and of those it shared a barrier with, are visible to threads that add or
// load here afterwards.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  uint32_t before;
  asm volatile("atom.global.acq_rel.gpu.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.global.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// The value as it is now or was a moment ago; orders nothing.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.global.relaxed.gpu.u32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

// Between two loads of a value that another block is about to write.
__device__ __forceinline__ void wait_a_moment() { __nanosleep(64); }

// ---- conversions, rounding to nearest, ties to even -----------------------------------------------------------------

__device__ __forceinline__ float float_of_float16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ uint16_t float16_of_float(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ uint16_t bfloat16_of_float(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// ---- thread-block clusters (sm_90); elsewhere every block is a cluster of its own -----------------------------------

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes to the same place in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void store_in_cluster(uint32_t* pointer, uint32_t rank, uint32_t value) {
  asm volatile(
      "{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.u32 [there], %2; }" ::"r"(
          shared_address(pointer)),
      "r"(rank), "r"(value)
      : "memory");
}

#else

__device__ __forceinline__ uint32_t cluster_rank() { return 0; }
__device__ __forceinline__ uint32_t cluster_size() { return 1; }
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
__device__ __forceinline__ void store_in_cluster(uint32_t* pointer, uint32_t, uint32_t value) { *pointer = value; }

#endif

// ---- launches that begin before the one before them has ended (sm_90) -----------------------------------------------

#if __CUDA_ARCH__ >= 900

// Until all launches before this one have ended, and what they wrote can be read.
__device__ __forceinline__ void wait_for_launches_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next launch may begin once all blocks have said so, and waits for the end of this one by itself.
__device__ __forceinline__ void let_next_launch_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

#else

__device__ __forceinline__ void wait_for_launches_before() {}
__device__ __forceinline__ void let_next_launch_begin() {}

#endif

// ---- bulk copies into shared memory, and the barriers that they arrive at (sm_90) ----------------------------------

#if __CUDA_ARCH__ >= 900

constexpr bool has_bulk_copies = true;

// `count` threads arrive in each of its phases.
__device__ __forceinline__ void barrier_begin(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void barriers_have_begun() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase last until so many bytes have been copied as well.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred over;\nwait:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra wait;\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// A multiple of 16 bytes, from and to multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

#else

constexpr bool has_bulk_copies = false;

__device__ __forceinline__ void barrier_begin(uint64_t*, uint32_t) {}
__device__ __forceinline__ void barriers_have_begun() {}
__device__ __forceinline__ void barrier_arrive(uint64_t*) {}
__device__ __forceinline__ void barrier_expect(uint64_t*, uint32_t) {}
__device__ __forceinline__ void barrier_wait(uint64_t*, uint32_t) {}
__device__ __forceinline__ void copy_bulk(void*, const void*, uint32_t, uint64_t*, uint64_t) {}

#endif

// ---- copies of matrix rows by the copy engine, to one block or to a pair (sm_90a) -----------------------------------

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// The box of rows and columns that begins at `row` and `column`, to a multiple of 1024 bytes; see map_rows. `map` is a
// parameter of the kernel.
template <class Map>
__device__ __forceinline__ void copy_rows(void* shared, const Map& map, int32_t column, int32_t row,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same to both blocks of a cluster of two, at the same place, for the barrier of each.
template <class Map>
__device__ __forceinline__ void copy_rows_to_pair(void* shared, const Map& map, int32_t column, int32_t row,
                                                  uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Arrives at the barrier that the cluster's block `rank` has at the same place.
__device__ __forceinline__ void barrier_arrive_in_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{ .reg .u32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

#else

template <class Map>
__device__ __forceinline__ void copy_rows(void*, const Map&, int32_t, int32_t, uint64_t*) {}
template <class Map>
__device__ __forceinline__ void copy_rows_to_pair(void*, const Map&, int32_t, int32_t, uint64_t*) {}
__device__ __forceinline__ void barrier_arrive_in_cluster(uint64_t*, uint32_t) {}

#endif

// ---- matrix tiles ---------------------------------------------------------------------------------------------------

// Copies 16 bytes from global to shared memory in the background; 16 bytes of zeros unless `valid`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most `kPending` of this thread's latest groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane l holds the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

// The numbers of a matrix, and the bits of their exponent: all set in one that is not finite.
struct Bfloat16Pairs {
  static constexpr uint32_t exponent = 0x7f80;
};
struct Float16Pairs {
  static constexpr uint32_t exponent = 0x7c00;
};

// sums[16, 8] += a[16, 16] * b[16, 8], a by rows and b by columns, in the fragments of PTX's m16n8k16.
__device__ __forceinline__ void multiply_add(Bfloat16Pairs, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_add(Float16Pairs, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- products of warpgroups (sm_90a alone) --------------------------------------------------------------------------

// The tensor cores read both matrices from shared memory while the warpgroup, 128 neighbouring threads, goes on. They
// reach shared memory in another way than copies and stores do (the "async proxy"): what was written there has to be
// shown to them.

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr bool has_warpgroup_products = true;

// What this thread has written to shared memory, or copied there and waited for, may be read by the tensor cores once
// the readers have met this thread at a barrier.
__device__ __forceinline__ void show_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The instruction, with its 128 sums as operands.
#define DSPA_EIGHT(sums, i)                                                                                            \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]),        \
      "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define DSPA_THIRTY_TWO(sums, i)                                                                                       \
  DSPA_EIGHT(sums, i), DSPA_EIGHT(sums, i + 8), DSPA_EIGHT(sums, i + 16), DSPA_EIGHT(sums, i + 24)
#define DSPA_ALL(sums)                                                                                                 \
  DSPA_THIRTY_TWO(sums, 0), DSPA_THIRTY_TWO(sums, 32), DSPA_THIRTY_TWO(sums, 64), DSPA_THIRTY_TWO(sums, 96)
#define DSPA_MULTIPLY_ADD(type, sums, a, b)                                                                            \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {"                                       \
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                      \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                      \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                      \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                      \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                      \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "          \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"        \
               "}, %128, %129, 1, 1, 1, 0, 0;"                                                                         \
               : DSPA_ALL(sums)                                                                                        \
               : "l"(a), "l"(b)                                                                                        \
               : "memory")

// Nothing that reads or writes the sums is moved past this.
__device__ __forceinline__ void settle(float (&sums)[128]) { asm volatile("" : DSPA_ALL(sums)::"memory"); }

// Before the first product, and before every one whose sums were read or written since the last.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// sums[64, 256] += a[64, 16] * b[256, 16]^T in the background; a and b are PTX's descriptors of matrices in shared
// memory. Thread t of the warpgroup has rows t / 32 * 16 + t % 32 / 4 + 8 i and columns 8 j + t % 4 * 2 + c, in
// sums[4 j + 2 i + c].
__device__ __forceinline__ void multiply_add(Bfloat16Pairs, float (&sums)[128], uint64_t a, uint64_t b) {
  DSPA_MULTIPLY_ADD("bf16", sums, a, b);
}

__device__ __forceinline__ void multiply_add(Float16Pairs, float (&sums)[128], uint64_t a, uint64_t b) {
  DSPA_MULTIPLY_ADD("f16", sums, a, b);
}

#undef DSPA_MULTIPLY_ADD
#undef DSPA_ALL
#undef DSPA_THIRTY_TWO
#undef DSPA_EIGHT

// Makes a group of the products since the last.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// A warpgroup has so many registers a thread from here on: fewer, or more once others have left them.
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Until at most `kPending` of the warpgroup's latest groups of products are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#else

constexpr bool has_warpgroup_products = false;

__device__ __forceinline__ void show_to_tensor_cores() {}
__device__ __forceinline__ void settle(float (&)[128]) {}
__device__ __forceinline__ void begin_products() {}
template <class Pairs>
__device__ __forceinline__ void multiply_add(Pairs, float (&)[128], uint64_t, uint64_t) {}
__device__ __forceinline__ void commit_products() {}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {}
template <int kPending>
__device__ __forceinline__ void wait_for_products() {}

#endif

}  // namespace dspa::cuda::ptx

#endif
