// OPTIMIZE_UNROLL before a loop with few, constant iterations over an array of vectors: the array then lives in
// registers from the start. Left to themselves, compilers unroll late and copy all of it in every iteration around it.
#pragma once

#if defined(__clang__)
#define OPTIMIZE_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define OPTIMIZE_UNROLL _Pragma("GCC unroll 32")
#else
#define OPTIMIZE_UNROLL
#endif
