// Rows sorted by expert: which expert, rows and channels a tile is of, from counts that device memory holds.
#pragma once
#include "sm90.cuh"

constexpr int MAX_EXPERTS = 512;
constexpr int GROUPS_BYTES = 8 * (MAX_EXPERTS + 1);  // of shared memory: first rows, then first tiles of rows

DEVICE int load_shared_int(u32 address) {
  int value;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

DEVICE void store_shared_int(u32 address, int value) {
  asm volatile("st.shared.s32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// One warp: where each expert's rows begin, and its tiles of `TOKENS` rows. The entry behind the last is their total.
template <int TOKENS>
DEVICE void locate_groups(const long long* counts, int experts, u32 groups) {
  const int lane = threadIdx.x % 32;
  int row = 0, tile = 0;
#pragma unroll 1
  for (int first = 0; first < experts + 1; first += 32) {
    const int expert = first + lane;
    const int count = expert < experts ? static_cast<int>(counts[expert]) : 0, own = (count + TOKENS - 1) / TOKENS;
    int rows = count, tiles = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int more_rows = __shfl_up_sync(0xffffffff, rows, step), more = __shfl_up_sync(0xffffffff, tiles, step);
      if (lane >= step) rows += more_rows, tiles += more;
    }
    if (expert <= experts) {
      store_shared_int(groups + 4 * expert, row + rows - count);
      store_shared_int(groups + 4 * (MAX_EXPERTS + 1 + expert), tile + tiles - own);
    }
    row += __shfl_sync(0xffffffff, rows, 31);
    tile += __shfl_sync(0xffffffff, tiles, 31);
  }
}

// Of all experts, tiles of rows.
DEVICE int count_tiles(u32 groups, int experts) { return load_shared_int(groups + 4 * (MAX_EXPERTS + 1 + experts)); }

// The expert that a tile is of: its rows, its tiles of rows, and its tiles among those of all experts.
struct Group {
  int expert = 0, first_token = 0, end_token = 0;
  int token_tiles = 1, first_tile = 0, end_tile = 0;
};

// Moves on to the expert of `tile`; tiles are asked for in ascending order, most of them of the same expert as the last.
DEVICE void find_group(Group& group, u32 groups, int experts, int channel_tiles, int tile) {
  if (tile < group.end_tile) return;
  const int starts = groups + 4 * (MAX_EXPERTS + 1);
  int low = group.expert, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (load_shared_int(starts + 4 * middle) * channel_tiles <= tile ? low : high) = middle;
  }
  const int start = load_shared_int(starts + 4 * low);
  group.expert = low;
  group.first_token = load_shared_int(groups + 4 * low);
  group.end_token = load_shared_int(groups + 4 * low + 4);
  group.token_tiles = load_shared_int(starts + 4 * low + 4) - start;
  group.first_tile = start * channel_tiles;
  group.end_tile = group.first_tile + group.token_tiles * channel_tiles;
}

struct Place {
  int token_tile, channel_tile;
};

// An expert's tiles go in bands of `height` tiles of tokens, and within a band along the tokens first: CTAs that run at
// once share weights and tokens in the L2 cache.
DEVICE Place place_in_group(const Group& group, int channel_tiles, int height, int tile) {
  const int band = (tile - group.first_tile) / (height * channel_tiles) * height;
  const int within = tile - group.first_tile - band * channel_tiles, tokens = min(height, group.token_tiles - band);
  return {band + within % tokens, within / tokens};
}
