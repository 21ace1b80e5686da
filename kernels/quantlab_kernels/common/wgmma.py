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
