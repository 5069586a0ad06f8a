/* The kernels for x86-64 with AVX2 and FMA. Only dispatch.c may decide to call them. */
#include "common.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ISA_AVX2
#define TABLE isobit_avx2
#define TABLE_NAME "avx2"
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
