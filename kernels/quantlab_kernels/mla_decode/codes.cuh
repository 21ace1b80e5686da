// Codes of latents as operands of sm90.cu's products: float16 fragments in registers.

DEVICE u32 fp8_upper_pair(u32 pair) {
  u32 r;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.rn.f16x2.e4m3x2 %0, b;}" : "=r"(r) : "r"(pair));
  return r;
}

// Scores: thread t of a row holds bytes 32 t to 32 t + 31 of a chunk's 128, and makes its k-steps of 16 of them in order.
constexpr int STEPS = 4 * CHUNK_BLOCKS;  // of a chunk
constexpr bool HALVES = FORMAT == 3;     // of channels: a byte holds channels j and j + L / 2

// k-step and element (of 16) in which a channel is contracted.
DEVICE void scores_place(int channel, int& step, int& element) {
  if (FORMAT == 0) {
    step = channel / 16, element = channel % 16;
    return;
  }
  const int byte = HALVES ? channel % (L / 2) : channel;
  const int chunk = byte / 128, t = byte / 32 % 4, word = byte / 4 % 8, in = byte % 4;
  if (HALVES) {  // a byte's low nibble is in the first half of a step, its high one in the second
    step = chunk * STEPS + 2 * word + in % 2;
    element = 8 * (channel / (L / 2)) + 2 * t + in / 2;
  } else {
    step = chunk * STEPS + word;
    element = 8 * (in / 2) + 2 * t + in % 2;
  }
}
// The operand of a code is (unit code + base); queries are divided by the unit.
DEVICE float scores_unit(int channel) { return !HALVES ? 1.0f : channel < L / 2 ? 0.5f : 8.0f; }
DEVICE float scores_base(int channel) {
  return FORMAT == 2 ? 1152.0f : HALVES ? 1024.0f + 15.0f * scores_unit(channel) : 0.0f;
}
// Registers of row half `r` in k-step `step` of a chunk.
DEVICE void scores_operand(u32 (&a)[4], const u32 (&words)[8], int r, int step) {
  if constexpr (FORMAT == 3) {
    const u32 w = words[step / 2] >> (8 * (step % 2));
    a[r] = spread(w, 0x000F000Fu, 0x64006400u);
    a[2 + r] = spread(w, 0x00F000F0u, 0x64006400u);
  } else if constexpr (FORMAT == 2) {
    const u32 w = words[step] ^ 0x80808080u;
    a[r] = __byte_perm(w, 0x64646464u, 0x4140);
    a[2 + r] = __byte_perm(w, 0x64646464u, 0x4342);
  } else {
    a[r] = fp8_pair(words[step]);
    a[2 + r] = fp8_upper_pair(words[step]);
  }
}

// Outputs: thread g holds bytes 32 warp + 4 g to + 3 of a chunk; code i of these four is row g + 8 (i % 2) of block i / 2.
constexpr int CODES = 2 * CHUNK_BLOCKS;
DEVICE int output_channel(int chunk, int warp, int g, int i) {
  if (FORMAT == 0) return 64 * chunk + 16 * warp + g + 8 * i;
  const int byte = 128 * chunk + 32 * warp + 4 * g;
  return HALVES ? byte + i / 2 + i % 2 * (L / 2) : byte + i;
}
// Codes 4 part to + 3 of a word of two tokens: register i holds code i of both.
DEVICE void output_operand(u32 (&r)[4], u32 a, u32 b, int part) {
  if constexpr (FORMAT == 3) {
    const u32 w = __byte_perm(a, b, part ? 0x7632 : 0x5410);
    r[0] = minus(spread(w << 1, 0x001E001Eu, 0x64006400u), 0x640F640Fu);
    r[1] = times_plus(spread(w, 0x00F000F0u, 0x64006400u), 0x30003000u, 0xD878D878u);
    r[2] = minus(spread(w >> 7, 0x001E001Eu, 0x64006400u), 0x640F640Fu);
    r[3] = times_plus(spread(w >> 8, 0x00F000F0u, 0x64006400u), 0x30003000u, 0xD878D878u);
  } else if constexpr (FORMAT == 2) {
    int8_turned(r, a, b);
  } else if constexpr (FORMAT == 1) {
    const u32 low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
    r[0] = fp8_pair(low);
    r[1] = fp8_upper_pair(low);
    r[2] = fp8_pair(high);
    r[3] = fp8_upper_pair(high);
  }
}
