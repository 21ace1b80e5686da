// Latents in codes as operands of MMA in rows.cu; rows_e4m3.cuh and rows_int4.cuh say what is one format's own.
//
// The second product is transposed, channels on M: codes become operands in registers.

constexpr int STAGING_WARPS = THREADS / 32;

// Queries come all at once as they are, to where later tiles will lie, and go from there to what the MMA takes. They are
// asked for before lengths are there: `last` of a row is not known yet.
DEVICE void fetch_queries(const Params& p, const Work& work, const Shared& s) {
  const int n = threadIdx.x / 32 + threadIdx.x % 32 * STAGING_WARPS;
  if (n >= N) return;
  const Row row(p, work, n);
  if (row.there) {
    barrier_arrive_expect(s.queries_full(), ROW_BYTES + 128);
    bulk_load(s.raw_latent(n), row.latent, ROW_BYTES, s.queries_full(), kEvictNormal);
    bulk_load(s.raw_rope(n), row.rope, 128, s.queries_full(), kEvictNormal);
  } else {
    barrier_arrive(s.queries_full());
  }
}

// Positions of the tile, which are added to the scores; a group of its own.
DEVICE void multiply_positions(float (&x)[N / 2], const Shared& s, int tile) {
  const Turn at(tile, ROPES);
  barrier_wait(s.rope_full(at.slot), at.parity);
  const u32 rope = descriptor_low(s.rope(at.slot));
  const u32 queries = descriptor_low(s.base + OFFSET_QUERIES + (QUERY_CHUNKS - 1) * QUERY_CHUNK);
  pin(x);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4; i++) wgmma_rope(x, descriptor(rope + 2 * i), descriptor(queries + 2 * i), 1);
  wgmma_commit();
}

constexpr int BLOCKS = L / 128;  // of 64 channels, of a warpgroup that adds outputs
DEVICE void pin(u32 (&x)[4]) { asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3])::"memory"); }

// [64 channels of a block, N rows]
struct Sums {
  float sum[BLOCKS][N / 2];
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < N / 2 * BLOCKS; i++) sum[i / (N / 2)][i % (N / 2)] = 0.0f;
  }
  DEVICE void rescale(u32 from, const Thread& me) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float2 by = read<float2>(from + (8 * j + 2 * me.t) * 4);
#pragma unroll
      for (int i = 0; i < 4 * BLOCKS; i++) sum[i / 4][4 * j + i % 4] *= i % 2 ? by.y : by.x;
    }
  }
};

#if FORMAT == 1
#include "rows_e4m3.cuh"
#else
#include "rows_int4.cuh"
#endif
