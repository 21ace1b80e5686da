// Queries, scores and weights of a tile, transposed: tokens are rows, queries columns.

// Rows of this warpgroup's latents that hold nothing become zeros: NaN times a weight of 0 would be NaN.
DEVICE void clear_hidden(const Work& work, const Shared& s, const Thread& me, Place at, int position) {
  at.advance(1 + me.part * MINE);
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.full_parity());
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
  barrier_wait(s.full(at), at.full_parity());
  const u32 a = descriptor_low(s.chunk(at)), b = descriptor_low(s.base + L / 64 * Q_CHUNK);
  pin(x);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < 4 / SHARE; i++) {
    const int step = 2 * (me.part * (4 / SHARE) + i);
    wgmma_kept(x, descriptor(a + step), descriptor(b + step), i > 0);
  }
  wgmma_commit();
}

// Adds the product with this warpgroup's channels: 16-bit operands in shared memory.
#if FORMAT == 0
DEVICE void score_latents(float (&x)[N / 2], const Shared& s, const Thread& me, Place at, const float (&inverse)[2]) {
  const Place rope = at;
  at.advance(1 + me.part * MINE);
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.full_parity());
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
#elif FORMAT == 3
// The same with nibbles as 8-bit numbers, exactly: queries are two digits, to the base of 128.
DEVICE void score_latents(float (&x)[N / 2], const Shared& s, const Thread& me, Place at, const float (&inverse)[2]) {
  constexpr int BATCH = N > 16 ? 2 : 4;
  const Place rope = at;
  u32 fragments[2][BATCH][4];
  int digits[N];
  at.advance(1 + me.part * MINE);
  const int row = 16 * me.warp + me.g;
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    barrier_wait(s.full(at), at.full_parity());
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
    for (int step = 0; step < 8; step += BATCH) {
      auto& a = fragments[step / BATCH % 2];
      wgmma_wait<1>();
#pragma unroll
      for (int i = 0; i < BATCH; i++) pin(a[i]);
#pragma unroll
      for (int i = 0; i < BATCH; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          a[i][r] = words[r][step + i] & 0x0F0F0F0Fu;
          a[i][2 + r] = words[r][step + i] >> 4 & 0x0F0F0F0Fu;
        }
#pragma unroll
      for (int i = 0; i < BATCH; i++) pin(a[i]);
      pin(digits);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        wgmma_codes(digits, a[i], descriptor(b + (step + i) / 4 * (2 * Q_CHUNK / 16) + 2 * ((step + i) % 4)),
                    c + step + i > 0);
      wgmma_commit();
    }
    at.advance(1);
  }
  wgmma_wait<0>();
  pin(digits);
  pin(x);
  release(me, s.empty(rope), 1);
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    const float2 base = read<float2>(s.base + OFFSET_BASE + 4 * (8 * j + 2 * me.t));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float start = fmaf(x[4 * j + i], inverse[i / 2], me.part != 0 ? 0.0f : i % 2 ? -base.y : -base.x);
      x[4 * j + i] = fmaf(static_cast<float>(128 * digits[4 * j + i] + digits[N / 2 + 4 * j + i]), 1.0f / 32.0f, start);
    }
  }
}
#elif FORMAT == 1 || FORMAT == 2
// The same with codes where they lie: 8-bit MMA, queries are two numbers, of which wide tiles take one at a time.
#if FORMAT == 1
using Sum = float;
#else
using Sum = int;
#endif
DEVICE void score_latents(float (&x)[N / 2], const Shared& s, const Thread& me, Place at, const float (&inverse)[2]) {
  constexpr int WIDTH = N > 32 ? N : 2 * N, PASSES = 2 * N / WIDTH;
  const Place rope = at;
  at.advance(1 + me.part * MINE);
#pragma unroll
  for (int pass = 0; pass < PASSES; pass++) {
    Sum parts[WIDTH / 2];
    Place from = at;
    pin(parts);
#pragma unroll
    for (int c = 0; c < MINE; c++) {
      if (pass == 0) barrier_wait(s.full(from), from.full_parity());
      const u32 a = descriptor_low(s.chunk(from));
      const u32 b = descriptor_low(s.base + (me.part * MINE + c) * 2 * Q_CHUNK + pass * N * 128);
      if (c == 0) wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; i++) wgmma_codes(parts, descriptor(a + 2 * i), descriptor(b + 2 * i), c + i > 0);
      from.advance(1);
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(parts);
    if (pass == 0) {
      pin(x);
      release(me, s.empty(rope), 1);
    }
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float start = pass == 0 ? x[i] * inverse[i / 2 % 2] : x[i];
      if (FORMAT == 1)
        x[i] = start + (PASSES == 1 ? parts[i] + parts[WIDTH / 2 - N / 2 + i] : parts[i]);
      else if (PASSES == 1)
        x[i] = fmaf(static_cast<float>(128 * parts[i] + parts[WIDTH / 2 - N / 2 + i]), 1.0f / 64.0f, start);
      else
        x[i] = fmaf(static_cast<float>(parts[i]), pass == 0 ? 2.0f : 1.0f / 64.0f, start);
    }
  }
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
      if (!NARROW) sum += FORMAT == 0 ? weight : weight * inverse[r];
    }
    if (!NARROW) sums.total[j] = sums.total[j] * rescale[j] + sum;
    if (SHARE == 2 && me.g == 0 && me.warp == 0)
      write(s.base + OFFSET_RESCALE + (me.team * N + column_of(me, j)) * 4, rescale[j]);
  }
  constexpr int KIND = FORMAT == 0 ? KEPT : 2;
  const u32 to = s.base + OFFSET_P + me.team * N * 128;
#if NARROW
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const int n = 8 * (me.part * GROUPS + j) + me.lane % 8;
    const u32 row = to + n * 128;
    const u16 first = e4m3_pair(x[4 * j], x[4 * j + 2]), second = e4m3_pair(x[4 * j + 1], x[4 * j + 3]);
    const float2 a = e4m3_floats(first), b = e4m3_floats(second);
    sums.total[2 * j] = sums.total[2 * j] * rescale[2 * j] + (a.x * inverse[0] + a.y * inverse[1]);
    sums.total[2 * j + 1] = sums.total[2 * j + 1] * rescale[2 * j + 1] + (b.x * inverse[0] + b.y * inverse[1]);
    if (NIBBLES) {
      sums.mass[2 * j] = sums.mass[2 * j] * rescale[2 * j] + (a.x + a.y);
      sums.mass[2 * j + 1] = sums.mass[2 * j + 1] * rescale[2 * j + 1] + (b.x + b.y);
    }
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(row + (me.warp ^ n % 8) * 16),
                 "r"(first | static_cast<u32>(second) << 16) : "memory");
  }
#else
#pragma unroll
  for (int j = 0; j < GROUPS; j++) {
    const int n = 8 * (me.part * GROUPS + j) + me.lane % 8, block = 2 * me.warp + me.lane / 8 % 2;
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to + n * 128 + (block ^ n % 8) * 16),
                 "r"(pack<KIND>(x[4 * j], x[4 * j + 1])), "r"(pack<KIND>(x[4 * j + 2], x[4 * j + 3])) : "memory");
  }
#endif
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
