// CUDA on the CPU, for tests: the kernels of csrc/kernels/ run unchanged, one fiber a thread and one block at a time.
//
// It sees: wrong results, barriers and warp calls that not all threads reach, shuffles from absent lanes, misaligned
// wide loads, and in shared memory bounds, unwritten elements and races. It cannot see: atomicity between blocks, the
// memory model of global memory, contraction to FMA, CUB, speed.
#pragma once

#include "block.h"
#include "intrinsics.h"
#include "shared.h"
#include "types.h"
