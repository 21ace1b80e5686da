// Attention of a warp's queries to a tile of 16 tokens, in codes or in 16 bits.

// Of the query rows 2 t and 2 t + 1 of each eight, over this warp's tokens: relative to 2^reference, which is raised to
// the largest ``p * s_v`` when a weight would otherwise be above LIMIT. So most tiles need not agree on a maximum.
struct Sums {
  float out[NT][D / 16][4];  // channels of this thread, see `value_channel`; times WEIGHT
  float reference[NT][2], total[NT][2], zeros[NT][2];
};

// Second operands of the first product: row g of each eight, the channels of this thread; float16 with the largest of a
// row between 64 and 128. A score in units of log2 is ``(product * factor - bias) * k_scale + k_zero * sum + moved``,
// where moved is the part that the mean of the keys makes.
struct Queries {
  u32 pairs[NT][K_STEPS][2];
  float factor[NT][2], moved[NT][2], bias[NT][2], sum[NT][2];  // of rows 2 t and 2 t + 1
};

// Copies what queries are made of to shared memory: rows, mean, channels. Asked for before the ring is filled: behind
// 100 KB of tiles it would come last.
DEVICE void fetch_queries(const Params& p, const Place& here, u32 to) {
  constexpr int ROW = D * QUERY_BYTES / 16, OTHER = D / 4;  // pieces of 16 bytes
#pragma unroll 1
  for (int piece = threadIdx.x; piece < ROWS * ROW + 2 * OTHER; piece += THREADS) {
    const char* from = p.q;
    bool valid;
    if (piece < ROWS * ROW) {
      const int row = here.first_row + piece / ROW, query = row / p.group;
      valid = row < p.rows;
      const int head = here.head * p.group + row - query * p.group;
      const i64 at = here.batch * p.q_batch + head * p.q_head + query * p.q_token;
      if (valid) from += at * QUERY_BYTES + piece % ROW * 16;
    } else {
      const int other = piece - ROWS * ROW, column = other % OTHER * 4;
      const float* of_head = other < OTHER ? p.mean : p.channel;
      const i64 batch = other < OTHER ? p.mean_batch : p.channel_batch;
      valid = of_head != nullptr;
      if (valid) from = reinterpret_cast<const char*>(of_head + here.batch * batch + here.head * D + column);
    }
    copy16(to + 16 * piece, from, valid);
  }
}

// A thread's part of a row in shared memory.
template <int BYTES>
DEVICE void read_part(u32 (&words)[K_CODES * BYTES / 4], u32 row, int t) {
#pragma unroll
  for (int i = 0; i < K_CODES * BYTES / 16; i++) read<16>(words + 4 * i, row + piece_of<BYTES>(t, i));
}

template <bool CODES>
DEVICE void make_queries(Queries& q, const Params& p, u32 fetched, int g, int t) {
  const u32 mean_at = fetched + ROWS * D * QUERY_BYTES, channel_at = mean_at + 4 * D;
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float values[K_CODES], largest = 1e-30f, moved = 0.0f;
    u32 words[K_CODES * QUERY_BYTES / 4];
    read_part<QUERY_BYTES>(words, fetched + (8 * nt + g) * D * QUERY_BYTES, t);
#pragma unroll
    for (int i = 0; i < K_CODES; i++) values[i] = number_of<QUERY>(words, key_place(i / 4, i / 2 % 2, i % 2));
    if (CODES && p.mean != nullptr) {
      u32 mean[K_CODES];
      read_part<4>(mean, mean_at, t);
#pragma unroll
      for (int i = 0; i < K_CODES; i++) moved += values[i] * as_float(mean[key_place(i / 4, i / 2 % 2, i % 2)]);
    }
    if (CODES && p.channel != nullptr) {
      u32 channel[K_CODES];
      read_part<4>(channel, channel_at, t);
#pragma unroll
      for (int i = 0; i < K_CODES; i++) values[i] *= as_float(channel[key_place(i / 4, i / 2 % 2, i % 2)]);
    }
#pragma unroll
    for (int i = 0; i < K_CODES; i++) largest = fmaxf(largest, fabsf(values[i]));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      moved += __shfl_xor_sync(~0u, moved, step);
    }
    const int exponent = 6 - (static_cast<int>(__float_as_uint(largest) >> 23) - 127);
    const float up = as_float(static_cast<u32>(127 + min(exponent, 120)) << 23);
    float sum = 0.0f, based = 0.0f;
#pragma unroll
    for (int i = 0; i < K_CODES; i += 2) {
      const float unit = CODES ? key_unit(i / 2 % 2) : 1.0f, factor = up / unit;
      const u32 pair = half2_of(values[i] * factor, values[i + 1] * factor);
      q.pairs[nt][i / 4][i / 2 % 2] = pair;
      const float both = low_half(pair) + high_half(pair);
      based += both;
      sum += both * unit;
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      based += __shfl_xor_sync(~0u, based, step);
    }
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int from = 4 * (2 * t + e);  // a lane that has that row
      const float factor = p.scale * LOG2E / __shfl_sync(~0u, up, from);
      q.factor[nt][e] = factor;
      q.moved[nt][e] = __shfl_sync(~0u, moved, from) * p.scale * LOG2E;
      q.bias[nt][e] = __shfl_sync(~0u, based, from) * (CODES ? KEY_BASE : 0.0f) * factor;
      q.sum[nt][e] = __shfl_sync(~0u, sum, from) * factor;
    }
  }
}

// Scales of the tokens g and g + 8 of a tile; that of values times WEIGHT.
struct Scales {
  float k[2], k_zero[2], v[2], v_zero[2];
};

DEVICE void cap(float (&x)[4], float softcap) {
  const float most = softcap * LOG2E;
#pragma unroll
  for (int e = 0; e < 4; e++) x[e] = most - 2.0f * most / (1.0f + exp2_(x[e] * (2.0f / softcap)));
}

// Scores of tokens, at the positions `at`, that rows 2 t and 2 t + 1 do not see become -inf.
DEVICE void hide(float (&x)[4], const Params& p, const Place& here, int nt, int t, const int (&at)[2], int low,
                 int end) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int place = here.length - p.sq + (here.first_row + 8 * nt + 2 * t + e % 2) / p.group, token = at[e / 2];
    const bool seen = token >= low && token < end && token <= place && (p.window < 0 || token > place - p.window);
    if (!seen) x[e] = -INFINITE;
  }
}

DEVICE void raise(Sums& sums, int nt, const float (&x)[4], const Scales& scales) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float top = fmaxf(x[row] + log2_(scales.v[0]), x[2 + row] + log2_(scales.v[1])) - log2_(WEIGHT);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    top = fmaxf(top, sums.reference[nt][row]);
    const float rescale = exp2_(sums.reference[nt][row] - top);
    sums.reference[nt][row] = top;
    sums.total[nt][row] *= rescale;
    sums.zeros[nt][row] *= rescale;
#pragma unroll
    for (int i = 0; i < D / 8; i++) sums.out[nt][i / 2][i % 2 * 2 + row] *= rescale;
  }
}

// Scores of the tokens g and g + 8 to weights in the layout of the second product's operand.
// x  rows 2 t, 2 t + 1 of the first token, then of the second, in units of log2
DEVICE void weigh(u32 (&weights)[2], Sums& sums, int nt, const float (&x)[4], const Scales& scales) {
  float share[4], weight[4];
  auto compute = [&]() {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      share[e] = exp2_(x[e] - sums.reference[nt][e % 2]);
      weight[e] = share[e] * scales.v[e / 2];
    }
  };
  compute();
  if (__any_sync(~0u, fmaxf(fmaxf(weight[0], weight[1]), fmaxf(weight[2], weight[3])) > LIMIT)) {
    raise(sums, nt, x, scales);
    compute();
  }
#pragma unroll
  for (int row = 0; row < 2; row++) {
    sums.total[nt][row] += share[row] + share[2 + row];
    if (VALUE == 2) sums.zeros[nt][row] += share[row] * scales.v_zero[0] + share[2 + row] * scales.v_zero[1];
  }
  weights[0] = transposed(half2_of(weight[0], weight[1]));
  weights[1] = transposed(half2_of(weight[2], weight[3]));
}

DEVICE Scales read_scales(u32 from, int g) {
  u32 k[2], v[2];
  read<8>(k, from + 8 * g);
  read<8>(v, from + 64 + 8 * g);
  Scales scales;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    scales.k[j] = KEY == 2 ? low_half(k[j]) : as_float(k[j]);
    scales.k_zero[j] = KEY == 2 ? high_half(k[j]) : 0.0f;
    scales.v[j] = (VALUE == 2 ? low_half(v[j]) : as_float(v[j])) * WEIGHT;
    scales.v_zero[j] = VALUE == 2 ? high_half(v[j]) : 0.0f;
  }
  return scales;
}

// The tile of codes that begins with token `first`; `keys`, `values` and `scales_at` in shared memory.
DEVICE void attend_codes(Sums& sums, const Queries& q, const Params& p, const Place& here, u32 keys, u32 values,
                         u32 scales_at, int first, int g, int t) {
  u32 words[2][K_BYTES / 4];
#pragma unroll
  for (int token = 0; token < 2; token++)
#pragma unroll
    for (int piece = 0; piece < K_BYTES / K_PIECE; piece++)
      read<K_PIECE>(&words[token][piece * K_PIECE / 4],
                    keys + (g + 8 * token) * K_ROW + t * K_BYTES + piece * K_PIECE);
  float scores[NT][CHAINS][4];
#pragma unroll
  for (int nt = 0; nt < NT; nt++)
#pragma unroll
    for (int e = 0; e < 4 * CHAINS; e++) scores[nt][e / 4][e % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < K_STEPS; step++) {
    u32 a[2], b[2];
    key_operand(a, words[0], step);
    key_operand(b, words[1], step);
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
      mma(scores[nt][step % CHAINS], a[0], b[0], a[1], b[1], q.pairs[nt][step][0], q.pairs[nt][step][1]);
  }

  Scales scales = read_scales(scales_at, g);
  const bool some = first < here.low || first + TILE > here.end || first + TILE - 1 > here.length - p.sq ||
                    (p.window >= 0 && first <= here.length - 1 - p.window);
  const int at[2] = {first + g, first + g + 8};
  if (some) {  // what nobody sees may be NaN
#pragma unroll
    for (int j = 0; j < 2; j++)
      if (at[j] < here.low || at[j] >= here.end) scales.v[j] = scales.v_zero[j] = 0.0f;
  }
  u32 weights[NT][2];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int token = e / 2, row = e % 2;
      float product = scores[nt][0][e];
      if (CHAINS == 2) product += scores[nt][CHAINS - 1][e];
      const float zero = KEY == 2 ? scales.k_zero[token] * q.sum[nt][row] + q.moved[nt][row] : q.moved[nt][row];
      x[e] = (product * q.factor[nt][row] - q.bias[nt][row]) * scales.k[token] + zero;
    }
    if (SOFTCAP) cap(x, p.softcap);
    if (some) hide(x, p, here, nt, t, at, here.low, here.end);
    weigh(weights[nt], sums, nt, x, scales);
  }

  u32 value_words[4][V_WORDS];  // of the tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9
#pragma unroll
  for (int token = 0; token < 4; token++)
#pragma unroll
    for (int piece = 0; piece < V_BYTES / V_PIECE; piece++)
      read<V_PIECE>(&value_words[token][piece * V_PIECE / 4],
                    values + (2 * t + token % 2 + token / 2 * 8) * V_ROW + g * V_BYTES + piece * V_PIECE);
  if (VALUE == 0 && some) {
#pragma unroll
    for (int token = 0; token < 4; token++) {
      const int place = first + 2 * t + token % 2 + token / 2 * 8;
#pragma unroll
      for (int word = 0; word < V_WORDS; word++)
        if (place < here.low || place >= here.end) value_words[token][word] = 0;
    }
  }
#pragma unroll
  for (int word = 0; word < V_WORDS; word++) {
    u32 a[V_CODES], b[V_CODES];
    value_operand(a, value_words[0][word], value_words[1][word]);
    value_operand(b, value_words[2][word], value_words[3][word]);
#pragma unroll
    for (int j = 0; j < V_CODES; j += 2)
#pragma unroll
      for (int nt = 0; nt < NT; nt++)
        mma(sums.out[nt][(word * V_CODES + j) / 2], a[j], a[j + 1], b[j], b[j + 1], weights[nt][0], weights[nt][1]);
  }
}

// ---- tokens in 16 bits ----

// Two numbers in 16 bits as float16.
DEVICE u32 near_pair(u32 bits, int kind) {
  return kind == 2 ? bits : half2_of(as_float(bits << 16), as_float(bits & 0xFFFF0000u));
}
// The low or the high one of two pairs, side by side.
DEVICE u32 near_both(u32 a, u32 b, int high, int kind) {
  return near_pair(__byte_perm(a, b, high ? 0x7632 : 0x5410), kind);
}
// Register `half` of k-step `step` of a token's keys.
DEVICE u32 near_key(const uint4 (&k)[K_CODES / 8], int step, int half, int kind) {
  const int a = key_place(step, half, 0), b = key_place(step, half, 1);
  const u32 low = word_of(k[a / 8], a % 8 / 2), high = word_of(k[b / 8], b % 8 / 2);
  return b == a + 1 ? near_pair(low, kind) : near_both(low, high, a % 2, kind);
}

constexpr int V_RUNS = VALUE == 2 ? 2 : 1;  // of channels that a thread has of a token's values
constexpr int V_RUN = D / 8 / V_RUNS;

// Tokens that are kept in 16 bits: which are in the slots of a sequence, and where.
struct Near {
  const char* k;
  const char* v;  // this thread's part of the first slot
  int k_slot, v_slot;  // bytes
  int start, length, first, newest, rest, base;  // the newest token is at base + rest, base a multiple of newest

  DEVICE Near(const Params& p, const Place& here, int g)
      : k(p.k_near + 2 * (here.batch * p.kn_row + here.head * p.kn_head)),
        v(p.v_near + 2 * (here.batch * p.vn_row + here.head * p.vn_head + g * V_RUN)),
        k_slot(2 * p.kn_slot), v_slot(2 * p.vn_slot), start(here.start), length(here.length), first(p.first),
        newest(p.newest), rest(newest > 0 ? (length - 1) % newest : 0), base(length - 1 - rest) {}
  // Position of the token in a slot, or -1 for none.
  DEVICE int position(int slot) const {
    if (slot < first) return start + slot < length ? start + slot : -1;
    const int late = slot - first, position = base + late - (late > rest ? newest : 0);
    return late < newest && position >= start + first ? position : -1;
  }
  // A tile's rows into the L2, before the ring asks for more than the memory has to give.
  DEVICE void prefetch_tile(int slot, int g, int t) const {
    const int most = first + newest - 1;
#pragma unroll
    for (int j = 0; j < 2; j++) prefetch(k + min(slot + g + 8 * j, most) * k_slot + t * (D / 2));
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const char* row = v + min(slot + 2 * t + j % 2 + j / 2 * 8, most) * v_slot;
      prefetch(row);
      if (V_RUNS == 2) prefetch(row + D);
    }
  }
};

// Eight codes of a thread's channels: four channels in each of two runs, or eight in one. `first` is the tile's slot.
DEVICE void attend_near_values(Sums& sums, const u32 (&weights)[NT][2], const Near& near, int kind, int first, int part,
                               int t) {
  asm volatile("" ::: "memory");  // one part after the other: registers are short
  u32 words[4][4];                // of the tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9
#pragma unroll
  for (int token = 0; token < 4; token++) {
    const int slot = first + 2 * t + token % 2 + token / 2 * 8;
    const char* from = near.v + slot * near.v_slot + part * (16 / V_RUNS);
    const bool valid = near.position(slot) >= 0;
    uint4 bits = {0, 0, 0, 0};
    if (valid && V_RUNS == 1) bits = load16(from);
    if (valid && V_RUNS == 2) {
      const uint2 low = load8(from), high = load8(from + D);
      bits = {low.x, low.y, high.x, high.y};
    }
#pragma unroll
    for (int i = 0; i < 4; i++) words[token][i] = word_of(bits, i);
  }
#pragma unroll
  for (int code = 0; code < 8; code += 2) {
    u32 operands[2][2];  // register of a pair of tokens: a code of both
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int place = V_RUNS == 2 ? code / 2 + 4 * e : code + e;
#pragma unroll
      for (int pair = 0; pair < 2; pair++)
        operands[pair][e] =
            near_both(words[2 * pair][place / 2], words[2 * pair + 1][place / 2], place % 2, kind);
    }
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
      mma(sums.out[nt][4 * part + code / 2], operands[0][0], operands[0][1], operands[1][0], operands[1][1],
          weights[nt][0], weights[nt][1]);
  }
}

// The tile of near slots from `first` on.
DEVICE void attend_near(Sums& sums, const Queries& q, const Params& p, const Place& here, const Near& near, int first,
                        int g, int t) {
  int at[2];
  uint4 k[2][K_CODES / 8];  // all on their way at once
#pragma unroll
  for (int j = 0; j < 2; j++) {
    at[j] = near.position(first + g + 8 * j);
#pragma unroll
    for (int i = 0; i < K_CODES / 8; i++) {
      k[j][i] = {0, 0, 0, 0};
      if (at[j] >= 0) k[j][i] = load16(near.k + (first + g + 8 * j) * near.k_slot + piece_of<2>(t, i));
    }
  }
  float scores[NT][4];
#pragma unroll
  for (int i = 0; i < 4 * NT; i++) scores[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int step = 0; step < K_STEPS; step++) {
    const u32 a0 = near_key(k[0], step, 0, p.near_kind), a1 = near_key(k[0], step, 1, p.near_kind);
    const u32 b0 = near_key(k[1], step, 0, p.near_kind), b1 = near_key(k[1], step, 1, p.near_kind);
#pragma unroll
    for (int nt = 0; nt < NT; nt++) mma(scores[nt], a0, b0, a1, b1, q.pairs[nt][step][0], q.pairs[nt][step][1]);
  }
  const Scales scales = {{1.0f, 1.0f}, {0.0f, 0.0f}, {WEIGHT, WEIGHT}, {0.0f, 0.0f}};
  u32 weights[NT][2];
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
    float x[4];
#pragma unroll
    for (int e = 0; e < 4; e++) x[e] = scores[nt][e] * q.factor[nt][e % 2];
    if (SOFTCAP) cap(x, p.softcap);
    hide(x, p, here, nt, t, at, 0, here.length);
    weigh(weights[nt], sums, nt, x, scales);
  }
#pragma unroll
  for (int part = 0; part < D / 64; part++) attend_near_values(sums, weights, near, p.near_kind, first, part, t);
}
