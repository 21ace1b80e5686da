// The second kernel.

// One CTA for 128 channels of a row: adds the parts of all splits, every thread those of its own splits first.
constexpr int MERGERS = 4, COLUMNS = 128, MOST_SPLITS = 128;
extern "C" __global__ void __launch_bounds__(MERGERS* COLUMNS) merge(const __grid_constant__ Params p) {
  __shared__ float shares[MOST_SPLITS];
  __shared__ float both[2];
  __shared__ float partial[MERGERS][COLUMNS];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i64 pairs = static_cast<i64>(p.batches) * p.rows, at = blockIdx.x / (L / COLUMNS);
  const int column = blockIdx.x % (L / COLUMNS) * COLUMNS + threadIdx.x % COLUMNS, mine = threadIdx.x / COLUMNS;
  float values[MOST_SPLITS / MERGERS];  // on their way while the shares are computed
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / MERGERS; i++) {
    const int split = mine + i * MERGERS;
    values[i] = split < p.splits ? p.part[(split * pairs + at) * L + column] : 0.0f;
  }
  if (threadIdx.x < 32) weigh_parts<MOST_SPLITS>(p.sums, pairs, at, p.splits, shares, both);
  __syncthreads();
  float result = 0.0f;
#pragma unroll
  for (int i = 0; i < MOST_SPLITS / MERGERS; i++) result += shares[mine + i * MERGERS] * values[i];
  partial[mine][threadIdx.x % COLUMNS] = result;
  __syncthreads();
  if (mine != 0) return;
#pragma unroll
  for (int i = 1; i < MERGERS; i++) result += partial[i][threadIdx.x];
  const int row = at % p.rows, head = row % p.heads, query = row / p.heads;
  const i64 batch = at / p.rows;
  const bool some = both[1] > 0.0f;
  if (column == 0) p.lse[(batch * p.heads + head) * p.sq + query] = some ? (both[0] + log2_(both[1])) / LOG2E : -INFINITE;
  store_float<QUERY>(p.out, at * L + column, some ? result / both[1] : 0.0f);
}
