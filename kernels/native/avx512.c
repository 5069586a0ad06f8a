/* The kernels for x86-64 with AVX-512F. Only dispatch.c may decide to call them. */
#include "common.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx2,fma")
#endif
#define ISA_AVX512
#define TABLE isobit_avx512
#define TABLE_NAME "avx512"
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
