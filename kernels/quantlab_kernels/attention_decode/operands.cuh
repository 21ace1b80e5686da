// Conversions of codes and 16-bit numbers, loads, and the MMA: what a tile is made of.

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 half2_of(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float low_half(u32 pair) {
  float r;
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(r) : "r"(pair));
  return r;
}
DEVICE float high_half(u32 pair) { return low_half(pair >> 16); }

DEVICE uint4 load16(const char* from) { return *reinterpret_cast<const uint4*>(from); }
DEVICE uint2 load8(const char* from) { return *reinterpret_cast<const uint2*>(from); }
DEVICE float load_float(const char* base, i64 index, int kind) {
  if (kind == 0) return reinterpret_cast<const float*>(base)[index];
  const u32 bits = reinterpret_cast<const u16*>(base)[index];
  return kind == 1 ? as_float(bits << 16) : low_half(bits);
}
DEVICE u32 word_of(const uint4& four, int index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}
// Number `index` of a piece of memory in registers; KIND as in `load_float`.
template <int KIND>
DEVICE float number_of(const u32* words, int index) {
  if (KIND == 0) return as_float(words[index]);
  const u32 word = words[index / 2];
  if (KIND == 1) return as_float(index % 2 ? word & 0xFFFF0000u : word << 16);
  return index % 2 ? high_half(word) : low_half(word);
}
DEVICE void store_float(char* base, i64 index, float x) {
  if (QUERY == 0) {
    reinterpret_cast<float*>(base)[index] = x;
  } else if (QUERY == 1) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
    reinterpret_cast<u16*>(base)[index] = r;
  } else {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
    reinterpret_cast<u16*>(base)[index] = r;
  }
}

// What is not copied is filled with zeros; a constant `valid` costs nothing.
DEVICE void copy4(u32 to, const char* from, bool valid) {
  const int size = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
DEVICE void copy16(u32 to, const char* from, bool valid) {
  const int size = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }
template <int BYTES>
DEVICE void read(u32* words, u32 from) {
  if constexpr (BYTES == 16)
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(from) : "memory");
  else if constexpr (BYTES == 8)
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from) : "memory");
  else
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[0]) : "r"(from) : "memory");
}

DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE u32 transposed(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}
// Keeps a value in its register: the compiler would rather compute addresses anew in every step.
DEVICE void pin(const char*& pointer) { asm volatile("" : "+l"(pointer)); }

// ---- keys: where code `index` of a thread's piece lies in a row, and what value stands for it ----

constexpr int K_CODES = D / 4;      // of a token in a thread: D / 16 k-steps of 4
constexpr int K_STEPS = D / 16;
// Of register `half` of k-step `step`, element `e`.
DEVICE int key_channel(int t, int step, int half, int e) {
  if (KEY == 2) {
    const int nibble = 2 * (step & 1) + half + 4 * e;
    return t * K_BYTES + 4 * (step >> 1) + (nibble >> 1) + (nibble & 1) * (D / 2);
  }
  return t * K_BYTES + 4 * step + 2 * half + e;
}
// A thread's part of a row of D numbers: one run of channels, of INT4 two. Where in it a code's channel lies.
constexpr int K_RUNS = KEY == 2 ? 2 : 1, K_RUN = K_CODES / K_RUNS;
DEVICE int key_place(int step, int half, int e) {
  const int channel = key_channel(0, step, half, e);
  return K_RUNS == 2 ? channel / (D / 2) * K_RUN + channel % (D / 2) : channel;
}
// Where piece `piece` of 16 bytes of that part is in a row of numbers of `BYTES` each.
template <int BYTES>
DEVICE int piece_of(int t, int piece) {
  constexpr int PIECES = K_RUN * BYTES / 16;  // of a run
  return (t * PIECES + piece % PIECES) * 16 + piece / PIECES * (D / 2 * BYTES);
}

// The operand of a code is ``unit * code + base``.
DEVICE float key_unit(int half) { return KEY == 2 && half == 1 ? 16.0f : 1.0f; }
constexpr float KEY_BASE = KEY == 2 ? 1024.0f : KEY == 1 ? 1152.0f : 0.0f;
// Both registers of k-step `step` of a token.
DEVICE void key_operand(u32 (&r)[2], const u32* words, int step) {
  if constexpr (KEY == 2) {
    const u32 w = words[step >> 1] >> (8 * (step & 1));
    r[0] = spread(w, 0x000F000Fu, 0x64006400u);
    r[1] = spread(w, 0x00F000F0u, 0x64006400u);
  } else if constexpr (KEY == 1) {
    const u32 w = words[step] ^ 0x80808080u;
    r[0] = __byte_perm(w, 0x64646464u, 0x4140);
    r[1] = __byte_perm(w, 0x64646464u, 0x4342);
  } else {
    r[0] = fp8_pair(words[step]);
    r[1] = fp8_pair(words[step] >> 16);
  }
}

// ---- values ----

constexpr int V_WORDS = V_BYTES / 4;
constexpr int V_CODES = VALUE == 2 ? 8 : 4;  // of a word
DEVICE int value_channel(int g, int index) {
  if (VALUE == 2) {
    const int nibble = index & 7;
    return g * V_BYTES + (index >> 3) * 4 + (nibble >> 1) + (nibble & 1) * (D / 2);
  }
  return g * V_BYTES + index;
}
// A word of two tokens: register i holds code i of both.
DEVICE void value_operand(u32 (&r)[V_CODES], u32 a, u32 b) {
  if constexpr (VALUE == 2) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
      const u32 w = __byte_perm(a, b, part ? 0x7632 : 0x5410), high = w >> 8;
      r[4 * part] = minus(spread(w, 0x000F000Fu, 0x64006400u), 0x64006400u);
      r[4 * part + 1] = times_plus(spread(w, 0x00F000F0u, 0x64006400u), 0x2C002C00u, 0xD400D400u);
      r[4 * part + 2] = minus(spread(high, 0x000F000Fu, 0x64006400u), 0x64006400u);
      r[4 * part + 3] = times_plus(spread(high, 0x00F000F0u, 0x64006400u), 0x2C002C00u, 0xD400D400u);
    }
  } else if constexpr (VALUE == 1) {
    int8_turned(r, a, b);
  } else {
    const u32 low = __byte_perm(a, b, 0x5140), high = __byte_perm(a, b, 0x7362);
    r[0] = fp8_pair(low);
    r[1] = fp8_pair(low >> 16);
    r[2] = fp8_pair(high);
    r[3] = fp8_pair(high >> 16);
  }
}
