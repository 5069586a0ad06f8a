/* The register tile under linear and attention.
 *
 * Contract: k is cut into blocks of K_BLOCK. In each, one accumulator for each (r, c) starts from
 * zero and takes fma(x[r][k], w[k][c], acc) for k ascending; the blocks' sums are added, ascending,
 * to a total that starts from zero or from what `out` holds. Blocks keep the rounding error of long
 * sums down. The tile's size changes no bit. */

typedef struct {
  const float *x; /* x[r][k] at r * row + k * step */
  int64_t row, step;
  const void *w; /* w[k][c] at k * ldw + c; fp32 or bf16 */
  int64_t ldw;
  float *out; /* out[r][c] at r * ldo + c */
  int64_t ldo;
  int64_t k;
} tile_args;

#define UNROLL _Pragma("GCC unroll 16")

INLINE void tile(const int rows, const int vecs, const int is_bf16, const int accumulate,
                 const tile_args *t) {
  v16 acc[TILE_ROWS][TILE_VECS], total[TILE_ROWS][TILE_VECS];
  const int64_t row = t->row, step = t->step, ldw = t->ldw, depth = t->k;
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vecs; v++)
      total[r][v] = accumulate ? v16_load(t->out + r * t->ldo + v * 16) : v16_zero();
  const float *x = t->x;
  const float *w_f32 = t->w;
  const uint16_t *w_bf16 = t->w;
  for (int64_t k = 0; k < depth;) {
    const int64_t stop = min_i64(k + K_BLOCK, depth);
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vecs; v++)
        acc[r][v] = v16_zero();
    for (; k < stop; k++, x += step) {
      v16 b[TILE_VECS];
      UNROLL for (int v = 0; v < vecs; v++)
          b[v] = is_bf16 ? v16_load_bf16(w_bf16 + k * ldw + v * 16)
                         : v16_load(w_f32 + k * ldw + v * 16);
      UNROLL for (int r = 0; r < rows; r++) {
        v16 a = v16_fill(x[r * row]);
        UNROLL for (int v = 0; v < vecs; v++) acc[r][v] = v16_fma(a, b[v], acc[r][v]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vecs; v++)
        total[r][v] = v16_add(total[r][v], acc[r][v]);
  }
  UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vecs; v++)
      v16_store(t->out + r * t->ldo + v * 16, total[r][v]);
}

/* `rows` made a constant, so that the accumulators live in registers. */
INLINE void tile_rows(const int rows, const int vecs, const int is_bf16, const int accumulate,
                      const tile_args *t) {
#define CASE(R)                                                                                    \
  case R:                                                                                          \
    if (R <= TILE_ROWS) tile(R, vecs, is_bf16, accumulate, t);                                     \
    break;
  switch (rows) {
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
  }
#undef CASE
}

/* Rows per tile such that `m` rows fall into tiles of nearly equal height. */
INLINE int64_t even_rows(int64_t m) { return ceil_div(m, ceil_div(m, TILE_ROWS)); }

/* out[m][n] += x w, or = x w where `accumulate` is 0; n a multiple of 16, w fp32, k above 0. */
static void product(int64_t m, int64_t n, int accumulate, const tile_args *whole) {
  if (m == 0 || whole->k == 0) return; /* adding nothing must not turn -0 into +0 */
  const int64_t height = even_rows(m);
  for (int64_t c = 0; c < n;) {
    const int vecs = n - c >= 16 * TILE_VECS ? TILE_VECS : 1;
    for (int64_t r = 0; r < m; r += height) {
      tile_args t = *whole;
      t.x += r * t.row;
      t.w = (const float *)t.w + c;
      t.out += r * t.ldo + c;
      const int rows = (int)min_i64(height, m - r);
      if (vecs == 1 && accumulate) tile_rows(rows, 1, 0, 1, &t);
      else if (vecs == 1) tile_rows(rows, 1, 0, 0, &t);
      else if (accumulate) tile_rows(rows, TILE_VECS, 0, 1, &t);
      else tile_rows(rows, TILE_VECS, 0, 0, &t);
    }
    c += 16 * vecs;
  }
}
