// Codes of latents as operands of sm90.cu's second product.

// Thread g holds bytes 32 warp + 4 g to + 3 of a chunk; code i of these is row g + 8 (i % 2) of block i / 2.
constexpr int CODES = 2 * CHUNK_BLOCKS;
DEVICE int output_channel(int chunk, int warp, int g, int i) {
  if (FORMAT == 0) return 64 * chunk + 16 * warp + g + 8 * i;
  const int byte = 128 * chunk + 32 * warp + 4 * g;
  return NIBBLES ? byte + i / 2 + i % 2 * (L / 2) : byte + i;
}

// Bytes of 4 channels of tokens 2 t + {0, 8, 1, 9} from `tokens` on become 4 tokens of each channel.
DEVICE void turn(u32 (&channel)[4], u32 tokens, u32 even, u32 odd) {
  const u32 w0 = read<u32>(tokens + even), w1 = read<u32>(tokens + even + 1024);
  const u32 w2 = read<u32>(tokens + odd), w3 = read<u32>(tokens + odd + 1024);
  const u32 a = __byte_perm(w0, w1, 0x5140), b = __byte_perm(w2, w3, 0x5140);
  const u32 c = __byte_perm(w0, w1, 0x7362), d = __byte_perm(w2, w3, 0x7362);
  channel[0] = __byte_perm(a, b, 0x5410), channel[1] = __byte_perm(a, b, 0x7632);
  channel[2] = __byte_perm(c, d, 0x5410), channel[3] = __byte_perm(c, d, 0x7632);
}

// 8-bit operand of block k of a chunk, of 4 channels of 16 and 16 tokens. A nibble as a byte is an E4M3 number, 2^-9 of
// it.
DEVICE void block_operand(u32 (&a)[4], const u32 (&low)[4], const u32 (&high)[4], int k) {
  if (NIBBLES) {
    a[0] = low[k] & 0x0F0F0F0Fu, a[1] = low[k] >> 4 & 0x0F0F0F0Fu;
    a[2] = high[k] & 0x0F0F0F0Fu, a[3] = high[k] >> 4 & 0x0F0F0F0Fu;
  } else {
    a[0] = low[2 * k % 4], a[1] = low[(2 * k + 1) % 4], a[2] = high[2 * k % 4], a[3] = high[(2 * k + 1) % 4];
  }
}
