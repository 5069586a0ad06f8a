/* Ops whose rows are independent; the contracts are in norm.py, rope.py, activation.py, logits.py
 * and philox.py. */

static void rms_norm(const float *x, float *out, int64_t rows, int64_t hidden, float eps,
                     int threads) {
  const int64_t whole = hidden & ~(int64_t)15;
#pragma omp parallel for schedule(static) num_threads(useful_threads(rows * hidden, threads))
  for (int64_t r = 0; r < rows; r++) {
    const float *in = x + r * hidden;
    float *to = out + r * hidden, lanes[16], edge[16] = {0};
    v16 acc = v16_zero();
    for (int64_t i = 0; i < whole; i += 16) {
      const v16 a = v16_load(in + i);
      acc = v16_fma(a, a, acc);
    }
    memcpy(edge, in + whole, sizeof(float) * (size_t)(hidden - whole));
    v16_store(lanes, v16_fma(v16_load(edge), v16_load(edge), acc));
    const float inverse = 1.0f / sqrtf(lane_sum(lanes) / (float)hidden + eps);
    for (int64_t i = 0; i < hidden; i++) to[i] = in[i] * inverse;
  }
}

static void rope(const float *x, int64_t token_stride, const float *cos_sin,
                 const int64_t *positions, float *out, int64_t tokens, int64_t heads, int64_t dim,
                 int threads) {
  const int64_t half = dim / 2;
#pragma omp parallel for schedule(static) num_threads(useful_threads(tokens * heads * dim, threads))
  for (int64_t t = 0; t < tokens; t++) {
    const float *c = cos_sin + positions[t] * dim, *s = c + half;
    for (int64_t h = 0; h < heads; h++) {
      const float *restrict in = x + t * token_stride + h * dim;
      float *restrict to = out + (t * heads + h) * dim;
      for (int64_t i = 0; i < half; i++) {
        to[i] = in[i] * c[i] - in[i + half] * s[i];
        to[i + half] = in[i + half] * c[i] + in[i] * s[i];
      }
    }
  }
}

static void silu_mul(const float *gate_up, float *out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(useful_threads(rows * width * 8, threads))
  for (int64_t r = 0; r < rows; r++) {
    const float *restrict gate = gate_up + r * 2 * width, *restrict up = gate + width;
    float *restrict to = out + r * width;
    for (int64_t i = 0; i < width; i++) to[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
  }
}

static void log_softmax(const float *logits, float *out, int64_t rows, int64_t vocab,
                        int threads) {
  const int64_t whole = vocab & ~(int64_t)15;
#pragma omp parallel for schedule(static) num_threads(useful_threads(rows * vocab, threads))
  for (int64_t r = 0; r < rows; r++) {
    const float *restrict in = logits + r * vocab;
    float *restrict to = out + r * vocab;
    float lanes[16], top = -INFINITY;
    for (int i = 0; i < 16; i++) lanes[i] = -INFINITY;
    for (int64_t v = 0; v < whole; v += 16)
      for (int i = 0; i < 16; i++) lanes[i] = in[v + i] > lanes[i] ? in[v + i] : lanes[i];
    for (int64_t v = whole; v < vocab; v++) top = in[v] > top ? in[v] : top;
    for (int i = 0; i < 16; i++) top = lanes[i] > top ? lanes[i] : top;

    for (int i = 0; i < 16; i++) lanes[i] = 0.0f;
    for (int64_t v = 0; v < whole; v += 16)
      for (int i = 0; i < 16; i++) lanes[i] += exp_f32(in[v + i] - top);
    for (int64_t v = whole; v < vocab; v++) lanes[v - whole] += exp_f32(in[v] - top);
    const float log_total = (float)log_f64((double)lane_sum(lanes));
    for (int64_t v = 0; v < vocab; v++) to[v] = (in[v] - top) - log_total;
  }
}

/* Philox 4x32-10 for the sixteen counters (first + i, position, choice, 0). */
INLINE void philox_x16(uint32_t first, uint32_t position, uint32_t choice, uint64_t seed,
                       uint32_t words[4][16]) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (uint32_t i = 0; i < 16; i++) {
    words[0][i] = first + i;
    words[1][i] = position;
    words[2][i] = choice;
    words[3][i] = 0;
  }
  for (int round = 0; round < 10; round++, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u)
    for (int i = 0; i < 16; i++) {
      const uint64_t p0 = (uint64_t)words[0][i] * 0xd2511f53u;
      const uint64_t p1 = (uint64_t)words[2][i] * 0xcd9e8d57u;
      words[0][i] = (uint32_t)(p1 >> 32) ^ words[1][i] ^ k0;
      words[1][i] = (uint32_t)p1;
      words[2][i] = (uint32_t)(p0 >> 32) ^ words[3][i] ^ k1;
      words[3][i] = (uint32_t)p0;
    }
}

static void gumbel(const int64_t *seeds, const int64_t *choices, const int64_t *positions,
                   float *out, int64_t rows, int64_t vocab, int threads) {
  const int64_t blocks = ceil_div(vocab, 64);
#pragma omp parallel for schedule(static) num_threads(useful_threads(rows * vocab * 16, threads))
  for (int64_t task = 0; task < rows * blocks; task++) {
    const int64_t r = task / blocks, first = task % blocks * 64;
    uint32_t words[4][16];
    float noise[4][16], *to = out + r * vocab + first;
    philox_x16((uint32_t)(first / 4), (uint32_t)positions[r], (uint32_t)choices[r],
               (uint64_t)seeds[r], words);
    for (int w = 0; w < 4; w++)
      for (int i = 0; i < 16; i++) {
        /* word + 0.5 = low 31 bits + 0.5, plus the top bit: int32 converts fast everywhere */
        const double low = (double)(int32_t)(words[w][i] & 0x7fffffffu) + 0.5;
        const double u = (low + (double)(int32_t)(words[w][i] >> 31) * 0x1p31) * 0x1p-32;
        noise[w][i] = -(float)log_f64(-log_f64(u));
      }
    const int64_t kept = min_i64(64, vocab - first);
    for (int64_t i = 0; i < kept; i++) to[i] = noise[i & 3][i >> 2];
  }
}
