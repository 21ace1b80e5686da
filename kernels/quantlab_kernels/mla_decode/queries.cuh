// Queries, from global memory to where both halves of the scores read them as columns. A warp takes a row.

DEVICE void write(u32 to, u32 a) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(a) : "memory"); }
DEVICE void write(u32 to, u32 a, u32 b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

// Byte `column` of row n where rows of 128 bytes are swizzled.
DEVICE u32 swizzled(int n, int column) { return n * 128 + ((column / 16 ^ n % 8) * 16) + column % 16; }

// Four channels side by side, which the host has aligned.
struct Four {
  u32 words[QUERY == 0 ? 4 : 2];
  DEVICE void load(const char* from, bool some) {
    if constexpr (QUERY == 0) {
      words[0] = words[1] = words[2] = words[3] = 0;
      if (some)
        asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(from) : "memory");
    } else {
      words[0] = words[1] = 0;
      if (some)
        asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from) : "memory");
    }
  }
  DEVICE float operator[](int k) const {
    if constexpr (QUERY == 0) {
      return __uint_as_float(words[k]);
    } else {
      const u16 bits = static_cast<u16>(words[k / 2] >> (16 * (k % 2)));
      return QUERY == 1 ? BFloat16::unpack(bits) : Float16::unpack(bits);
    }
  }
};

// Writes channels `channel` to + 3 of row n; returns what is taken from the row's scores.
DEVICE float write_four(u32 base, int n, int channel, const float (&x)[4]) {
#if FORMAT == 0
  write(base + channel / 64 * Q_CHUNK + swizzled(n, channel % 64 * 2), pack<KEPT>(x[0], x[1]), pack<KEPT>(x[2], x[3]));
  return 0.0f;
#elif FORMAT == 1
  const u32 to = base + channel / 128 * (2 * Q_CHUNK) + swizzled(n, channel % 128);
  const u16 low = e4m3_pair(x[0], x[1]), high = e4m3_pair(x[2], x[3]);
  const float2 a = e4m3_floats(low), b = e4m3_floats(high);
  write(to, low | static_cast<u32>(high) << 16);
  write(to + N * 128, e4m3_pair(x[0] - a.x, x[1] - a.y) | static_cast<u32>(e4m3_pair(x[2] - b.x, x[3] - b.y)) << 16);
  return 0.0f;
#else
  const int byte = NIBBLES ? channel % (L / 2) : channel, step = byte / 128 * 8 + byte / 4 % 8;
  const int chunk = NIBBLES ? step / 4 : channel / 128;
  const int column = NIBBLES ? step % 4 * 32 + channel / (L / 2) * 16 + byte / 32 % 4 * 4 : channel % 128;
  const u32 to = base + chunk * (2 * Q_CHUNK) + swizzled(n, column);
  u32 upper = 0, lower = 0;
  int sum = 0;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const int whole = __float2int_rn(x[k] * 64.0f), digit = (whole + 64) >> 7;
    upper |= (digit & 0xFF) << (8 * k), lower |= (whole - 128 * digit & 0xFF) << (8 * k);
    sum += whole;
  }
  write(to, upper);
  write(to + N * 128, lower);
  return NIBBLES ? sum * (15.0f / 64.0f) : 0.0f;
#endif
}

// Two rows of a warp, on their way to shared memory.
struct Queries {
  static constexpr int WARPS = CONSUMERS / 32, ROWS = 2, BYTES = QUERY == 0 ? 4 : 2;
  const char *latents[ROWS], *ropes[ROWS];
  bool some[ROWS];
  Four latent[ROWS][L / 128];
  float rope[ROWS][2];

  // To rows from `first` of the tile on.
  DEVICE void aim(const Params& p, const Work& work, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int n = first + threadIdx.x / 32 + r * WARPS, row = work.first_row + n;
      some[r] = row < p.rows && n < N;
      const int query = query_of(p, row), head = row - query * p.heads;
      latents[r] = p.q_latent + BYTES * (work.batch * p.ql_batch + query * p.ql_token + head * p.ql_head + 4 * lane);
      ropes[r] = p.q_rope + BYTES * (work.batch * p.qr_batch + query * p.qr_token + head * p.qr_head + 2 * lane);
    }
  }
  DEVICE void load() {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int i = 0; i < L / 128; i++) latent[r][i].load(latents[r] + BYTES * 128 * i, some[r]);
#pragma unroll
      for (int i = 0; i < 2; i++) rope[r][i] = some[r] ? load_float<QUERY>(ropes[r], i) : 0.0f;
    }
  }

  // The largest latent channel of a row near 128 by a power of two; the position's, which stay floats, at most 128 times
  // that.
  DEVICE void store_rows(const Params& p, const Work& work, u32 base, int first) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int n = first + threadIdx.x / 32 + r * WARPS, row = work.first_row + n;
      if (n >= N) break;
      float most = fmaxf(fabsf(rope[r][0]), fabsf(rope[r][1])) * (1.0f / 128.0f);
#pragma unroll
      for (int i = 0; i < L / 32; i++) most = fmaxf(most, fabsf(latent[r][i / 4][i % 4]));
#pragma unroll
      for (int i = 1; i < 32; i *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
      const u32 exponent = max(__float_as_uint(most) >> 23, 27u);  // 2^(6 - e) times 2^e..2^(e+1)
      const float raised = __uint_as_float((260 - exponent) << 23);
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < L / 128; i++) {
        const Four& x = latent[r][i];
        const float four[4] = {x[0] * raised, x[1] * raised, x[2] * raised, x[3] * raised};
        sum += write_four(base, n, 128 * i + 4 * lane, four);
      }
      write(base + L / 64 * Q_CHUNK + swizzled(n, 4 * lane), pack<KEPT>(rope[r][0] * raised, rope[r][1] * raised));
      if (NIBBLES)
#pragma unroll
        for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(~0u, sum, i);
      if (lane == 0) {
        const int query = min(query_of(p, row), p.sq - 1);
        write(base + OFFSET_FACTOR + 4 * n, p.factor * __uint_as_float((exponent - 6) << 23));
        if (NIBBLES) write(base + OFFSET_BASE + 4 * n, sum);
        write(base + OFFSET_PLACE + 4 * n, static_cast<float>(work.length - p.sq + query));
      }
    }
  }

  DEVICE void store(const Params& p, const Work& work, u32 base) {
#pragma unroll 1
    for (int first = 0;;) {
      store_rows(p, work, base, first);
      first += ROWS * WARPS;
      if (first >= N) break;
      aim(p, work, first);
      load();
    }
  }
};
