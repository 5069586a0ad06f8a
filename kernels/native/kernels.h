/* All the kernels, for the instruction set whose file includes this. */
#include <omp.h>

#include "simd.h"

#include "elementary.h"
#include "tile.h"

#include "attention.h"
#include "linear.h"
#include "rowwise.h"

const isobit_kernels TABLE = {
    .name = TABLE_NAME,
    .linear = linear,
    .rms_norm = rms_norm,
    .rope = rope,
    .silu_mul = silu_mul,
    .log_softmax = log_softmax,
    .gumbel = gumbel,
    .paged_attention = paged_attention,
};
