/* The elementwise arithmetic of a fused margin step, for chunk_arithmetic.CompiledArithmetic.

   Shapes as there: n classes, k centres a class, a batch of b rows, d dimensions. Every function is written
   twice, for float32 and for bfloat16 matrices; lengths, weights and sums are float32 or wider in both.
   Compile with -fopenmp-simd and without -ffast-math: the rounding in exp2_of must stay as it is written. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define SIMD _Pragma("omp simd")
#define SIMD_SUM _Pragma("omp simd reduction(+ : sum)")
#define COLUMNS 128 /* batch rows at a time: what is kept of them stays in the first cache */
#define CLASSES 32  /* float32 sums of so many, which are then added up in double */
#define NO_COSINE -1e30f

static inline float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float load_f32(float value) { return value; }
static inline float store_f32(float value) { return value; }
static inline float load_bf16(uint16_t value) { return of_bits((uint32_t)value << 16); }
static inline uint16_t store_bf16(float value) { /* to the nearest, to even */
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* 2^x: the whole part goes into the exponent, the rest, in [-1/2, 1/2], through Taylor's polynomial of degree
   7, whose terms are ln(2)^i / i!; what is left of the series is below 6e-9. Zero below 2^-126; NaN stays. */
static inline float exp2_of(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: added to a number it rounds it to a whole one */
    x = x < -127.0f ? -127.0f : x;
    x = x > 127.0f ? 127.0f : x;
    float shifted = x + magic;
    float rest = x - (shifted - magic);
    float sum = 1.5252733804e-5f;
    sum = sum * rest + 1.5403530394e-4f;
    sum = sum * rest + 1.3333558146e-3f;
    sum = sum * rest + 9.6181291076e-3f;
    sum = sum * rest + 5.5504108665e-2f;
    sum = sum * rest + 2.4022650696e-1f;
    sum = sum * rest + 6.9314718056e-1f;
    sum = sum * rest + 1.0f;
    return sum * of_bits((bits_of(shifted) - bits_of(magic) + 127u) << 23);
}

/* nearest: largest of each class's cosines [n, k, b], or, with exponentiate, 2 to the power of it less
   shift [b], and the sums [b] of those; which [n, b], unless NULL, says which centre it was. The cosines at
   places (class * b + row) are no candidates. */
#define NEAREST(TYPE, SUFFIX)                                                                                \
    void nearest_##SUFFIX(TYPE *restrict cosines, const float *restrict shift,                              \
                          const int64_t *restrict places, ptrdiff_t num_places, TYPE *restrict nearest,      \
                          uint8_t *restrict which, double *restrict sums, ptrdiff_t n, ptrdiff_t k,          \
                          ptrdiff_t b, int exponentiate) {                                                   \
        for (ptrdiff_t p = 0; p < num_places; p++)                                                           \
            for (ptrdiff_t c = 0; c < k; c++)                                                                \
                cosines[(places[p] / b * k + c) * b + places[p] % b] = store_##SUFFIX(NO_COSINE);            \
        for (ptrdiff_t first = 0; first < b; first += COLUMNS) {                                             \
            ptrdiff_t m = b - first < COLUMNS ? b - first : COLUMNS;                                         \
            double total[COLUMNS] = {0};                                                                     \
            for (ptrdiff_t start = 0; start < n; start += CLASSES) {                                         \
                ptrdiff_t stop = n - start < CLASSES ? n : start + CLASSES;                                  \
                float part[COLUMNS] = {0};                                                                   \
                for (ptrdiff_t i = start; i < stop; i++) {                                                   \
                    const TYPE *row = cosines + i * k * b + first;                                           \
                    TYPE *out = nearest + i * b + first;                                                     \
                    float best[COLUMNS];                                                                     \
                    int32_t centre[COLUMNS];                                                                 \
                    SIMD for (ptrdiff_t j = 0; j < m; j++) {                                                 \
                        best[j] = load_##SUFFIX(row[j]);                                                     \
                        centre[j] = 0;                                                                       \
                    }                                                                                        \
                    for (ptrdiff_t c = 1; c < k; c++)                                                        \
                        SIMD for (ptrdiff_t j = 0; j < m; j++) {                                             \
                            float other = load_##SUFFIX(row[c * b + j]);                                     \
                            centre[j] = other > best[j] ? (int32_t)c : centre[j];                            \
                            best[j] = other > best[j] ? other : best[j];                                     \
                        }                                                                                    \
                    if (which)                                                                               \
                        SIMD for (ptrdiff_t j = 0; j < m; j++) which[i * b + first + j] = (uint8_t)centre[j]; \
                    if (exponentiate) {                                                                      \
                        SIMD for (ptrdiff_t j = 0; j < m; j++) {                                             \
                            float value = exp2_of(best[j] - shift[first + j]);                               \
                            part[j] += value;                                                                \
                            out[j] = store_##SUFFIX(value);                                                  \
                        }                                                                                    \
                    } else {                                                                                 \
                        SIMD for (ptrdiff_t j = 0; j < m; j++) out[j] = store_##SUFFIX(best[j]);             \
                    }                                                                                        \
                }                                                                                            \
                SIMD for (ptrdiff_t j = 0; j < m; j++) total[j] += part[j];                                  \
            }                                                                                                \
            if (exponentiate)                                                                                \
                for (ptrdiff_t j = 0; j < m; j++) sums[first + j] = total[j];                                \
        }                                                                                                    \
    }

/* planes [n, k, b]: each number of kept [n, b] at its centre, and zero at the others. */
#define SPREAD(TYPE, SUFFIX)                                                                                 \
    void spread_##SUFFIX(const TYPE *restrict kept, const uint8_t *restrict which, TYPE *restrict planes,    \
                         ptrdiff_t n, ptrdiff_t k, ptrdiff_t b) {                                            \
        for (ptrdiff_t i = 0; i < n; i++)                                                                    \
            for (ptrdiff_t c = 0; c < k; c++)                                                                \
                SIMD for (ptrdiff_t j = 0; j < b; j++)                                                       \
                    planes[(i * k + c) * b + j] = which[i * b + j] == c ? kept[i * b + j] : 0;               \
    }

/* unit [rows, d]: weight over its length; lengths [rows] are found first unless they are known. */
#define NORMALISE(TYPE, SUFFIX)                                                                              \
    void normalise_##SUFFIX(const float *restrict weight, float *restrict lengths, TYPE *restrict unit,      \
                            ptrdiff_t rows, ptrdiff_t d, int lengths_known) {                                \
        for (ptrdiff_t r = 0; r < rows; r++) {                                                               \
            const float *row = weight + r * d;                                                               \
            if (!lengths_known) {                                                                            \
                float sum = 0;                                                                               \
                SIMD_SUM for (ptrdiff_t j = 0; j < d; j++) sum += row[j] * row[j];                           \
                lengths[r] = sqrtf(sum);                                                                     \
            }                                                                                                \
            float inverse = 1.0f / lengths[r];                                                               \
            SIMD for (ptrdiff_t j = 0; j < d; j++) unit[r * d + j] = store_##SUFFIX(row[j] * inverse);       \
        }                                                                                                    \
    }

NEAREST(float, f32)
NEAREST(uint16_t, bf16)
SPREAD(float, f32)
SPREAD(uint16_t, bf16)
NORMALISE(float, f32)
NORMALISE(uint16_t, bf16)

/* gradient [rows, d] by the unit vectors, in place to that by the weights. */
void through_normalisation(float *restrict gradient, const float *restrict weight,
                           const float *restrict lengths, ptrdiff_t rows, ptrdiff_t d) {
    for (ptrdiff_t r = 0; r < rows; r++) {
        float *own = gradient + r * d;
        const float *row = weight + r * d;
        float inverse = 1.0f / lengths[r], sum = 0;
        SIMD_SUM for (ptrdiff_t j = 0; j < d; j++) sum += own[j] * row[j];
        sum *= inverse * inverse;
        SIMD for (ptrdiff_t j = 0; j < d; j++) own[j] = (own[j] - row[j] * sum) * inverse;
    }
}
