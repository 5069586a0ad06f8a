/* What the instruction sets share: the table of kernels that each of them fills.
 *
 * Every kernel is written once, in linear.h, rowwise.h and attention.h, and compiled once for each
 * instruction set. All of them do the same IEEE operations in the same order, so the bits are
 * equal. Each fused multiply-add is written as one; the build turns contraction off. */
#ifndef ISOBIT_COMMON_H
#define ISOBIT_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 32   /* columns of a weight that are packed side by side */
#define K_BLOCK 64 /* terms of a sum that go into one accumulator */
#define KV_TILE 64 /* positions of one step of the online softmax */
#define INLINE static inline __attribute__((always_inline))

/* A paged KV cache and the sequences that read it. Strides count elements. */
typedef struct {
  const float *q; /* [tokens, num_q_heads, head_dim] */
  const void *k_cache, *v_cache; /* [pages, page_size, num_kv_heads, head_dim] */
  int is_bf16;
  int64_t page_stride;
  const int32_t *block_table; /* [num_seqs, table_stride] */
  int64_t table_stride;
  const int32_t *cu_seqlens_q, *seq_lens;
  int64_t num_seqs, num_q_heads, num_kv_heads, head_dim, page_size;
  float scale;
  float *out; /* [tokens, num_q_heads, head_dim] */
} attention_args;

typedef struct {
  const char *name;
  void (*linear)(const float *x, const void *packed, int is_bf16, float *out, int64_t m, int64_t n,
                 int64_t k, int threads);
  void (*rms_norm)(const float *x, float *out, int64_t rows, int64_t hidden, float eps,
                   int threads);
  void (*rope)(const float *x, int64_t token_stride, const float *cos_sin,
               const int64_t *positions, float *out, int64_t tokens, int64_t heads, int64_t dim,
               int threads);
  void (*silu_mul)(const float *gate_up, float *out, int64_t rows, int64_t width, int threads);
  void (*log_softmax)(const float *logits, float *out, int64_t rows, int64_t vocab, int threads);
  void (*gumbel)(const int64_t *seeds, const int64_t *choices, const int64_t *positions, float *out,
                 int64_t rows, int64_t vocab, int threads);
  int (*paged_attention)(const attention_args *args, int threads);
} isobit_kernels;

extern const isobit_kernels isobit_avx512, isobit_avx2, isobit_neon;

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE float widen_bf16(uint16_t b) {
  uint32_t bits = (uint32_t)b << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

/* Threads worth waking for `work` elementary steps. */
INLINE int useful_threads(int64_t work, int threads) { return work < 16384 ? 1 : threads; }

#endif
