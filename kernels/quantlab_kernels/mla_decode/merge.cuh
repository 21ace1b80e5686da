// The second kernel adds the parts of a row. A thread takes 16 bytes of each of its parts; a CTA takes a whole row
// or, where there are many parts, 128 channels, and groups of threads take the parts in turns and meet in shared memory.
// All of it is added to the time of a call. Threads are few and take few registers, so that all CTAs run at once, and
// there is little code, since what runs once waits for its instructions.
// Parts are sums, or, with AVERAGES, averages that are rounded as results are.
#if AVERAGES
constexpr int WIDTH = 8;  // channels of a thread
using Part = uint4;
DEVICE void unpack_part(float (&x)[WIDTH], Part part) { unpack<QUERY>(x, part); }
#else
constexpr int WIDTH = 4;
using Part = float4;
DEVICE void unpack_part(float (&x)[WIDTH], Part part) { x[0] = part.x, x[1] = part.y, x[2] = part.z, x[3] = part.w; }
#endif
constexpr int PARTS_AT_ONCE = 32 / WIDTH, MERGERS = 512;

// Sums relative to the largest score, `top`, of all that has been added.
struct Merged {
  float top, total, x[WIDTH];
  DEVICE void add(float more, float weight, const float (&part)[WIDTH]) {
    total += more;
#pragma unroll
    for (int i = 0; i < WIDTH; i++) x[i] += weight * part[i];
  }
};

extern "C" __global__ void __launch_bounds__(MERGERS) merge(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) float partial[];  // [groups][channels], and [groups] of (top, total)
  const int pairs = p.batches * p.rows;
  const int ctas = gridDim.x / pairs, lanes = L / WIDTH / ctas;  // of a row, of a CTA
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const int at = blockIdx.x / ctas;
  const int channel = WIDTH * (blockIdx.x % ctas * lanes + lane);
  const Part* from = reinterpret_cast<const Part*>(p.part) + (static_cast<i64>(at) * L + channel) / WIDTH;
  const float2* given = reinterpret_cast<const float2*>(p.sums) + at;
  float2* weights = reinterpret_cast<float2*>(partial + groups * lanes * WIDTH);
  let_next_kernel_start();  // it waits for the end of this one, and its launch takes time that passes here
  wait_for_previous_kernel();
  Part values[PARTS_AT_ONCE];
  float2 sums[PARTS_AT_ONCE];
  float top = -INFINITE;
#pragma unroll
  for (int i = 0; i < PARTS_AT_ONCE; i++) {
    const int part = group + i * groups;
    sums[i] = part < p.splits ? given[static_cast<i64>(part) * pairs] : float2{-INFINITE, 0.0f};
    values[i] = part < p.splits ? from[static_cast<i64>(part) * pairs * (L / WIDTH)] : Part{};
  }
#pragma unroll
  for (int i = 0; i < PARTS_AT_ONCE; i++) top = fmaxf(top, sums[i].x);
  Merged all = {top == -INFINITE ? 0.0f : top};
#pragma unroll
  for (int i = 0; i < PARTS_AT_ONCE; i++) {
    const float share = exp2_(sums[i].x - all.top), more = share * sums[i].y;
    float x[WIDTH];
    unpack_part(x, values[i]);
    all.add(more, AVERAGES ? more : share, x);
  }
  if (groups > 1) {
    float4* to = reinterpret_cast<float4*>(partial + threadIdx.x * WIDTH);
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) to[i / 4] = {all.x[i], all.x[i + 1], all.x[i + 2], all.x[i + 3]};
    if (lane == 0) weights[group] = {top, all.total};
    __syncthreads();
    if (group != 0) return;
    for (int i = 1; i < groups; i++) top = fmaxf(top, weights[i].x);
    all = {top == -INFINITE ? 0.0f : top};
    for (int i = 0; i < groups; i++) {
      const float share = exp2_(weights[i].x - all.top);
      float x[WIDTH];
#pragma unroll
      for (int j = 0; j < WIDTH; j++) x[j] = partial[(i * lanes + lane) * WIDTH + j];
      all.add(share * weights[i].y, share, x);
    }
  }
  const bool some = all.total > 0.0f;
  const float by = some ? 1.0f / all.total : 0.0f;
#pragma unroll
  for (int i = 0; i < WIDTH; i++) all.x[i] *= by;
  store_channels<QUERY>(p.out, static_cast<i64>(at) * L + channel, all.x);
  if (channel != 0) return;
  const int batch = at / p.rows;
  p.lse[lse_of(p, batch, at - batch * p.rows)] = some ? (all.top + log2_(all.total)) / LOG2E : -INFINITE;
}
