// The second kernel adds the parts of a row. A thread takes four channels; a CTA takes a whole row or, where there are many
// parts, a quarter or so of it, and groups of threads take the parts in turns and meet in shared memory.
constexpr int MOST_SPLITS = 128, BATCH_OF_PARTS = 8, MERGERS = 512;

extern "C" __global__ void __launch_bounds__(MERGERS) merge(const __grid_constant__ Params p) {
  __shared__ float shares[MOST_SPLITS];
  __shared__ float both[2];
  __shared__ float4 partial[MERGERS];  // [groups][lanes]
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i64 pairs = static_cast<i64>(p.batches) * p.rows;
  const int ctas = gridDim.x / static_cast<int>(pairs), lanes = L / 4 / ctas;  // of a row, of a CTA
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const i64 at = blockIdx.x / ctas;
  const int channel = 4 * (blockIdx.x % ctas * lanes + lane);
  const float4* from = reinterpret_cast<const float4*>(p.part + at * L + channel);
  float4 values[BATCH_OF_PARTS];  // on their way while the shares are computed
  const auto load = [&](int first) {
#pragma unroll
    for (int i = 0; i < BATCH_OF_PARTS; i++) {
      const int part = first + i * groups;
      values[i] = part < p.splits ? from[part * pairs * (L / 4)] : float4{0.0f, 0.0f, 0.0f, 0.0f};
    }
  };
  load(group);
  if (threadIdx.x < 32) weigh_parts<MOST_SPLITS>(p.sums, pairs, at, p.splits, shares, both);
  __syncthreads();
  float result[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int first = group; first < p.splits;) {
#pragma unroll
    for (int i = 0; i < BATCH_OF_PARTS; i++) {
      const float share = shares[min(first + i * groups, MOST_SPLITS - 1)];
      result[0] += share * values[i].x, result[1] += share * values[i].y;
      result[2] += share * values[i].z, result[3] += share * values[i].w;
    }
    first += BATCH_OF_PARTS * groups;
    load(first);
  }
  if (groups > 1) {
    partial[threadIdx.x] = {result[0], result[1], result[2], result[3]};
    __syncthreads();
    if (group != 0) return;
    for (int i = 1; i < groups; i++) {
      const float4 other = partial[i * lanes + lane];
      result[0] += other.x, result[1] += other.y, result[2] += other.z, result[3] += other.w;
    }
  }
  const int row = at % p.rows, head = row % p.heads, query = row / p.heads;
  const i64 batch = at / p.rows;
  const bool some = both[1] > 0.0f;
  const float by = some ? 1.0f / both[1] : 0.0f;
  if (channel == 0)
    p.lse[(batch * p.heads + head) * p.sq + query] = some ? (both[0] + log2_(both[1])) / LOG2E : -INFINITE;
  const float four[4] = {result[0] * by, result[1] * by, result[2] * by, result[3] * by};
  store_four<QUERY>(p.out, at * L + channel, four);
}
