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

struct Group {
  int expert, first_token, end_token, token_tile, channel_tile;
};

// The tiles of an expert come together, its tokens first: CTAs that run at once share weights.
DEVICE Group find_group(u32 groups, int experts, int channel_tiles, int tile) {
  const int starts = groups + 4 * (MAX_EXPERTS + 1);
  int low = 0, high = experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (load_shared_int(starts + 4 * middle) * channel_tiles <= tile ? low : high) = middle;
  }
  const int start = load_shared_int(starts + 4 * low);
  const int token_tiles = load_shared_int(starts + 4 * low + 4) - start, within = tile - start * channel_tiles;
  const int first_token = load_shared_int(groups + 4 * low), end_token = load_shared_int(groups + 4 * low + 4);
  return {low, first_token, end_token, within % token_tiles, within / token_tiles};
}
