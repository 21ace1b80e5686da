// Queries, scores and weights of a tile, transposed: tokens are rows, queries columns.

// Writes x to shared memory in 16 bits, and returns what it has become.
template <int KIND>
DEVICE float write_half(u32 to, float x) {
  const u16 bits = static_cast<u16>(pack<KIND>(x, 0.0f));
  write(to, bits);
  return KIND == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
}

// Where channel k of 64 of row n lies.
DEVICE u32 swizzled(int n, int k) { return n * 128 + ((k / 8 ^ n % 8) * 16) + k % 8 * 2; }

// Rows of queries as columns of both halves of the scores, the largest of a row near 128 by a power of two.
DEVICE void load_queries(const Params& p, const Work& work, u32 base, int thread) {
  const int lane = thread % 32;
  for (int n = thread / 32; n < N; n += CONSUMERS / 32) {
    const int row = work.first_row + n, head = row % p.heads, query = row / p.heads;
    const i64 latent_at = work.batch * p.ql_batch + query * p.ql_token + head * p.ql_head + lane;
    const i64 rope_at = work.batch * p.qr_batch + query * p.qr_token + head * p.qr_head + lane;
    float x[L / 32], turned[ROPE / 32], most = 0.0f;
#pragma unroll
    for (int i = 0; i < L / 32; i++) x[i] = row < p.rows ? load_float<QUERY>(p.q_latent, latent_at + 32 * i) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2; i++) turned[i] = row < p.rows ? load_float<QUERY>(p.q_rope, rope_at + 32 * i) : 0.0f;
#pragma unroll
    for (int i = 0; i < L / 32; i++) most = fmaxf(most, fabsf(x[i]));
    most = fmaxf(most, fmaxf(fabsf(turned[0]), fabsf(turned[1])));
#pragma unroll
    for (int i = 1; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
    const u32 exponent = max(__float_as_uint(most) >> 23, 27u);  // 2^(6 - e) times 2^e..2^(e+1)
    const float raised = __uint_as_float((260 - exponent) << 23);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < L / 32; i++) {
      const int channel = lane + 32 * i;
      int step, element;
      scores_place(channel, step, element);
      const u32 to = base + step / 4 * Q_CHUNK + swizzled(n, step % 4 * 16 + element);
      const float kept = write_half<FORMAT == 0 ? KEPT : 2>(to, x[i] * raised / scores_unit(channel));
      sum += kept * scores_base(channel);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
      write_half<KEPT>(base + L / 64 * Q_CHUNK + swizzled(n, lane + 32 * i), turned[i] * raised);
#pragma unroll
    for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane == 0) {
      write(base + OFFSET_FACTOR + 4 * n, p.factor / raised);
      write(base + OFFSET_BASE + 4 * n, sum);
      write(base + OFFSET_PLACE + 4 * n, static_cast<float>(work.length - p.sq + min(query, p.sq - 1)));
    }
  }
}

// Rows of this warpgroup's latents that hold nothing become zeros: NaN times a weight of 0 would be NaN.
DEVICE void clear_hidden(const Work& work, const Shared& s, const Thread& me, Place at, int position) {
  at.advance(1 + me.part * MINE);
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.parity);
    const int row = me.index / 2, token = position + row;
    if (token < work.low || token >= work.length)
      for (int i = 0; i < 4; i++) write_zeros(s.chunk(at) + row * 128 + me.index % 2 * 64 + i * 16);
    at.advance(1);
  }
  async_proxy_fence();
  group_sync(me);
}

// Scores of the position, and the inverse scales of tokens make them a start for those of latents.
DEVICE void score_positions(float (&x)[N / 2], const Shared& s, const Thread& me, Place at, const float (&inverse)[2]) {
  barrier_wait(s.full(at), at.parity);
  const u32 a = descriptor_low(s.chunk(at)), b = descriptor_low(s.base + L / 64 * Q_CHUNK);
  pin(x);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4 / SHARE; i++) {
    const int step = 2 * (me.part * (4 / SHARE) + i);
    wgmma_kept(x, descriptor(a + step), descriptor(b + step), i > 0);
  }
  wgmma_commit();
  if (FORMAT == 0) return;
  wgmma_wait<0>();
  pin(x);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const float2 base = FORMAT == 1 ? float2{0.0f, 0.0f} : read<float2>(s.base + OFFSET_BASE + 4 * (8 * j + 2 * me.t));
    const float first = me.part == 0 ? base.x : 0.0f, second = me.part == 0 ? base.y : 0.0f;
    x[4 * j] = x[4 * j] * inverse[0] - first;
    x[4 * j + 1] = x[4 * j + 1] * inverse[0] - second;
    x[4 * j + 2] = x[4 * j + 2] * inverse[1] - first;
    x[4 * j + 3] = x[4 * j + 3] * inverse[1] - second;
  }
  release(me, s.empty(at), 1);
}

// Adds the product with this warpgroup's channels: 16-bit operands in shared memory.
#if FORMAT == 0
DEVICE void score_latents(float (&x)[N / 2], const Shared& s, const Thread& me, Place at) {
  const Place rope = at;
  at.advance(1 + me.part * MINE);
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.parity);
    const u32 a = descriptor_low(s.chunk(at)), b = descriptor_low(s.base + (me.part * MINE + c) * Q_CHUNK);
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_kept(x, descriptor(a + 2 * i), descriptor(b + 2 * i), 1);
    wgmma_commit();
    at.advance(1);
  }
  wgmma_wait<0>();
  pin(x);
  release(me, s.empty(rope), 1);
}
#else
// The same with codes, which become fragments, a few k-steps at a time.
DEVICE void score_latents(float (&x)[N / 2], const Shared& s, const Thread& me, Place at) {
  constexpr int BATCH = N > 32 ? 2 : 4;
  u32 fragments[2][BATCH][4];
  at.advance(1 + me.part * MINE);
  const int row = 16 * me.warp + me.g;
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.parity);
    const u32 from = s.chunk(at) + row * 128;
    u32 words[2][8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint4 w = read<uint4>(from + i / 2 * 1024 + ((2 * me.t + i % 2) ^ me.g) * 16);
      words[i / 2][i % 2 * 4] = w.x, words[i / 2][i % 2 * 4 + 1] = w.y;
      words[i / 2][i % 2 * 4 + 2] = w.z, words[i / 2][i % 2 * 4 + 3] = w.w;
    }
    const u32 b = descriptor_low(s.base + (me.part * MINE + c) * CHUNK_BLOCKS * Q_CHUNK);
#pragma unroll
    for (int step = 0; step < STEPS; step += BATCH) {
      auto& a = fragments[step / BATCH % 2];
      wgmma_wait<1>();
      pin(a);
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        scores_operand(a[i], words[0], 0, step + i);
        scores_operand(a[i], words[1], 1, step + i);
      }
      pin(a);
      pin(x);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        wgmma_codes(x, a[i], descriptor(b + (step + i) / 4 * (Q_CHUNK / 16) + 2 * ((step + i) % 4)), 1);
      wgmma_commit();
    }
    at.advance(1);
  }
  wgmma_wait<0>();
  pin(x);
}
#endif

// Half of the columns of both warpgroups' parts of the scores, added.
DEVICE void exchange(float (&mine)[4 * GROUPS], const float (&x)[N / 2], const Shared& s, const Thread& me) {
  if constexpr (SHARE == 1) {
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; i++) mine[i] = x[i];
  } else {
    const u32 parts = s.base + OFFSET_PARTS + me.team * PARTS + me.index * 16;
    const int second = 4 * GROUPS;
    const bool low = me.part == 0;
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      float give[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        give[i] = low ? x[second + 4 * j + i] : x[4 * j + i];
        mine[4 * j + i] = low ? x[4 * j + i] : x[second + 4 * j + i];
      }
      write(parts + (me.part * GROUPS + j) * 2048, give[0], give[1], give[2], give[3]);
    }
    team_sync(me);
#pragma unroll
    for (int j = 0; j < GROUPS; j++) {
      const float4 got = read<float4>(parts + ((1 - me.part) * GROUPS + j) * 2048);
      mine[4 * j] += got.x, mine[4 * j + 1] += got.y, mine[4 * j + 2] += got.z, mine[4 * j + 3] += got.w;
    }
  }
}

// The largest of each column over all tokens of the tile.
DEVICE void column_largest(float (&top)[2 * GROUPS], const float (&x)[4 * GROUPS], const Shared& s, const Thread& me) {
  const u32 to = s.base + OFFSET_TOP + (me.team * SHARE + me.part) * 4 * (8 * GROUPS) * 4;
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    float m = fmaxf(x[j / 2 * 4 + j % 2], x[j / 2 * 4 + j % 2 + 2]);
#pragma unroll
    for (int i = 4; i < 32; i *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
    if (me.g == 0) write(to + (me.warp * 8 * GROUPS + j / 2 * 8 + 2 * me.t + j % 2) * 4, m);
  }
  group_sync(me);
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    float2 m = {-INFINITE, -INFINITE};
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float2 other = read<float2>(to + (w * 8 * GROUPS + 8 * j + 2 * me.t) * 4);
      m.x = fmaxf(m.x, other.x), m.y = fmaxf(m.y, other.y);
    }
    top[2 * j] = m.x, top[2 * j + 1] = m.y;
  }
}

// Column (of the tile's N) of this thread's softmax.
DEVICE int column_of(const Thread& me, int j) { return 8 * (me.part * GROUPS + j / 2) + 2 * me.t + j % 2; }

// Powers of two of scores go to shared memory as the second product's operand [rows, tokens]; outputs are rescaled.
DEVICE void softmax(Sums& sums, float (&x)[4 * GROUPS], const Shared& s, const Thread& me, const float (&scale)[2],
                    const float (&inverse)[2]) {
  float top[2 * GROUPS], rescale[2 * GROUPS];
  column_largest(top, x, s, me);
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    const float grown = fmaxf(sums.largest[j], top[j]), reference = grown == -INFINITE ? 0.0f : grown;
    rescale[j] = exp2_(sums.largest[j] - reference);
    sums.largest[j] = grown;
    float sum = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float& weight = x[j / 2 * 4 + j % 2 + 2 * r];
      weight = exp2_(weight - (reference - LOG2_WEIGHT));
      sum += FORMAT == 0 ? weight : weight * inverse[r];
    }
    sums.total[j] = sums.total[j] * rescale[j] + sum;
    if (SHARE == 2 && me.g == 0 && me.warp == 0)
      write(s.base + OFFSET_RESCALE + (me.team * N + column_of(me, j)) * 4, rescale[j]);
  }
  constexpr int KIND = FORMAT == 0 ? KEPT : 2;
  const u32 to = s.base + OFFSET_P + me.team * N * 128;
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const int n = 8 * (me.part * GROUPS + j) + me.lane % 8, block = 2 * me.warp + me.lane / 8 % 2;
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to + n * 128 + (block ^ n % 8) * 16),
                 "r"(pack<KIND>(x[4 * j], x[4 * j + 1])), "r"(pack<KIND>(x[4 * j + 2], x[4 * j + 3])) : "memory");
  }
  async_proxy_fence();
  team_sync(me);
  bool changed = false;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    float2 by = {rescale[SHARE == 1 ? 2 * j : 0], rescale[SHARE == 1 ? 2 * j + 1 : 0]};
    if (SHARE == 2) by = read<float2>(s.base + OFFSET_RESCALE + (me.team * N + 8 * j + 2 * me.t) * 4);
    changed = by.x != 1.0f || by.y != 1.0f;
    if (!__any_sync(~0u, changed)) continue;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      float(&out)[N / 2] = sums.out[block];
      out[4 * j] *= by.x, out[4 * j + 1] *= by.y, out[4 * j + 2] *= by.x, out[4 * j + 3] *= by.y;
    }
  }
}
