// What becomes of the sums of warps and of shares.

// ---- the result of a row ----

// Columns from `column` on; out is the sum of weighted values relative to 2^largest, total that of weights.
template <int COUNT>
DEVICE void finish(const Params& p, int batch, int head, int row, int column, const float (&out)[COUNT], float largest,
                   float total) {
  const bool some = total > 0.0f;
  const int query = row / p.group, head_q = head * p.group + row - query * p.group;
  const float lse = some ? (largest + log2_(total)) / LOG2E : -INFINITE;
  float share = some ? 1.0f / total : 0.0f;
  if (p.sinks != nullptr && some)
    share /= 1.0f + exp2_((load_float(p.sinks, head_q, p.sinks_kind) - lse) * LOG2E);
  if (column == 0) p.lse[(static_cast<i64>(batch) * p.heads * p.group + head_q) * p.sq + query] = lse;
  const i64 at = ((static_cast<i64>(batch) * p.sq + query) * p.heads * p.group + head_q) * D + column;
#pragma unroll
  for (int i = 0; i < COUNT; i++) store_float(p.out, at + i, some ? out[i] * share : 0.0f);
}

// ---- the sum of warps and of shares ----

// A share of a row: out relative to 2^top, and the sum of its weights.
struct Share {
  float top, total;
};

// The warps' sums in shared memory, [WARPS][ROWS][SUMS_ROW], and after them their tops and totals, [WARPS][ROWS]. Rows
// 2 t and 2 t + 1, which a thread has, are t and t + 4 of each eight.
DEVICE int sums_row(int row) { return row / 8 * 8 + row % 2 * 4 + row % 8 / 2; }
DEVICE void store_sums(Sums& sums, float* all, int warp, int g, int t) {
  Share* shares = reinterpret_cast<Share*>(all + WARPS * ROWS * SUMS_ROW);
#pragma unroll
  for (int nt = 0; nt < NT; nt++) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float total = sums.total[nt][row], zeros = sums.zeros[nt][row];
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        total += __shfl_xor_sync(~0u, total, step);
        zeros += __shfl_xor_sync(~0u, zeros, step);
      }
      const int at = warp * ROWS + 8 * nt + 4 * row + t;
      if (g == 0) shares[at].top = total > 0.0f ? sums.reference[nt][row] : -INFINITE, shares[at].total = total;
#pragma unroll
      for (int i = 0; i < D / 32; i++) {  // four channels in a row, of INT4 every second code of eight
        const int first = VALUE == 2 ? i / 2 * 8 + i % 2 : 4 * i, step = VALUE == 2 ? 2 : 1;
        float four[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int code = first + step * e;
          four[e] = sums.out[nt][code / 2][code % 2 * 2 + row] * (1.0f / WEIGHT) + zeros;
        }
        float* to = all + at * SUMS_ROW + value_channel(g, first);
        *reinterpret_cast<float4*>(to) = {four[0], four[1], four[2], four[3]};
      }
    }
  }
}

// Adds `count` shares in their order: share_of(i) and value_of(i) are the i-th's.
template <int MOST, typename ShareOf, typename ValueOf, int N>
DEVICE Share add_shares(float (&result)[N], int count, ShareOf share_of, ValueOf value_of) {
  float top = -INFINITE, total = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST; i++)
    if (i < count) top = fmaxf(top, share_of(i).top);
  const float reference = top == -INFINITE ? 0.0f : top;
#pragma unroll
  for (int e = 0; e < N; e++) result[e] = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    if (i >= count) break;
    const Share share = share_of(i);
    const float factor = exp2_(share.top - reference);
    total += factor * share.total;
    const float* values = value_of(i);
#pragma unroll
    for (int e = 0; e < N; e++) result[e] += factor * values[e];
  }
  return {top, total};
}

constexpr int MOST_CLUSTER = 8;
constexpr int QUAD = 8;  // floats that a CTA sends of four columns of a row: they, and the share that they are of

// Every CTA of the cluster adds up some quads of columns: gets them from all by `joint`, [own quads][splits][QUAD].
DEVICE void send_quad(u32 joint, u32 arrived, const Params& p, const Place& here, int quad, const float (&result)[4],
                      const Share& share) {
  const u32 rank = quad % p.splits, place = (quad / p.splits * p.splits + here.split) * (4 * QUAD);
  const u32 to = cluster_address(joint + place, rank), barrier = cluster_address(arrived, rank);
  store_cluster_async(to, barrier, result[0], result[1], result[2], result[3]);
  store_cluster_async(to + 16, barrier, share.top, share.total, 0.0f, 0.0f);
}

DEVICE int own_quads(const Params& p, const Place& here) {
  return (min(p.rows - here.first_row, ROWS) * (D / 4) - here.split + p.splits - 1) / p.splits;
}

DEVICE void add_cluster(const Params& p, const Place& here, const float* joint, u32 arrived) {
  barrier_wait(arrived, 0);
  for (int own = threadIdx.x; own < own_quads(p, here); own += THREADS) {
    const float* from = joint + own * p.splits * QUAD;
    float result[4];
    const Share whole = add_shares<MOST_CLUSTER>(
        result, p.splits, [&](int i) { return Share{from[i * QUAD + 4], from[i * QUAD + 5]}; },
        [&](int i) { return from + i * QUAD; });
    const int quad = own * p.splits + here.split, row = quad / (D / 4), column = quad % (D / 4) * 4;
    const float reference = whole.top == -INFINITE ? 0.0f : whole.top;
    finish(p, here.batch, here.head, here.first_row + row, column, result, reference, whole.total);
  }
}

// The warps' sums, added in their order, to the result, to this share's or to those that the cluster adds.
DEVICE void merge_warps(const Params& p, const Place& here, const float* all, u32 joint, u32 arrived) {
  const Share* shares = reinterpret_cast<const Share*>(all + WARPS * ROWS * SUMS_ROW);
  const int valid = min(p.rows - here.first_row, ROWS);
  for (int quad = threadIdx.x; quad < valid * (D / 4); quad += THREADS) {
    const int row = quad / (D / 4), column = quad % (D / 4) * 4;
    float result[4];
    const Share share = add_shares<WARPS>(
        result, WARPS, [&](int w) { return shares[w * ROWS + sums_row(row)]; },
        [&](int w) { return all + (w * ROWS + sums_row(row)) * SUMS_ROW + column; });
    const float reference = share.top == -INFINITE ? 0.0f : share.top;
    if (p.clustered) {
      send_quad(joint, arrived, p, here, quad, result, share);
    } else if (p.splits == 1) {
      finish(p, here.batch, here.head, here.first_row + row, column, result, reference, share.total);
    } else {
      const i64 at = ((static_cast<i64>(here.split) * p.batches + here.batch) * p.heads + here.head) * p.rows +
                     here.first_row + row;
      if (column == 0) p.sums[2 * at] = share.top, p.sums[2 * at + 1] = share.total;
      *reinterpret_cast<float4*>(p.part + at * D + column) = {result[0], result[1], result[2], result[3]};
    }
  }
}

// A CTA for each row, with one to four threads for each element: adds the shares of all splits, each thread those of
// its own splits in their order. The first shares are on their way while their weights are computed.
constexpr int MOST_SPLITS = 128, MOST_MERGERS = 4, AHEAD = 8;
extern "C" __global__ void __launch_bounds__(MOST_MERGERS * D) merge(const __grid_constant__ Params p) {
  __shared__ float shares[MOST_SPLITS];
  __shared__ float both[2];
  __shared__ float partial[MOST_MERGERS][D];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i64 pairs = static_cast<i64>(p.batches) * p.heads * p.rows, at = blockIdx.x;
  const int column = threadIdx.x % D, mine = threadIdx.x / D, mergers = p.mergers;
  float values[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    const int split = mine + i * mergers;
    values[i] = split < p.splits ? p.part[(split * pairs + at) * D + column] : 0.0f;
  }
  if (threadIdx.x < 32) weigh_parts<MOST_SPLITS>(p.sums, pairs, at, p.splits, shares, both);
  __syncthreads();
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    const int split = mine + i * mergers;
    if (split < p.splits) result += shares[split] * values[i];
  }
#pragma unroll 8
  for (int split = mine + AHEAD * mergers; split < p.splits; split += mergers)
    result += shares[split] * p.part[(split * pairs + at) * D + column];
  partial[mine][column] = result;
  __syncthreads();
  if (mine != 0) return;
  for (int i = 1; i < mergers; i++) result += partial[i][column];
  const int row = at % p.rows, pair = at / p.rows;
  const float one[1] = {result};
  finish(p, pair / p.heads, pair % p.heads, row, column, one, both[0], both[1]);
}
