/* v16: sixteen fp32 lanes in the registers of the instruction set being compiled. */

#if defined(ISA_AVX512)

#include <immintrin.h>
typedef __m512 v16;
#define TILE_ROWS 12 /* rows of a register tile … */
#define TILE_VECS 2  /* … and v16 across it: 24 of 32 registers */
INLINE v16 v16_zero(void) { return _mm512_setzero_ps(); }
INLINE v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v16_store(float *p, v16 a) { _mm512_storeu_ps(p, a); }
INLINE v16 v16_fill(float a) { return _mm512_set1_ps(a); }
INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
INLINE v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); } /* a > b ? a : b */
INLINE v16 v16_load_bf16(const uint16_t *p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#elif defined(ISA_AVX2)

#include <immintrin.h>
typedef struct {
  __m256 r[2];
} v16;
#define TILE_ROWS 6
#define TILE_VECS 1 /* 12 of 16 registers */
#define EACH(i) _Pragma("GCC unroll 2") for (int i = 0; i < 2; i++)
INLINE v16 v16_zero(void) { return (v16){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
INLINE v16 v16_load(const float *p) { return (v16){{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
INLINE void v16_store(float *p, v16 a) { EACH(i) _mm256_storeu_ps(p + 8 * i, a.r[i]); }
INLINE v16 v16_fill(float a) { return (v16){{_mm256_set1_ps(a), _mm256_set1_ps(a)}}; }
INLINE v16 v16_fma(v16 a, v16 b, v16 c) {
  EACH(i) c.r[i] = _mm256_fmadd_ps(a.r[i], b.r[i], c.r[i]);
  return c;
}
INLINE v16 v16_add(v16 a, v16 b) {
  EACH(i) a.r[i] = _mm256_add_ps(a.r[i], b.r[i]);
  return a;
}
INLINE v16 v16_mul(v16 a, v16 b) {
  EACH(i) a.r[i] = _mm256_mul_ps(a.r[i], b.r[i]);
  return a;
}
INLINE v16 v16_max(v16 a, v16 b) {
  EACH(i) a.r[i] = _mm256_max_ps(a.r[i], b.r[i]);
  return a;
}
INLINE v16 v16_load_bf16(const uint16_t *p) {
  v16 a;
  EACH(i) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8 * i)));
    a.r[i] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  return a;
}

#elif defined(ISA_NEON)

#include <arm_neon.h>
typedef struct {
  float32x4_t r[4];
} v16;
#define TILE_ROWS 6
#define TILE_VECS 1 /* 24 of 32 registers */
#define EACH(i) _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++)
INLINE v16 v16_fill(float a) {
  v16 b;
  EACH(i) b.r[i] = vdupq_n_f32(a);
  return b;
}
INLINE v16 v16_zero(void) { return v16_fill(0.0f); }
INLINE v16 v16_load(const float *p) {
  v16 a;
  EACH(i) a.r[i] = vld1q_f32(p + 4 * i);
  return a;
}
INLINE void v16_store(float *p, v16 a) { EACH(i) vst1q_f32(p + 4 * i, a.r[i]); }
INLINE v16 v16_fma(v16 a, v16 b, v16 c) {
  EACH(i) c.r[i] = vfmaq_f32(c.r[i], a.r[i], b.r[i]);
  return c;
}
INLINE v16 v16_add(v16 a, v16 b) {
  EACH(i) a.r[i] = vaddq_f32(a.r[i], b.r[i]);
  return a;
}
INLINE v16 v16_mul(v16 a, v16 b) {
  EACH(i) a.r[i] = vmulq_f32(a.r[i], b.r[i]);
  return a;
}
INLINE v16 v16_max(v16 a, v16 b) { /* not vmaxq, which treats NaN otherwise than x86 */
  EACH(i) a.r[i] = vbslq_f32(vcgtq_f32(a.r[i], b.r[i]), a.r[i], b.r[i]);
  return a;
}
INLINE v16 v16_load_bf16(const uint16_t *p) {
  v16 a;
  EACH(i) a.r[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  return a;
}

#endif
