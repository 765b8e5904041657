"""Faults to plant in the kernels: each replaces one piece of text and must make a check of its kernel fail."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    kernel: str  # whose checks must notice
    file: str  # in csrc/kernels/
    search: str  # occurs in the file exactly once
    replace: str
    why: str


FAULTS = (
    Fault(
        "cosine",
        "reduce.cuh",
        "scratch[threadIdx.x / kWarp] = v;\n  __syncthreads();",
        "scratch[threadIdx.x / kWarp] = v;",
        "missing barrier before the warps' results are read",
    ),
    Fault(
        "cosine",
        "reduce.cuh",
        "__shfl_xor_sync(kWholeWarp, v, distance);\n}\n__device__ __forceinline__ i64",
        "__shfl_xor_sync(0xffffu, v, distance);\n}\n__device__ __forceinline__ i64",
        "wrong lane mask",
    ),
    Fault("cosine", "reduce.cuh", "distance = kWarp / 2;", "distance = kWarp / 4;", "reduction over half a warp"),
    Fault("cosine", "reduce.cuh", "warp = 1; warp < kWarps", "warp = 1; warp < kWarps - 1", "last warp left out"),
    Fault("cosine", "cosine.cuh", "for (i64 d = scalar_from + first;", "for (i64 d = scalar_from + first + 1;", "tail"),
    Fault("cosine", "cosine.cuh", "if (t >= s.T) return;", "if (t > s.T) return;", "one row too many"),
    Fault("cosine", "cosine.cuh", "if (m.xx == 0 || m.yy == 0) return 0;", "", "zero norm"),
    Fault(
        "cosine",
        "cosine.cuh",
        "m.xy / (sqrt(m.xx) * sqrt(m.yy))",
        "m.xy / sqrt(m.xx * m.yy)",
        "overflow of a product of squares",
    ),
    Fault(
        "cosine",
        "cosine.cuh",
        "const double a = widen(x), b = widen(y);",
        "const float a = widen(x), b = widen(y);",
        "products in fp32",
    ),
    Fault(
        "cosine",
        "cosine.cuh",
        "return aligned(x, x_stride) && aligned(y, y_stride);",
        "return true;",
        "16-byte loads from anywhere",
    ),
    Fault(
        "gram",
        "gram.cuh",
        "threadIdx.x] = sum;\n  __syncthreads();",
        "threadIdx.x] = sum;",
        "missing barrier in the column sums",
    ),
    Fault("gram", "gram.cuh", "lane < kRowLanes; ++lane", "lane < kRowLanes - 1; ++lane", "last row lane left out"),
    Fault("gram", "gram.cuh", "begin + kSlice < T ? begin + kSlice : T", "begin + kSlice", "rows past the end"),
    Fault("gram", "gram.cuh", "if (j > i) return;", "if (j >= i) return;", "diagonal left out"),
    Fault(
        "gram",
        "gram.cuh",
        "gram[j * N + i] = tile[column * (kTile + 1) + row];",
        "gram[j * N + i] = tile[row * (kTile + 1) + column];",
        "tile not turned",
    ),
    Fault(
        "gram",
        "gram.cuh",
        "  __syncthreads();\n  for (int row = static_cast<int>(threadIdx.y)",
        "  for (int row = static_cast<int>(threadIdx.y)",
        "missing barrier in the mirror",
    ),
    Fault("gram", "gram.cuh", "if (blockIdx.x > blockIdx.y) return;", "if (blockIdx.x >= blockIdx.y) return;", "tiles"),
    Fault(
        "gram",
        "gram.cuh",
        "source.T == 1 ? N : source.stride",
        "source.stride",
        "a leading dimension below the rows of the matrix",
    ),
    Fault("gram", "gram.cuh", "source.x + begin * stride", "source.x", "the first chunk again and again"),
    Fault("gram", "gram.cuh", "std::min(kChunk, source.T - begin)", "kChunk", "rows past the end in the last chunk"),
    Fault("matrices", "matrices.cuh", "if (column >= B * n) return;", "", "columns past the end"),
    Fault("matrices", "matrices.cuh", "upper ? j + 1 : m", "m", "the triangle that is not read"),
    Fault("matrices", "matrices.cuh", "upper ? j + 1 : m", "upper ? j : m", "the diagonal left out"),
    Fault("matrices", "matrices.cuh", "upper ? j + 1 : m", "j + 1", "rows below the diagonal left out"),
    Fault("matrices", "matrices.cuh", "i < rows; i += kWarp", "i < rows; i += 2 * kWarp", "half of the rows left out"),
    Fault("matrices", "matrices.cuh", "finite && isfinite(", "isfinite(", "only a lane's last row counts"),
    Fault("matrices", "matrices.cuh", "(B - b)", "(b + 1)", "the last bad matrix instead of the first"),
    Fault("matrices", "matrices.cuh", "a[column * m + i]", "a[j * m + i]", "the first matrix again and again"),
    Fault(
        "matrices",
        "matrices.cuh",
        "tile[lane * (kTurnSide + 1) + row];",
        "tile[row * (kTurnSide + 1) + lane];",
        "tile not turned",
    ),
    Fault(
        "matrices",
        "matrices.cuh",
        "  __syncthreads();\n  for (int row",
        "  for (int row",
        "missing barrier while a square is turned",
    ),
    Fault("matrices", "matrices.cuh", "row < n && i0 + lane < n) target", "row < n) target", "columns past the edge"),
    Fault("topk", "topk.cuh", "if (score == 0) score = 0;", "", "-0.0 below 0.0: ties no longer by index"),
    Fault(
        "topk",
        "topk.cuh",
        "return bits & kSign ? bits : ~(bits | kSign);",
        "return bits & kSign ? ~bits : (bits | kSign);",
        "ascending scores",
    ),
    Fault(
        "topk",
        "topk.cuh",
        "std::is_same_v<Score, double>, std::uint64_t, std::uint32_t>",
        "false, std::uint64_t, std::uint32_t>",
        "keys cut to 32 bits",
    ),
    Fault(
        "topk",
        "segments.cuh",
        "return is_dense(r) ? dense_cost : r * unit(r);",
        "return r * unit(r);",
        "no dense cap on the price",
    ),
    Fault("topk", "segments.cuh", "return is_dense(r) ? K : r;", "return r;", "dense ranks not reported as K"),
    Fault("topk", "segments.cuh", "pivoted ? cost - r : cost", "cost", "pivoted storage at the price of two factors"),
    Fault(
        "topk", "segments.cuh", "pivoted ? cost - r : cost", "cost - r", "two factors at the price of pivoted storage"
    ),
    Fault(
        "topk", "segments.cuh", "pivoted ? cost - r : cost", "pivoted ? cost - r - 1 : cost", "unit of the next rank"
    ),
    Fault(
        "topk",
        "segments.cuh",
        "r > (dense_cost - 1) / unit(r)",
        "r > dense_cost / unit(r)",
        "a rank that costs exactly as much as the dense matrix is not dense",
    ),
    Fault(
        "topk",
        "segments.cuh",
        "r > (dense_cost - 1) / unit(r)",
        "r * unit(r) >= dense_cost",
        "a product that overflows",
    ),
    Fault(
        "topk",
        "segments.cuh",
        "? dense_cost - price(r) :",
        "? dense_cost - r * unit(r) :",
        "the step beyond a dense rank is not free",
    ),
    Fault("topk", "topk.cuh", "cost / 2 < s.K", "cost / 2 <= s.K", "the least legal cost is refused"),
    Fault("topk", "topk.cuh", "p.pivoted && cost / 2 < s.K", "false", "too small a cost for pivoted storage"),
    Fault("topk", "segments.cuh", "if (p.offsets[middle] <= c)", "if (p.offsets[middle] < c)", "segment of its first"),
    Fault(
        "topk", "segments.cuh", "(dense_high + (dense_low >> 32)) >> 31", "dense_high >> 31", "carry of the sum lost"
    ),
    Fault(
        "topk", "topk.cuh", "if (r >= floor[l]) steps", "if (r > floor[l]) steps", "first step beyond the floor is free"
    ),
    Fault(
        "topk", "topk.cuh", "b.score > a.score : b.l < a.l", "b.score > a.score : b.l > a.l", "ties by later segment"
    ),
    Fault(
        "topk",
        "topk.cuh",
        "next[best.l] = -kInfinity;",
        "next[best.l] = next_score(s, target);",
        "a refused segment stays open",
    ),
    Fault(
        "topk",
        "topk.cuh",
        "    }\n    __syncthreads();\n  }\n}",
        "    }\n  }\n}",
        "missing barrier in the residual fill",
    ),
    Fault(
        "topk", "topk.cuh", "r = rounded < floor[l] ? floor[l] : rounded;", "r = rounded;", "rounded below the floor"
    ),
    Fault("topk", "topk.cuh", "*status = {kNone,", "  __syncthreads();\n    *status = {kNone,", "barrier in a branch"),
)
