/* The kernels for aarch64, where NEON and its fused multiply-add are always there. */
#include "common.h"

#if defined(__aarch64__)
#define ISA_NEON
#define TABLE isobit_neon
#define TABLE_NAME "neon"
#include "kernels.h"
#endif
