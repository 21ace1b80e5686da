// The second product, transposed (channels are rows, queries columns), and what is stored in the end.

// The channel of row g + 8 (i % 2) of block i / 2 of a warp's in a chunk. A block of codes has two bytes of 16, of INT4
// low and high nibbles of one.
constexpr int CODES = 2 * CHUNK_BLOCKS;
DEVICE int output_channel(int chunk, int warp, int g, int i) {
  if (FORMAT == 0) return 64 * chunk + 16 * warp + g + 8 * i;
  const int byte = 128 * chunk + 32 * warp + 2 * g;
  return NIBBLES ? byte + i / 4 * 16 + i / 2 % 2 + i % 2 * (L / 2) : byte + i / 2 * 16 + i % 2;
}

DEVICE void pin(Sums& sums) {
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) pin(sums.out[block]);
}

#if FORMAT == 0
DEVICE void add_outputs(Sums& sums, const Params& p, const Shared& s, const Thread& me, Place at) {
  const u32 b = descriptor_low(s.base + OFFSET_P + me.team * N * 128);
  at.advance(1 + me.part * MINE);
  Place before = at;
  pin(sums);
  wgmma_fence();
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    const u32 a = descriptor_low(s.chunk(at));
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma_turned(sums.out[c], descriptor(a + 128 * i), descriptor(b + 2 * i), 1);
    wgmma_commit();
    at.advance(1);
    if (c == 0) continue;
    wgmma_wait<1>();
    release(me, s.empty(before), SHARE);
    before.advance(1);
  }
  wgmma_wait<0>();
  pin(sums);
  release(me, s.empty(before), SHARE);
}
#elif NARROW
// 8-bit operand of block k of a chunk, of 16 channels and 32 tokens. A nibble as a byte is an E4M3 number, 2^-9 of it.
DEVICE void block_operand(u32 (&a)[4], const u32 (&byte)[4], int k) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = NIBBLES ? byte[i / 2 * 2 + k % 2] >> 4 * (i % 2) & 0x0F0F0F0Fu : byte[i];
}

// Matrix units add 8-bit products with 13 bits or so: a tile's are added to float32 sums.
DEVICE void add_outputs(Sums& sums, const Params& p, const Shared& s, const Thread& me, Place at) {
  constexpr int BATCH = N > 24 ? 2 : CHUNK_BLOCKS, BATCHES = CHUNK_BLOCKS / BATCH;
  constexpr int SHARERS = NIBBLES ? 2 : 1, PIECES = BATCH / SHARERS;  // blocks of 16 bytes;  such pieces of a batch
  const u32 b = descriptor_low(s.base + OFFSET_P + me.team * N * 128);
  at.advance(1 + me.part * MINE);
  u32 fragments[2][BATCH][4];
  float fresh[BATCH][N / 2];
  const u32 token = me.lane * 128 + (2 * me.warp ^ me.lane % 8) * 16;
#pragma unroll
  for (int batch = 0; batch <= MINE * BATCHES; batch++) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const bool more = batch < MINE * BATCHES;
      auto& a = fragments[step];
      u32 bytes[PIECES][4];
      if (more) {
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          turn(bytes[i], s.chunk(at) + step * 4096 + (token ^ 16 * (batch % BATCHES * PIECES + i)));
        if (batch % BATCHES == BATCHES - 1 && step == 1)
          release_read(p, me, s.empty(at), SHARE, bytes[0][3] ^ bytes[PIECES - 1][3]);
      }
      if (batch > 0 && step == 0) {
        wgmma_wait<0>();
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
          pin(fresh[k]), pin(fragments[0][k]), pin(fragments[1][k]);
#pragma unroll
          for (int i = 0; i < N / 2; i++) sums.out[BATCH * (batch - 1) + k][i] += fresh[k][i];
        }
      }
      if (!more) continue;
#pragma unroll
      for (int k = 0; k < BATCH; k++) block_operand(a[k], bytes[k / SHARERS], k);
#pragma unroll
      for (int k = 0; k < BATCH; k++) pin(a[k]), pin(fresh[k]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BATCH; k++) wgmma_outputs(fresh[k], a[k], descriptor(b + 2 * step), step);
      wgmma_commit();
    }
    if (batch % BATCHES == BATCHES - 1) at.advance(1);
  }
}
#else
// INT8 codes of two bytes of two tokens become float16 numbers, exactly.
DEVICE void int8_operand(u32& even, u32& odd, u32 pairs) {
  const u32 x = pairs ^ 0x80808080u;
  even = minus(__byte_perm(x, 0x64646464u, 0x4240), 0x64806480u);
  odd = minus(__byte_perm(x, 0x64646464u, 0x4341), 0x64806480u);
}
DEVICE void add_outputs(Sums& sums, const Params& p, const Shared& s, const Thread& me, Place at) {
  const u32 b = descriptor_low(s.base + OFFSET_P + me.team * N * 128);
  constexpr int AHEAD = N > 32 ? 1 : 4;  // k-steps whose codes are read at once
  at.advance(1 + me.part * MINE);
  u32 fragments[2][2][4];
  // Of 16 tokens by two pieces of 16 bytes.
  const u32 token = me.lane % 16 * 128 + ((2 * me.warp + me.lane / 16) ^ me.lane % 8) * 16;
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    const u32 from = s.chunk(at) + token;
    u32 pairs[AHEAD][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i % AHEAD == 0) {
#pragma unroll
        for (int k = 0; k < AHEAD; k++) load_matrix_x4_transposed(pairs[k], from + (i + k) * 2048);
      }
      auto& a = fragments[i % 2];
      wgmma_wait<1>();
      pin(a[0]), pin(a[1]);
#pragma unroll
      for (int k = 0; k < 4; k++) int8_operand(a[k / 2][k % 2 * 2], a[k / 2][k % 2 * 2 + 1], pairs[i % AHEAD][k]);
      if (i == 3) release_read(p, me, s.empty(at), SHARE, a[0][0] ^ a[1][0]);
#pragma unroll
      for (int k = 0; k < 2; k++) pin(a[k]), pin(sums.out[2 * c + k]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; k++) wgmma_outputs(sums.out[2 * c + k], a[k], descriptor(b + 2 * i), 1);
      wgmma_commit();
    }
    at.advance(1);
  }
  wgmma_wait<0>();
  pin(sums);
}
#endif

// Totals over all tokens, and the largest of each column, to shared memory.
DEVICE void publish(Sums& sums, const Shared& s, const Thread& me) {
  const u32 to = s.base + OFFSET_TOP + (me.team * SHARE + me.part) * 4 * (8 * GROUPS) * 4;
  const u32 weights = s.base + OFFSET_P + me.team * N * 128 + me.part * 4 * (8 * GROUPS) * 4;
  group_sync(me);
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    float total = sums.total[j], mass = sums.mass[j];
#pragma unroll
    for (int i = 4; i < 32; i *= 2) {
      total += __shfl_xor_sync(~0u, total, i);
      if (NIBBLES) mass += __shfl_xor_sync(~0u, mass, i);
    }
    const int at = (me.warp * 8 * GROUPS + j / 2 * 8 + 2 * me.t + j % 2) * 4;
    if (me.g == 0) write(to + at, total);
    if (NIBBLES && me.g == 0) write(weights + at, mass);
  }
  group_sync(me);
  if (me.warp != 0 || me.g != 0) return;
#pragma unroll
  for (int j = 0; j < 2 * GROUPS; j++) {
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; w++) total += read<float>(to + (w * 8 * GROUPS + j / 2 * 8 + 2 * me.t + j % 2) * 4);
    const int at = 4 * (me.team * N + column_of(me, j));
    if (NIBBLES) {
      float mass = 0.0f;
#pragma unroll
      for (int w = 0; w < 4; w++) mass += read<float>(weights + (w * 8 * GROUPS + j / 2 * 8 + 2 * me.t + j % 2) * 4);
      write(s.base + OFFSET_MASS + at, mass);
    }
    write(s.base + OFFSET_LARGEST + at, sums.largest[j]);
    write(s.base + OFFSET_TOTAL + at, total * (1.0f / WEIGHT));
  }
}

// A column's outputs of this thread.
template <int KIND>
DEVICE void store_column(char* to, i64 row, const Sums& sums, const Thread& me, int j, int e, float by) {
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    float x[CODES];
#pragma unroll
    for (int i = 0; i < CODES; i++) x[i] = sums.out[c * CHUNK_BLOCKS + i / 2][4 * j + e + 2 * (i % 2)] * by;
    const int chunk = me.part * MINE + c;
    if constexpr (FORMAT == 0) {
#pragma unroll
      for (int i = 0; i < 2; i++) store_float<KIND>(to, row + output_channel(chunk, me.warp, me.g, i), x[i]);
    } else {
#pragma unroll
      for (int i = 0; i < CODES / 2; i++) {
        constexpr int NEXT = CODES / 4;  // of INT4 low and high nibbles alternate
        const int low = i / NEXT * 2 * NEXT + i % NEXT;
        store_two<KIND>(to, row + output_channel(chunk, me.warp, me.g, low), x[low], x[low + NEXT]);
      }
    }
  }
}

// Column q of this thread: result and log-sum-exp, or a part of them for whoever merges.
DEVICE void store(const Params& p, const Work& work, const Sums& sums, const Thread& me, int q, float top,
                  float whole) {
  const int row = work.first_row + q / 2 * 8 + 2 * me.t + q % 2;
  if (row >= p.rows) return;
  const bool some = whole > 0.0f, teller = me.part == 0 && me.warp == 0 && me.g == 0;
  if (p.splits == 1) {
    const i64 at = static_cast<i64>(work.batch) * p.rows + row;
    store_column<QUERY>(p.out, at * L, sums, me, q / 2, q % 2, some ? 1.0f / (WEIGHT * whole) : 0.0f);
    if (teller) p.lse[lse_of(p, work.batch, row)] = some ? (top + log2_(whole)) / LOG2E : -INFINITE;
  } else {
    const i64 at = (static_cast<i64>(work.split) * p.batches + work.batch) * p.rows + row;
    store_column<0>(reinterpret_cast<char*>(p.part), at * L, sums, me, q / 2, q % 2, 1.0f / WEIGHT);
    if (teller) p.sums[2 * at] = top, p.sums[2 * at + 1] = whole;
  }
}

// Largest score and total of all teams for each column of this thread; its sums become relative to that score.
DEVICE void weigh_teams(float (&top)[N / 4], float (&whole)[N / 4], Sums& sums, const Shared& s, const Thread& me) {
#pragma unroll
  for (int q = 0; q < N / 4; q++) {
    const u32 at = s.base + 4 * (q / 2 * 8 + 2 * me.t + q % 2);
    top[q] = -INFINITE, whole[q] = 0.0f;
#pragma unroll
    for (int team = 0; team < TEAMS; team++) top[q] = fmaxf(top[q], read<float>(at + OFFSET_LARGEST + team * N * 4));
    const float reference = top[q] == -INFINITE ? 0.0f : top[q];
    float mine = 1.0f;
#pragma unroll
    for (int team = 0; team < TEAMS; team++) {
      const float share = exp2_(read<float>(at + OFFSET_LARGEST + team * N * 4) - reference);
      whole[q] += share * read<float>(at + OFFSET_TOTAL + team * N * 4);
      if (team == me.team) mine = share;
    }
    if (NIBBLES) {
      const float mass = 15.0f * read<float>(at + OFFSET_MASS + me.team * N * 4);
#pragma unroll
      for (int block = 0; block < BLOCKS; block++) {
        float(&out)[N / 2] = sums.out[block];
        const int i = q / 2 * 4 + q % 2;
        out[i] = fmaf(out[i], 1024.0f, -mass), out[i + 2] = fmaf(out[i + 2], 1024.0f, -mass);
      }
    }
    if (TEAMS == 1) continue;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++)
      sums.out[block][q / 2 * 4 + q % 2] *= mine, sums.out[block][q / 2 * 4 + q % 2 + 2] *= mine;
  }
}

// The sums of all teams meet: team q % TEAMS adds and stores column q, the others leave theirs in the ring.
DEVICE void finish(Sums& sums, const Params& p, const Work& work, const Shared& s, const Thread& me) {
  publish(sums, s, me);
  meet(s, 0);
  let_next_kernel_start();  // not before: CTAs of the next would crowd on the few SMs that are free
  float top[N / 4], whole[N / 4];
  weigh_teams(top, whole, sums, s, me);
  constexpr int ROW = TEAM * 4, COLUMN = 2 * BLOCKS * ROW, WHOLE = N / 4 * COLUMN;
  const u32 ring = s.base + OFFSET_RING + (me.part * 128 + me.index) * 4;
  if (TEAMS > 1) {
#pragma unroll
    for (int q = 0; q < N / 4; q++) {
      if (q % TEAMS == me.team) continue;
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; i++)
        write(ring + me.team * WHOLE + q * COLUMN + i * ROW, sums.out[i / 2][q / 2 * 4 + q % 2 + i % 2 * 2]);
    }
    meet(s, 1);
  }
#pragma unroll
  for (int q = 0; q < N / 4; q++) {
    if (q % TEAMS != me.team) continue;
#pragma unroll
    for (int other = 1; other < TEAMS; other++) {
      const int team = me.team + other < TEAMS ? me.team + other : me.team + other - TEAMS;
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; i++)
        sums.out[i / 2][q / 2 * 4 + q % 2 + i % 2 * 2] += read<float>(ring + team * WHOLE + q * COLUMN + i * ROW);
    }
    store(p, work, sums, me, q, top[q], whole[q]);
  }
}
