/* Causal grouped-query attention over pages; the contract is in attention.py.
 *
 * A task is one KV head of one sequence and a block of its query tokens. Its rows are packed
 * token by token, each token bringing the heads that share the KV head. Scores are kept as
 * s[position][row]: a vector then holds sixteen rows of one position, so the softmax needs no
 * horizontal step and K no transposition. */

#define ROWS_PER_TASK 192

typedef struct {
  int64_t seq, kv_head, first_token, tokens;
} attention_task;

typedef struct {
  float *q;          /* [head_dim][rows], transposed */
  float *s;          /* [KV_TILE][rows]: scores, then weights */
  float *k, *v;      /* [KV_TILE][head_dim], [KV_TILE][dim16] */
  float *o;          /* [rows][dim16] */
  float *m, *l, *alpha; /* [rows] */
  int32_t *count;    /* [rows]: positions of the tile that the row sees */
} attention_scratch;

INLINE int64_t round_up_16(int64_t a) { return (a + 15) & ~(int64_t)15; }

static int64_t scratch_floats(int64_t rows, int64_t dim) {
  const int64_t dim16 = round_up_16(dim);
  return round_up_16(rows * dim + KV_TILE * (rows + dim + dim16) + rows * (dim16 + 4));
}

static attention_scratch split_scratch(float *p, int64_t rows, int64_t dim) {
  const int64_t dim16 = round_up_16(dim);
  attention_scratch w;
  w.q = p, p += rows * dim;
  w.s = p, p += KV_TILE * rows;
  w.k = p, p += KV_TILE * dim;
  w.v = p, p += KV_TILE * dim16;
  w.o = p, p += rows * dim16;
  w.m = p, p += rows;
  w.l = p, p += rows;
  w.alpha = p, p += rows;
  w.count = (int32_t *)p;
  return w;
}

INLINE void widen(float *restrict to, const void *from, int64_t index, int is_bf16, int64_t n) {
  const float *restrict f32 = (const float *)from + index;
  const uint16_t *restrict bf16 = (const uint16_t *)from + index;
  if (is_bf16) for (int64_t i = 0; i < n; i++) to[i] = widen_bf16(bf16[i]);
  else for (int64_t i = 0; i < n; i++) to[i] = f32[i];
}

/* K and V of positions first … first + n - 1. */
static void gather(const attention_args *a, const attention_task *t, int64_t first, int64_t n,
                   attention_scratch *w) {
  const int64_t dim = a->head_dim, dim16 = round_up_16(dim), stride = a->num_kv_heads * dim;
  const int32_t *pages = a->block_table + t->seq * a->table_stride;
  int64_t page = first / a->page_size, offset = first % a->page_size;
  for (int64_t j = 0; j < n; page++, offset = 0) {
    int64_t index = pages[page] * a->page_stride + offset * stride + t->kv_head * dim;
    for (; j < n && offset < a->page_size; j++, offset++, index += stride) {
      widen(w->k + j * dim, a->k_cache, index, a->is_bf16, dim);
      widen(w->v + j * dim16, a->v_cache, index, a->is_bf16, dim);
    }
  }
}

/* One step of the online softmax over s[n][rows]: m, l and alpha move on, s becomes the weights.
 * A position hidden from a row gets the score -inf, hence the weight zero. */
static void softmax_step(const attention_scratch *w, int64_t n, int64_t rows, float scale) {
  for (int64_t r = 0; r < rows; r += 16) {
    float *s = w->s + r, *alpha = w->alpha + r, *m = w->m + r, *l = w->l + r, sum[16];
    const v16 old = v16_load(m);
    v16 top = old, total = v16_zero();
    for (int64_t j = 0; j < n; j++) {
      const v16 scaled = v16_mul(v16_load(s + j * rows), v16_fill(scale));
      v16_store(s + j * rows, scaled);
    }
    for (int i = 0; i < 16; i++)
      for (int64_t j = w->count[r + i]; j < n; j++) s[j * rows + i] = -INFINITY;
    for (int64_t j = 0; j < n; j++) top = v16_max(v16_load(s + j * rows), top);
    v16_store(m, top);
    v16_store(alpha, old);
    for (int i = 0; i < 16; i++) alpha[i] = exp_f32(alpha[i] - m[i]);
    for (int64_t j = 0; j < n; j++) {
      float *restrict p = s + j * rows;
      for (int i = 0; i < 16; i++) p[i] = exp_f32(p[i] - m[i]);
    }
    for (int64_t j = 0; j < n; j++) total = v16_add(total, v16_load(s + j * rows));
    v16_store(sum, total);
    for (int i = 0; i < 16; i++) l[i] = __builtin_fmaf(l[i], alpha[i], sum[i]);
  }
}

/* o[first_row + i] += sum_j s[j][first_row + i] v[j] for i < m, j < n. */
static void add_values(const attention_scratch *w, int64_t first_row, int64_t m, int64_t n,
                       int64_t rows, int64_t dim16) {
  const tile_args t = {.x = w->s + first_row, .row = 1, .step = rows, .w = w->v, .ldw = dim16,
                       .out = w->o + first_row * dim16, .ldo = dim16, .k = n};
  product(m, dim16, 1, &t);
}

static void attend(const attention_args *a, const attention_task *t, attention_scratch *w) {
  const int64_t group = a->num_q_heads / a->num_kv_heads, dim = a->head_dim;
  const int64_t dim16 = round_up_16(dim), used = t->tokens * group, rows = round_up_16(used);
  const int64_t begin = a->cu_seqlens_q[t->seq], end = a->cu_seqlens_q[t->seq + 1];
  const int64_t position = a->seq_lens[t->seq] - (end - begin) + t->first_token;
  const int64_t row0 = (begin + t->first_token) * a->num_q_heads + t->kv_head * group;

  memset(w->q, 0, sizeof(float) * (size_t)(rows * dim));
  for (int64_t i = 0; i < used; i++) {
    const float *q = a->q + (row0 + i / group * a->num_q_heads + i % group) * dim;
    for (int64_t d = 0; d < dim; d++) w->q[d * rows + i] = q[d];
  }
  memset(w->o, 0, sizeof(float) * (size_t)(rows * dim16));
  memset(w->v, 0, sizeof(float) * (size_t)(KV_TILE * dim16));
  for (int64_t r = 0; r < rows; r++) w->m[r] = -INFINITY, w->l[r] = 0.0f;

  for (int64_t first = 0; first < position + t->tokens; first += KV_TILE) {
    const int64_t n = min_i64(KV_TILE, position + t->tokens - first);
    for (int64_t r = 0; r < rows; r++)
      w->count[r] = (int32_t)max_i64(0, min_i64(n, position + r / group + 1 - first));
    gather(a, t, first, n, w);
    const tile_args scores = {.x = w->k, .row = dim, .step = 1, .w = w->q, .ldw = rows,
                              .out = w->s, .ldo = rows, .k = dim};
    product(n, rows, 0, &scores);
    softmax_step(w, n, rows, a->scale);
    for (int64_t r = 0; r < used; r++)
      for (int64_t d = 0; d < dim16; d++) w->o[r * dim16 + d] *= w->alpha[r];
    /* Tokens on the diagonal one by one, with exactly the positions they see; the rest at once. */
    int64_t token = 0;
    for (; token < t->tokens && w->count[token * group] < n; token++)
      add_values(w, token * group, group, w->count[token * group], rows, dim16);
    add_values(w, token * group, used - token * group, n, rows, dim16);
  }
  for (int64_t i = 0; i < used; i++) {
    float *to = a->out + (row0 + i / group * a->num_q_heads + i % group) * dim;
    for (int64_t d = 0; d < dim; d++) to[d] = w->o[i * dim16 + d] / w->l[i];
  }
}

/* The tasks, longest context first within a sequence; NULL where memory ran out. */
static attention_task *list_tasks(const attention_args *a, int64_t block, int64_t *count) {
  int64_t n = 0;
  for (int64_t b = 0; b < a->num_seqs; b++)
    n += ceil_div(a->cu_seqlens_q[b + 1] - a->cu_seqlens_q[b], block) * a->num_kv_heads;
  *count = n;
  attention_task *tasks = malloc(sizeof *tasks * (size_t)max_i64(n, 1));
  if (tasks == NULL) return NULL;
  n = 0;
  for (int64_t b = 0; b < a->num_seqs; b++) {
    const int64_t tokens = a->cu_seqlens_q[b + 1] - a->cu_seqlens_q[b];
    for (int64_t i = ceil_div(tokens, block) - 1; i >= 0; i--)
      for (int64_t h = 0; h < a->num_kv_heads; h++)
        tasks[n++] = (attention_task){b, h, i * block, min_i64(block, tokens - i * block)};
  }
  return tasks;
}

/* 0, or -1 where memory ran out. */
static int paged_attention(const attention_args *a, int threads) {
  const int64_t group = a->num_q_heads / a->num_kv_heads;
  const int64_t block = max_i64(1, ROWS_PER_TASK / group);
  int64_t count, longest = 1;
  for (int64_t b = 0; b < a->num_seqs; b++)
    longest = max_i64(longest, a->cu_seqlens_q[b + 1] - a->cu_seqlens_q[b]);
  const int64_t rows = round_up_16(min_i64(block, longest) * group);
  const int64_t floats = scratch_floats(rows, a->head_dim);
  attention_task *tasks = list_tasks(a, block, &count);
  float *scratch = aligned_alloc(64, sizeof(float) * (size_t)(floats * threads));
  const int failed = tasks == NULL || scratch == NULL;
  if (!failed) {
#pragma omp parallel num_threads(threads)
    {
      attention_scratch w =
          split_scratch(scratch + omp_get_thread_num() * floats, rows, a->head_dim);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count; i++) attend(a, &tasks[i], &w);
    }
  }
  free(tasks);
  free(scratch);
  return failed ? -1 : 0;
}
