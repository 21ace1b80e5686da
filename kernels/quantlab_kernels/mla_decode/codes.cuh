// Codes of latents on their way to registers, where the second product wants those of tokens side by side together.

// Of 32 tokens by 16 bytes: bytes 2 g and 2 g + 1 of tokens 2 t + {0, 8, 1, 9}, then of the same 16 below. Every lane
// gives the address of a token's.
DEVICE void turn(u32 (&byte)[4], u32 token) {
  u32 pairs[4];
  load_matrix_x4_transposed(pairs, token);
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    byte[i] = __byte_perm(pairs[i], pairs[i + 1], 0x6240);
    byte[i + 1] = __byte_perm(pairs[i], pairs[i + 1], 0x7351);
  }
}
