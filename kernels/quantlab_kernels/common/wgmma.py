"""Source text of the warpgroup MMA instruction, whose operand list depends on N and is too long to write by hand."""

from __future__ import annotations


def wgmma_source(n: int) -> str:
    """CUDA C++ of ``wgmma(d, a, b, accumulate)``: d[64, n] (+)= a[64, 32] @ b[n, 32]^T, E4M3 operands in shared memory.

    n           8, 16, ... 256
    d           float[n / 2] of each thread: d[4 * j + {0, 1}] is row lane / 4 of its warp's 16 rows, columns
                8 * j + 2 * (lane % 4) + {0, 1}; d[4 * j + {2, 3}] the same columns, eight rows below
    a, b        descriptors (`wgmma_descriptor`)
    accumulate  0 overwrites d, 1 adds to it
    """
    if n % 8 or not 8 <= n <= 256:
        raise ValueError(f"wgmma: n = {n}, needs a multiple of 8 from 8 to 256")
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""
DEVICE void wgmma(float (&d)[{count}], u64 a, u64 b, int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 "
               "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1;\\n}}"
               : {operands}
               : "l"(a), "l"(b), "r"(accumulate));
}}
"""


def wgmma_variant(
    name: str,
    n: int,
    accumulator: str,
    a: str,
    b: str,
    *,
    registers: bool,
    turned: bool = False,
    turned_b: bool = False,
) -> str:
    """CUDA C++ of ``name(d, a, b, accumulate)`` for other operands than `wgmma_source`'s.

    accumulator  "s32" (d is int[n / 2]) or "f32" (float[n / 2]), in the layout of `wgmma_source`
    a, b         "s8", "u8", "e4m3" (k = 32), "f16" or "bf16" (k = 16)
    registers    a is ``const u32 (&)[4]``: rows lane / 4 and 8 below, bytes 4 * (lane % 4) of the first half of k, then
                 the same two rows of the second half; else a descriptor. b is always a descriptor
    turned       a in shared memory lies with its 64 rows side by side, 8 of k every 1024 bytes; 16 bits only
    turned_b     b lies with its n side by side, 64 of them in a row; 16 bits and both in shared memory only
    """
    count, kind = n // 2, "int" if accumulator == "s32" else "float"
    k = 16 if a.endswith("f16") else 32
    constraint = "r" if accumulator == "s32" else "f"
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(count))
    width = 4 if registers else 1
    source = f"{{{', '.join(f'%{count + i}' for i in range(4))}}}" if registers else f"%{count}"
    flags = "" if accumulator == "s32" else ", 1, 1, 0" if registers and k == 16 else ", 1, 1"
    flags += f", {int(turned)}, {int(turned_b)}" if not registers and k == 16 else ""
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if registers else '"l"(a)'
    return f"""
DEVICE void {name}({kind} (&d)[{count}], {"const u32 (&a)[4]" if registers else "u64 a"}, u64 b, int accumulate) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + width + 1}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{n}k{k}.{accumulator}.{a}.{b} "
               "{{{sums}}}, {source}, %{count + width}, p{flags};\\n}}"
               : {outputs}
               : {inputs}, "l"(b), "r"(accumulate));
}}
"""
