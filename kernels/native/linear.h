/* y = x W^T over a packed weight [ceil(n / 32)][k][32]; contract in linear.py and tile.h.
 *
 * Work is shared out over panels, and over blocks of rows where panels are few; never over k. */

#define TASKS_PER_THREAD 8

INLINE void linear_panel(const float *x, const char *panel, const int is_bf16, float *out,
                         int64_t m, int64_t n, int64_t k, int64_t columns) {
  const int64_t height = even_rows(m), size = is_bf16 ? 2 : 4;
  float edge[TILE_ROWS * PANEL];
  for (int64_t r = 0; r < m; r += height)
    for (int64_t c = 0; c < columns; c += 16 * TILE_VECS) {
      const int64_t rows = min_i64(height, m - r), kept = min_i64(16 * TILE_VECS, columns - c);
      const int partial = kept < 16 * TILE_VECS;
      float *to = out + r * n + c;
      tile_args t = {.x = x + r * k, .row = k, .step = 1, .w = panel + c * size, .ldw = PANEL,
                     .out = partial ? edge : to, .ldo = partial ? PANEL : n, .k = k};
      tile_rows((int)rows, TILE_VECS, is_bf16, 0, &t);
      for (int64_t i = 0; partial && i < rows; i++)
        memcpy(to + i * n, edge + i * PANEL, sizeof(float) * (size_t)kept);
    }
}

static void linear(const float *x, const void *packed, int is_bf16, float *out, int64_t m,
                   int64_t n, int64_t k, int threads) {
  if (m == 0 || n == 0) return;
  const int64_t panels = ceil_div(n, PANEL), panel_bytes = PANEL * k * (is_bf16 ? 2 : 4);
  const int64_t blocks = min_i64(ceil_div(m, 4 * TILE_ROWS), ceil_div(TASKS_PER_THREAD * threads, panels));
  const int64_t height = ceil_div(m, blocks);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < panels * blocks; task++) {
    const int64_t p = task / blocks, first = task % blocks * height;
    const int64_t rows = min_i64(height, m - first), columns = min_i64(PANEL, n - p * PANEL);
    const char *panel = (const char *)packed + p * panel_bytes;
    float *to = out + first * n + p * PANEL;
    if (rows <= 0) continue;
    if (is_bf16) linear_panel(x + first * k, panel, 1, to, rows, n, k, columns);
    else linear_panel(x + first * k, panel, 0, to, rows, n, k, columns);
  }
}
