// What the kernels of many rows a tile share: a ring's places, boxes of a tile, queries' rows, threads' places.
// Macros: SCORERS  warpgroups that score;   CLUSTER  CTAs that bring tiles to each other, 1 or 2
// Index: in which addresses are computed; int takes 1 % more time for E4M3, u32 for floats

constexpr int THREADS = 128 * (SCORERS + 2);

// Where the `number`th of something lies among `count` places, and the parity of its barriers.
struct Turn {
  int slot;
  u32 parity;
  DEVICE Turn(int number, int count) : slot(number % count), parity(number / count & 1) {}
};

// Boxes of a tile's tokens that somebody sees, and where they lie in the cache.
struct Boxes {
  int y[TILE / BOX], bytes;  // of 128 bytes of each token
  bool needed[TILE / BOX];
  DEVICE Boxes(const Params& p, const Work& work, int tile, int row) : bytes(0) {
#pragma unroll
    for (int i = 0; i < TILE / BOX; i++) {
      const int first = work.begin + tile * TILE + i * BOX;
      needed[i] = first < work.end && first + BOX > work.low;
      bytes += needed[i] ? BOX * 128 : 0;
      y[i] = work.batch * row + first;
      if (PAGED && needed[i])
        y[i] = p.table[static_cast<i64>(work.batch) * p.table_row + first / p.capacity] * row + first % p.capacity;
    }
  }
  // To this CTA, or to both of a pair.
  template <bool BOTH>
  DEVICE void load(const Params& p, const TensorMap* map, int x, u32 to, u32 full) const {
    const u64 policy = p.tiles == CLUSTER ? kEvictFirst : kEvictNormal;
#pragma unroll
    for (int i = 0; i < TILE / BOX; i++) {
      const u32 at = to + i * BOX * 128;
      if (needed[i] && BOTH) tma_load_multicast(at, map, full, x, y[i], 3, policy);
      if (needed[i] && !BOTH) tma_load(at, map, full, x, y[i], policy);
    }
  }
};

// Byte `column` of row n where rows of 128 bytes are swizzled.
DEVICE u32 swizzled(Index n, Index column) { return n * 128 + ((column / 16 ^ n % 8) * 16) + column % 16; }

struct Thread {
  int group, index, warp, lane, g, t;  // group: first those that score;  index, warp: of the warpgroup
  DEVICE Thread() {
    group = uniform(threadIdx.x / 128);
    index = threadIdx.x % 128;
    warp = uniform(threadIdx.x / 32) % 4;
    lane = threadIdx.x % 32;
    g = lane / 4, t = lane % 4;
  }
  DEVICE int half() const { return group - SCORERS; }  // of the channels, which an output's warpgroup adds
};

DEVICE void group_sync(const Thread& me) { named_barrier_sync(1 + me.group, 128); }

// Of [k in 16 bytes][64 rows] of 16 bytes, not swizzled.
DEVICE u64 plain_descriptor(u32 address) {
  u64 result;
  asm("mov.b64 %0, {%1, %2};" : "=l"(result) : "r"((1024 / 16) << 16 | (address & 0x3FFFF) >> 4), "n"(128 / 16));
  return result;
}

// Where a row of queries lies, and the last token that it sees.
struct Row {
  bool there;
  const char *latent, *rope;
  int last;
  DEVICE Row(const Params& p, const Work& work, int n) {
    const int row = work.first_row + n, query = query_of(p, row), head = row - query * p.heads;
    there = row < p.rows;
    latent = p.q_latent + 2 * (work.batch * p.ql_batch + query * p.ql_token + head * p.ql_head);
    rope = p.q_rope + 2 * (work.batch * p.qr_batch + query * p.qr_token + head * p.qr_head);
    last = work.length - p.sq + min(query, p.sq - 1);
  }
};

// Rows of half a tile that hold nothing become zeros: NaN times a weight of 0 would be NaN.
DEVICE void clear_hidden(const Work& work, const Thread& me, u32 half, int position) {
  const int row = me.index / 2, token = position + row;
  if (token < work.low || token >= work.length)
    for (int c = 0; c < HALF_CHUNKS; c++)
      for (int i = 0; i < 4; i++) write_zeros(half + c * CHUNK + row * 128 + me.index % 2 * 64 + i * 16);
  async_proxy_fence();
  group_sync(me);
}
