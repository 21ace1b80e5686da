// 16-bit latents as both operands of rows.cu's products, tokens on M and then rows on M.

DEVICE void copy_piece(u32 to, const char* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Queries as they are, in chunks as latents have them, the position's last.
DEVICE void stage_queries(const Params& p, const Work& work, u32 base) {
  const int lane = threadIdx.x % 32;
  const u32 queries = base + OFFSET_QUERIES;
#pragma unroll 1
  for (int n = threadIdx.x / 32 - 1; n < 64; n += STAGERS) {
    const Row row(p, work, n);
    const u32 to = queries + lane / 8 * CHUNK + swizzled(n, lane % 8 * 16);
    const char* from = row.there ? row.latent + 16 * lane : p.q_latent;
#pragma unroll
    for (int i = 0; i < L / 256; i++) copy_piece(to + i * (4 * CHUNK), from + 512 * i, row.there);
    if (lane < 8) copy_piece(to + CHUNKS * CHUNK, row.there ? row.rope + 16 * lane : p.q_rope, row.there);
    if (lane == 0) write_row(base, n, row.last, p.factor);
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

constexpr int STEPS = 4 * CHUNKS + 4;  // of 16 channels, positions last

struct Scores {
  float sums[32];
  // Products of some steps of a tile, which is waited for if it is `there`.
  template <int first, int last>
  DEVICE void multiply(const Shared& s, const Thread&, int tile, bool there) {
    constexpr int HALF_STEPS = 4 * HALF_CHUNKS;
    const u32 queries = descriptor_low(s.base + OFFSET_QUERIES);
    if (first == 0) pin(sums);
    wgmma_fence();
#pragma unroll
    for (int step = first; step < last; step++) {
      const bool latent = step < 2 * HALF_STEPS;
      const Turn at(latent ? 2 * tile + step / HALF_STEPS : tile, latent ? HALVES : ROPES);
      const int i = step % HALF_STEPS;
      if (i == 0 && there) barrier_wait(latent ? s.half_full(at.slot) : s.rope_full(at.slot), at.parity);
      const u32 from = descriptor_low(latent ? s.half(at.slot) : s.rope(at.slot)) + i / 4 * (CHUNK / 16) + 2 * (i % 4);
      wgmma_scores(sums, descriptor(from), descriptor(queries + step / 4 * (CHUNK / 16) + 2 * (step % 4)), step > 0);
    }
    wgmma_commit();
  }
  // In units of the factor.
  DEVICE void take(float (&x)[32], const Tokens&, const Shared&, const Thread&, int) {
    drop();
#pragma unroll
    for (int i = 0; i < 32; i++) x[i] = sums[i];
    pin(x);
    pin(sums);
  }
  DEVICE void wait_for_positions(float (&)[32]) {}
  DEVICE void drop() {
    wgmma_wait<0>();
    pin(sums);
  }
};

struct Weights {
  u32 pairs[16];
  template <int first, int last>
  DEVICE void make(Softmax& softmax, float (&x)[32], const Tokens&) {
#pragma unroll
    for (int i = 4 * first; i < 4 * last; i++) x[i] = exp2_(x[i]);
#pragma unroll
    for (int i = 2 * first; i < 2 * last; i++) {
      softmax.total[i] += x[i / 2 * 4 + i % 2] + x[i / 2 * 4 + i % 2 + 2];
      pairs[i] = pack<KEPT>(x[2 * i], x[2 * i + 1]);
    }
  }
  DEVICE void store(const Shared& s, int slot, const Thread& me) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const int row = 8 * (j + me.lane / 16) + me.lane % 8, piece = 2 * me.warp + me.lane / 8 % 2;
      store_matrix_x4_transposed(s.weights(slot) + swizzled(row, 16 * piece), pairs[2 * j], pairs[2 * j + 1],
                                 pairs[2 * j + 2], pairs[2 * j + 3]);
    }
  }
};

constexpr int OUT = L / 4;  // sums of a thread

struct Outputs {
  float sum[2][OUT / 2];  // of both halves of the channels
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < OUT; i++) sum[i / (OUT / 2)][i % (OUT / 2)] = 0.0f;
  }
  DEVICE void rescale(u32 from, const Thread& me) {
    const u32 at = from + (16 * me.warp + me.g) * 4;
    const float a = read<float>(at), b = read<float>(at + 32);
#pragma unroll
    for (int i = 0; i < OUT; i++) sum[i / (OUT / 2)][i % (OUT / 2)] *= i / 2 % 2 ? b : a;
  }
  DEVICE void add(u32 weights, u32 half, const Thread&) {
    const u32 a = descriptor_low(weights), b = descriptor_turned(half);
    pin(sum[0]);
    pin(sum[1]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int c = 0; c < 2; c++)
        wgmma_outputs(sum[c], descriptor(a + 2 * i), descriptor(b + 128 * i + c * (HALF / 32)), 1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(sum[0]);
    pin(sum[1]);
  }
  // Chunks of 64 channels lie CHUNK bytes apart.
  static DEVICE u32 descriptor_turned(u32 address) { return (CHUNK / 16) << 16 | (address & 0x3FFFF) >> 4; }

  // Averages of rows from the `first`th on, through the ring, which nobody reads any more: whole lines then.
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 first) const {
    constexpr int PIECES = L / 16, LINE = L;  // of 16 bytes of a row's half, and bytes of them
    const u32 from = s.half(me.half()) + 16 * me.warp * LINE, total = s.base + OFFSET_TOTAL + 64 * me.warp;
    const float by[2] = {read<float>(total + 4 * me.g), read<float>(total + 4 * me.g + 32)};
    const auto at = [&](int row, int piece) { return from + row * LINE + (piece ^ row % 8) * 16; };
#pragma unroll
    for (int j = 0; j < OUT / 4; j += 2) {
      const float* x = sum[4 * j / (OUT / 2)] + 4 * j % (OUT / 2);
      store_matrix_x4(at(me.lane % 16, j + me.lane / 16), pack<QUERY>(x[0] * by[0], x[1] * by[0]),
                      pack<QUERY>(x[2] * by[1], x[3] * by[1]), pack<QUERY>(x[4] * by[0], x[5] * by[0]),
                      pack<QUERY>(x[6] * by[1], x[7] * by[1]));
    }
    __syncwarp();
#pragma unroll
    for (int i = me.lane; i < 16 * PIECES; i += 32) {
      const int row = i / PIECES, piece = i % PIECES, n = 16 * me.warp + row;
      if (work.first_row + n < p.rows)
        *reinterpret_cast<uint4*>(to + ((first + n) * L + me.half() * (L / 2)) * 2 + 16 * piece) =
            read<uint4>(at(row, piece));
    }
  }
};
