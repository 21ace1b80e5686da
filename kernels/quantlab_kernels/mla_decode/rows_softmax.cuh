// From scores of tokens [64 of a tile, on the MMA's M] and rows [N] to weights, in powers of two.
//
// The weight of a token is 2^(score - zero), zero lying LOG2_WEIGHT below the reference of the row, which is raised
// when a score exceeds it by more than LAZY. That is seldom, so that a tile mostly costs one vote of its warpgroup. When
// one row is raised, so are all whose reference is exceeded, which would be the next.
// Zeros lie in shared memory. Where two warpgroups take tiles in turns they vote in order of tiles, and each brings its
// sums up to date with what the other has raised.

constexpr float LOG2_WEIGHT = FORMAT == 1 ? 7.0f : 8.0f, LAZY = FORMAT == 1 ? 1.75f : 6.0f;
constexpr float WEIGHT = FORMAT == 1 ? 128.0f : 256.0f;  // of a token at the reference
constexpr float HIGHEST = LOG2_WEIGHT + LAZY;

// A thread's tokens of a tile: 16 warp + g and 8 below.
struct Tokens {
  float scale[2], next[2];
  DEVICE Tokens(const Params& p, const Work& work, const Thread& me) { prefetch(p, work, me, me.group); }
  // Scales of another tile, on their way.
  DEVICE void prefetch(const Params& p, const Work& work, const Thread& me, int tile) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int token = work.begin + tile * TILE + 16 * me.warp + me.g + 8 * r;
      next[r] = token < work.low || token >= work.end ? 1.0f : load(p, work, token);
    }
  }
  DEVICE void advance() {
    scale[0] = next[0], scale[1] = next[1];
  }

 private:
  DEVICE static float load(const Params& p, const Work& work, int token) {
    if (!PAGED) return p.scale[work.batch * p.scale_row + token];
    const int page = p.table[static_cast<i64>(work.batch) * p.table_row + token / p.capacity];
    return p.scale[page * p.scale_row + token % p.capacity];
  }
};

struct Softmax {
  float total[N / 4];  // of rows 8 j + 2 t + {0, 1} and this thread's tokens
  DEVICE Softmax() {
#pragma unroll
    for (int i = 0; i < N / 4; i++) total[i] = 0.0f;
  }

  // From scores [8 j + 2 t + {0, 1} rows, g and g + 8 tokens] to exponents of weights.
  DEVICE void raise(float (&x)[N / 2], const Tokens& tokens, const Work& work, const Shared& s, const Thread& me, int sq,
                    int tile) {
    if (SCORERS == 2 && tile > 0) barrier_wait(s.voted(tile % 2), (tile - 1) / 2 & 1);
    const float added[2] = {log2_(tokens.scale[0]), log2_(tokens.scale[1])};
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float4 row = read<float4>(s.base + OFFSET_ROWS + (8 * j + 2 * me.t) * 8);
#pragma unroll
      for (int i = 0; i < 4; i++)
        x[4 * j + i] = fmaf(x[4 * j + i], i % 2 ? row.w : row.y, added[i / 2] - (i % 2 ? row.z : row.x));
    }
    const int position = work.begin + tile * TILE;
    if (uniform(position < work.low || position + TILE > work.length - sq + 1)) hide(x, work, s, me, position);
    if (SCORERS == 2 && tile > 0 && read<u32>(s.raised(tile - 1))) multiply(total, s.rescale(tile - 1), me);
    const bool raised = uniform(group_any(me, largest_of(x) > HIGHEST || tile == 0));
    if (raised) move_zeros(x, s, me, tile);
    if (me.index == 0) write(s.raised(tile), __uint_as_float(raised));
    if (SCORERS == 2) barrier_arrive(s.voted((tile + 1) % 2));
  }

  // Sums of all tokens of a row, for the other warpgroups and whoever merges; every scorer is here.
  DEVICE void finish(const Params& p, const Work& work, const Shared& s, const Thread& me) {
    if (SCORERS == 2 && work.count > 0 && me.group == work.count % 2) {
      barrier_wait(s.voted(me.group), (work.count - 1) / 2 & 1);
      if (read<u32>(s.raised(work.count - 1))) multiply(total, s.rescale(work.count - 1), me);
    }
    if (SCORERS == 2 && me.group == 0) barrier_wait(s.total_full(), 0);
    reduce<false>(total, s, me);
    if (me.index < N) {
      const float sum = over_warps<false>(s, me);
      if (SCORERS == 2 && me.group == 1)
        write(s.base + OFFSET_TOTAL + 4 * me.index, sum);
      else
        publish(sum + (SCORERS == 2 ? read<float>(s.base + OFFSET_TOTAL + 4 * me.index) : 0.0f), p, work, s, me.index);
    }
    if (SCORERS == 2 && me.group == 1) barrier_arrive(s.total_full());
  }

 private:
  // In four chains: one would wait for every comparison.
  static DEVICE float largest_of(const float (&x)[N / 2]) {
    float top[4];
#pragma unroll
    for (int i = 0; i < 4; i++) top[i] = fmaxf(x[i], x[i + 4]);
#pragma unroll
    for (int i = 8; i < N / 2; i++) top[i % 4] = fmaxf(top[i % 4], x[i]);
    return fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
  }
  static DEVICE void hide(float (&x)[N / 2], const Work& work, const Shared& s, const Thread& me, int position) {
    const int token[2] = {position + 16 * me.warp + me.g, position + 16 * me.warp + me.g + 8};
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float2 last = read<float2>(s.base + OFFSET_LAST + (8 * j + 2 * me.t) * 4);  // bits of integers
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool after = token[i / 2] > __float_as_int(i % 2 ? last.y : last.x);
        x[4 * j + i] = (token[i / 2] < work.low) | after ? -INFINITE : x[4 * j + i];
      }
    }
  }
  static DEVICE void multiply(float (&x)[N / 4], u32 from, const Thread& me) {
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float2 by = read<float2>(from + (8 * j + 2 * me.t) * 4);
      x[2 * j] *= by.x, x[2 * j + 1] *= by.y;
    }
  }
  // Of 2 HALF values, lanes that are 2 HALF apart leave each other half, and take the largest, or the sum, of both.
  template <bool LARGEST, int HALF>
  static DEVICE void exchange(float (&x)[16], const Thread& me) {
    const bool upper = me.lane & 2 * HALF;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const float low = x[i], high = x[i + HALF], own = upper ? high : low;
      const float other = __shfl_xor_sync(~0u, upper ? low : high, 2 * HALF);
      x[i] = LARGEST ? fmaxf(own, other) : own + other;
    }
  }
  // The largest, or the sum, of a warp's tokens for each row, of which a thread is left with 8 g + 2 t + {0, 1}.
  template <bool LARGEST>
  static DEVICE void reduce(const float (&each)[N / 4], const Shared& s, const Thread& me) {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = i < N / 4 ? each[i < N / 4 ? i : 0] : 0.0f;
    exchange<LARGEST, 8>(x, me);
    exchange<LARGEST, 4>(x, me);
    exchange<LARGEST, 2>(x, me);
    if (8 * me.g < N) write(partial(s, me.warp, 8 * me.g + 2 * me.t), uint2{__float_as_uint(x[0]), __float_as_uint(x[1])});
    group_sync(me);
  }
  template <bool LARGEST>
  static DEVICE float over_warps(const Shared& s, const Thread& me) {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = read<float>(partial(s, i, me.index));
    return LARGEST ? fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])) : (x[0] + x[1]) + (x[2] + x[3]);
  }
  static DEVICE u32 partial(const Shared& s, int warp, int row) {
    return s.base + OFFSET_PARTIAL + warp * 256 + row * 4;
  }

  // Of rows with a score above their reference, and of all in the first tile.
  DEVICE void move_zeros(float (&x)[N / 2], const Shared& s, const Thread& me, int tile) {
    float most[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; i++) most[i] = fmaxf(x[i / 2 * 4 + i % 2], x[i / 2 * 4 + i % 2 + 2]);
    reduce<true>(most, s, me);
    if (me.index < N) {
      const float top = over_warps<true>(s, me), limit = tile == 0 ? -INFINITE : LOG2_WEIGHT;
      const float up = top > limit ? top - LOG2_WEIGHT : 0.0f;
      const u32 zero = s.base + OFFSET_ROWS + 8 * me.index;
      write(zero, read<float>(zero) + up);
      write(s.rescale(tile) + 4 * me.index, tile == 0 ? 1.0f : exp2_(-up));
      write(partial(s, 0, me.index), up);
    }
    group_sync(me);
    multiply(total, s.rescale(tile), me);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      const float2 up = read<float2>(partial(s, 0, 8 * j + 2 * me.t));
#pragma unroll
      for (int i = 0; i < 4; i++) x[4 * j + i] -= i % 2 ? up.y : up.x;
    }
    group_sync(me);  // whoever reduces next writes where these were read
  }
  static DEVICE void publish(float sum, const Params& p, const Work& work, const Shared& s, int n) {
    const float total = sum * (1.0f / WEIGHT);
    const float reference = read<float>(s.base + OFFSET_ROWS + 8 * n) + LOG2_WEIGHT;
    const bool some = total > 0.0f;
    const int row = work.first_row + n;
    write(s.base + OFFSET_TOTAL + 4 * n, some ? 1.0f / (WEIGHT * total) : 0.0f);
    if (row >= p.rows) return;
    if (p.splits > 1) {
      const i64 at = (static_cast<i64>(work.split) * p.batches + work.batch) * p.rows + row;
      p.sums[2 * at] = some ? reference : -INFINITE, p.sums[2 * at + 1] = total;
    } else {
      p.lse[lse_of(p, work.batch, row)] = some ? (reference + log2_(total)) / LOG2E : -INFINITE;
    }
  }
};
