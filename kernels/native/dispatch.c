/* The library's interface: plain C functions that call the chosen instruction set's kernels. */
#include "common.h"

static const isobit_kernels *active;

static const isobit_kernels *find(const char *name) {
  const isobit_kernels *usable[3] = {0};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f")) usable[0] = &isobit_avx512;
  if (avx2) usable[1] = &isobit_avx2;
#elif defined(__aarch64__)
  usable[2] = &isobit_neon;
#endif
  for (int i = 0; i < 3; i++)
    if (usable[i] != NULL && (name == NULL || strcmp(name, usable[i]->name) == 0)) return usable[i];
  return NULL;
}

/* Use the named instruction set, or the widest there is for NULL; -1 where the CPU lacks it. */
int isobit_set_isa(const char *name) {
  const isobit_kernels *found = find(name);
  if (found == NULL) return -1;
  active = found;
  return 0;
}

const char *isobit_isa(void) { return active->name; }

void isobit_linear(const float *x, const void *packed, int is_bf16, float *out, int64_t m,
                   int64_t n, int64_t k, int threads) {
  active->linear(x, packed, is_bf16, out, m, n, k, threads);
}

/* Columns start … stop - 1 by the contract's own loop: blocks of k, one scalar fma at a time. */
void isobit_linear_canonical(const float *x, const void *packed, int is_bf16, float *out, int64_t m,
                             int64_t start, int64_t stop, int64_t k) {
  for (int64_t r = 0; r < m; r++)
    for (int64_t c = start; c < stop; c++) {
      const int64_t base = c / PANEL * PANEL * k + c % PANEL;
      float total = 0.0f;
      for (int64_t i = 0; i < k;) {
        const int64_t end = min_i64(i + K_BLOCK, k);
        float acc = 0.0f;
        for (; i < end; i++) {
          const float w = is_bf16 ? widen_bf16(((const uint16_t *)packed)[base + i * PANEL])
                                  : ((const float *)packed)[base + i * PANEL];
          acc = fmaf(x[r * k + i], w, acc);
        }
        total += acc;
      }
      out[r * (stop - start) + c - start] = total;
    }
}

void isobit_rms_norm(const float *x, float *out, int64_t rows, int64_t hidden, float eps,
                     int threads) {
  active->rms_norm(x, out, rows, hidden, eps, threads);
}

void isobit_rope(const float *x, int64_t token_stride, const float *cos_sin,
                 const int64_t *positions, float *out, int64_t tokens, int64_t heads, int64_t dim,
                 int threads) {
  active->rope(x, token_stride, cos_sin, positions, out, tokens, heads, dim, threads);
}

void isobit_silu_mul(const float *gate_up, float *out, int64_t rows, int64_t width, int threads) {
  active->silu_mul(gate_up, out, rows, width, threads);
}

void isobit_log_softmax(const float *logits, float *out, int64_t rows, int64_t vocab, int threads) {
  active->log_softmax(logits, out, rows, vocab, threads);
}

void isobit_gumbel(const int64_t *seeds, const int64_t *choices, const int64_t *positions,
                   float *out, int64_t rows, int64_t vocab, int threads) {
  active->gumbel(seeds, choices, positions, out, rows, vocab, threads);
}

/* 0, or -1 where memory ran out. */
int isobit_paged_attention(const float *q, const void *k_cache, const void *v_cache, int is_bf16,
                           int64_t page_stride, const int32_t *block_table, int64_t table_stride,
                           const int32_t *cu_seqlens_q, const int32_t *seq_lens, int64_t num_seqs,
                           int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
                           int64_t page_size, float scale, float *out, int threads) {
  const attention_args args = {
      .q = q, .k_cache = k_cache, .v_cache = v_cache, .is_bf16 = is_bf16,
      .page_stride = page_stride, .block_table = block_table, .table_stride = table_stride,
      .cu_seqlens_q = cu_seqlens_q, .seq_lens = seq_lens, .num_seqs = num_seqs,
      .num_q_heads = num_q_heads, .num_kv_heads = num_kv_heads, .head_dim = head_dim,
      .page_size = page_size, .scale = scale, .out = out};
  return active->paged_attention(&args, threads);
}
