// 16-bit latents as both operands of rows.cu's products. Half of the queries stay in registers, so that shared memory
// holds two and a half tiles of tokens.

constexpr int OFFSET_STAGED = LATE * HALF;

// Queries as they are, in chunks as latents have them; the position's where weights will be.
DEVICE void stage_queries(const Params& p, const Work& work, u32 base) {
  constexpr int PIECES = (L + ROPE) / 8;
#pragma unroll 6
  for (int i = threadIdx.x; i < 64 * PIECES; i += THREADS) {
    const int n = i / PIECES, piece = i % PIECES, row = work.first_row + n;
    const int head = row % p.heads, query = row / p.heads;
    const i64 latent = work.batch * p.ql_batch + query * p.ql_token + head * p.ql_head + piece * 8;
    const i64 rope = work.batch * p.qr_batch + query * p.qr_token + head * p.qr_head + piece * 8 - L;
    const char* from = piece < L / 8 ? p.q_latent + 2 * latent : p.q_rope + 2 * rope;
    const int chunk = piece / 8, shared = chunk - KEPT_CHUNKS;
    const int place = shared >= 0 ? OFFSET_QUERIES + shared * CHUNK : OFFSET_STAGED + chunk * CHUNK;
    const u32 to = base + (piece < L / 8 ? place : OFFSET_P);
    write(to + swizzled(n, piece % 8 * 16), row < p.rows ? load_piece(from) : uint4{0, 0, 0, 0});
  }
}
DEVICE void load_matrix_x4(u32 (&r)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

constexpr int LATENT_STEPS = 4 * KEPT_CHUNKS, ROPE_STEPS = 4;  // of 16 channels

// The operands of the scores that stay in registers.
struct Queries {
  u32 latent[LATENT_STEPS][4], rope[ROPE_STEPS][4];
  DEVICE void load(const Params& p, const Work& work, const Shared& s, const Thread& me) {
    const int row = 16 * me.warp + me.lane % 16, right = me.lane / 16 * 16;
#pragma unroll
    for (int i = 0; i < LATENT_STEPS; i++)
      load_matrix_x4(latent[i], s.base + OFFSET_STAGED + i / 4 * CHUNK + swizzled(row, i % 4 * 32 + right));
#pragma unroll
    for (int i = 0; i < ROPE_STEPS; i++) load_matrix_x4(rope[i], s.base + OFFSET_P + swizzled(row, i * 32 + right));
    async_proxy_fence();
    group_sync(me);
    if (me.index == 0) fetch_halves(p, work, s, LATE, HALVES);
  }
};

DEVICE void multiply_latents(float (&x)[32], const Queries& q, const Shared& s, int tile) {
  const u32 a = descriptor_low(s.base + OFFSET_QUERIES);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const Turn at(2 * tile + half, HALVES);
    barrier_wait(s.half_full(at.slot), at.parity);
    const u32 b = descriptor_low(s.half(at.slot));
#pragma unroll
    for (int i = 0; i < 4 * HALF_CHUNKS; i++) {
      const u64 tokens = descriptor(b + i / 4 * (CHUNK / 16) + 2 * (i % 4));
      const int step = half * 4 * HALF_CHUNKS + i, shared = step - LATENT_STEPS;
      if (shared < 0)
        wgmma_kept(x, q.latent[shared < 0 ? step : 0], tokens, step > 0);
      else
        wgmma_shared(x, descriptor(a + shared / 4 * (CHUNK / 16) + 2 * (shared % 4)), tokens, 1);
    }
  }
}

// Scores of the tile, in powers of two.
DEVICE void compute_scores(float (&x)[32], const Queries& q, const Shared& s, const Thread&, const float (&factor)[2],
                           int tile, u32) {
  pin(x);
  wgmma_fence();
  multiply_latents(x, q, s, tile);
  const Turn at(tile, ROPES);
  barrier_wait(s.rope_full(at.slot), at.parity);
  const u32 b = descriptor_low(s.rope(at.slot));
#pragma unroll
  for (int i = 0; i < ROPE_STEPS; i++) wgmma_kept(x, q.rope[i], descriptor(b + 2 * i), 1);
  wgmma_commit();
  wgmma_wait<0>();
  pin(x);
#pragma unroll
  for (int i = 0; i < 32; i++) x[i] *= factor[i / 2 % 2];
}

DEVICE void write_weights(Softmax& softmax, float (&x)[32], const Shared& s, int slot, u32, const Thread& me) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 16 * me.warp + me.lane % 16, piece = 2 * i + me.lane / 16;
    const float* y = x + 8 * i;
    store_matrix_x4(s.weights(slot) + swizzled(row, piece * 16), pack<KEPT>(y[0], y[1]), pack<KEPT>(y[2], y[3]),
                    pack<KEPT>(y[4], y[5]), pack<KEPT>(y[6], y[7]));
  }
  float sum[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
  for (int i = 4; i < 32; i++) sum[i % 4] += x[i];
  softmax.total[0] += sum[0] + sum[1];
  softmax.total[1] += sum[2] + sum[3];
}
constexpr int OUT = L / 4;  // sums of a thread

struct Outputs {
  float sum[OUT];
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < OUT; i++) sum[i] = 0.0f;
  }
  DEVICE void rescale(u32 from, const Thread& me) {
    const u32 at = from + (16 * me.warp + me.g) * 4;
    const float a = read<float>(at), b = read<float>(at + 32);
    if (!__any_sync(~0u, a != 1.0f || b != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < OUT; i++) sum[i] *= i / 2 % 2 ? b : a;
  }
  DEVICE void add(u32 weights, u32 half, const Thread&) {
    const u32 a = descriptor_low(weights), b = descriptor_turned(half);
    pin(sum);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_outputs(sum, descriptor(a + 2 * i), descriptor(b + 128 * i), 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(sum);
  }
  // Chunks of 64 channels lie CHUNK bytes apart.
  static DEVICE u32 descriptor_turned(u32 address) { return (CHUNK / 16) << 16 | (address & 0x3FFFF) >> 4; }

  template <int KIND>
  DEVICE void store(char* to, const Params& p, const Work& work, const Shared& s, const Thread& me, i64 first) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int n = 16 * me.warp + me.g + 8 * r, row = work.first_row + n;
      if (row >= p.rows) continue;
      const float by = read<float>(s.base + OFFSET_TOTAL + 4 * n);
      const i64 at = (first + row) * L + (me.group - 1) * (L / 2) + 2 * me.t;
#pragma unroll
      for (int j = 0; j < OUT / 4; j++) {
        const float a = sum[4 * j + 2 * r] * by, b = sum[4 * j + 2 * r + 1] * by;
        if (KIND == 0) *reinterpret_cast<float2*>(to + 4 * (at + 8 * j)) = {a, b};
        if (KIND != 0) *reinterpret_cast<u32*>(to + 2 * (at + 8 * j)) = pack<KIND>(a, b);
      }
    }
  }
};
