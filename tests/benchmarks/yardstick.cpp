// What a C++ compiler makes of the same products: the yardstick of bench_cpu_kernels.py, no part of the package.
//
// Layout of a matrix: blocks [rows][width / 32][16], two codes a byte, the low one first; scales [rows][width / 32],
// byte s means 2 ** (s - 127), from 2 on. Activations and results are float32; for avx512_bf16 activations are rounded.
// Build: g++ -O3 -march=native -fopenmp -shared -fPIC yardstick.cpp -o yardstick.so

#include <immintrin.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static const int MOST = 8192;

static float power(uint8_t scale) {
    uint32_t bits = (uint32_t)scale << 23;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

extern "C" {

void threads(int count) { omp_set_num_threads(count); }

// Bytes as codes by pshufb, to float32, multiplied and added in float32.
__attribute__((target("avx2,fma")))
void mxfp4_avx2(const uint8_t *blocks, const uint8_t *scales, const float *x, float *out, int rows, int width) {
    alignas(64) static thread_local float even[MOST], odd[MOST];
    float *evens = even, *odds = odd;
    for (int i = 0; i < width / 2; i++) evens[i] = x[2 * i], odds[i] = x[2 * i + 1];
    const __m128i table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
    const __m128i mask = _mm_set1_epi8(15);
    const int groups = width / 32;
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        const uint8_t *block = blocks + (size_t)row * groups * 16, *scale = scales + (size_t)row * groups;
        __m256 one = _mm256_setzero_ps(), other = one;
        for (int g = 0; g < groups; g++) {
            const float *e = evens + 16 * g, *o = odds + 16 * g;
            __m128i codes = _mm_loadu_si128((const __m128i *)(block + 16 * g));
            __m128i low = _mm_shuffle_epi8(table, _mm_and_si128(codes, mask));
            __m128i high = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(codes, 4), mask));
            __m128i low2 = _mm_srli_si128(low, 8), high2 = _mm_srli_si128(high, 8);
            __m256 a = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)), _mm256_loadu_ps(e));
            a = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)), _mm256_loadu_ps(o), a);
            __m256 b = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low2)), _mm256_loadu_ps(e + 8));
            b = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high2)), _mm256_loadu_ps(o + 8), b);
            __m256 s = _mm256_set1_ps(power(scale[g]));
            one = _mm256_fmadd_ps(a, s, one);
            other = _mm256_fmadd_ps(b, s, other);
        }
        float lanes[8], sum = 0;
        _mm256_storeu_ps(lanes, _mm256_add_ps(one, other));
        for (int i = 0; i < 8; i++) sum += lanes[i];
        out[row] = sum * 0.5f;
    }
}

// Bytes as codes to bfloat16 by vpermw, multiplied in pairs by vdpbf16ps. The number of blocks must be even.
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
void mxfp4_avx512_bf16(const uint8_t *blocks, const uint8_t *scales, const float *x, float *out, int rows, int width) {
    alignas(64) static thread_local uint16_t even[MOST], odd[MOST];
    uint16_t *evens = even, *odds = odd;
    for (int i = 0; i < width; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        (i % 2 ? odds : evens)[i / 2] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    static const uint16_t values[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                        0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
    alignas(64) uint16_t twice[32];
    for (int i = 0; i < 32; i++) twice[i] = values[i % 16];
    const __m512i table = _mm512_load_si512(twice);
    const int groups = width / 32;
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row++) {
        const uint8_t *block = blocks + (size_t)row * groups * 16, *scale = scales + (size_t)row * groups;
        __m512 sum = _mm512_setzero_ps();
        for (int g = 0; g < groups; g += 2) {
            __m512i codes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(block + 16 * g)));
            __m512i low = _mm512_permutexvar_epi16(codes, table);
            __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), table);
            __m512 a = _mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)low,
                                        (__m512bh)_mm512_loadu_si512(evens + 16 * g));
            a = _mm512_dpbf16_ps(a, (__m512bh)high, (__m512bh)_mm512_loadu_si512(odds + 16 * g));
            __m512 s = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(power(scale[g])), _mm512_set1_ps(power(scale[g + 1])));
            sum = _mm512_fmadd_ps(a, s, sum);
        }
        out[row] = _mm512_reduce_add_ps(sum);
    }
}

// A bfloat16 matrix packed without loss to 12 bits a value, as the package packs it (gptoss_kernels/cpu/packing.py): 48
// bytes are the lower bytes of 32 values and the codes of their upper ones. Rows are read in four streams; their number
// must be divisible by four.
__attribute__((target("avx2,fma")))
void packed12_avx2(const uint8_t *records, const uint8_t *table, const float *x, float *out, int rows, int width) {
    alignas(64) static thread_local float ordered[MOST];
    float *activations = ordered;
    for (int i = 0; i < width; i += 32)
        for (int j = 0; j < 16; j++)
            activations[i + j] = x[i + 2 * j], activations[i + 16 + j] = x[i + 2 * j + 1];
    const __m256i uppers = _mm256_loadu_si256((const __m256i *)table);
    const __m256i four = _mm256_set1_epi8(15), odd = _mm256_set1_epi32(0xffff0000);
    const int apart = rows / 4, groups = width / 32;
    #pragma omp parallel for schedule(static)
    for (int row = 0; row < apart; row++) {
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int g = 0; g < groups; g++) {
            const float *a = activations + 32 * g;
            for (int stream = 0; stream < 4; stream++) {
                const uint8_t *record = records + ((size_t)(row + stream * apart) * groups + g) * 48;
                _mm_prefetch((const char *)(record + 1024), _MM_HINT_T0);
                __m256i low = _mm256_loadu_si256((const __m256i *)record);
                __m128i half = _mm_loadu_si128((const __m128i *)(record + 32));
                __m256i code = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(half, 4), half), four);
                __m256i high = _mm256_shuffle_epi8(uppers, code);
                __m256i one = _mm256_unpacklo_epi8(low, high), two = _mm256_unpackhi_epi8(low, high);
                __m256 sum = sums[stream];
                sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(one, 16)), _mm256_loadu_ps(a), sum);
                sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(one, odd)), _mm256_loadu_ps(a + 16), sum);
                sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(two, 16)), _mm256_loadu_ps(a + 8), sum);
                sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(two, odd)), _mm256_loadu_ps(a + 24), sum);
                sums[stream] = sum;
            }
        }
        for (int stream = 0; stream < 4; stream++) {
            float lanes[8], sum = 0;
            _mm256_storeu_ps(lanes, sums[stream]);
            for (int i = 0; i < 8; i++) sum += lanes[i];
            out[row + stream * apart] = sum;
        }
    }
}

// Reads every byte once, as plainly as can be: the bandwidth that a product could reach.
__attribute__((target("avx2")))
long long read_all(const uint8_t *bytes, size_t size) {
    long long total = 0;
    #pragma omp parallel reduction(+:total)
    {
        size_t each = size / omp_get_num_threads() & ~(size_t)127;
        const uint8_t *part = bytes + each * omp_get_thread_num();
        __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
        for (size_t i = 0; i < each; i += 128) {
            a = _mm256_add_epi64(a, _mm256_loadu_si256((const __m256i *)(part + i)));
            b = _mm256_add_epi64(b, _mm256_loadu_si256((const __m256i *)(part + i + 32)));
            c = _mm256_add_epi64(c, _mm256_loadu_si256((const __m256i *)(part + i + 64)));
            d = _mm256_add_epi64(d, _mm256_loadu_si256((const __m256i *)(part + i + 96)));
        }
        alignas(32) long long lanes[4];
        _mm256_store_si256((__m256i *)lanes, _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
        total += lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
    return total;
}

// The same in four streams far apart: each is fetched ahead for itself, and one thread reads more bytes at a time.
__attribute__((target("avx2")))
long long read_apart(const uint8_t *bytes, size_t size) {
    long long total = 0;
    #pragma omp parallel reduction(+:total)
    {
        size_t quarter = size / omp_get_num_threads() / 4 & ~(size_t)63;
        const uint8_t *part = bytes + 4 * quarter * omp_get_thread_num();
        __m256i sums[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                           _mm256_setzero_si256()};
        for (size_t i = 0; i < quarter; i += 64)
            for (int stream = 0; stream < 4; stream++) {
                const uint8_t *here = part + stream * quarter + i;
                sums[stream] = _mm256_add_epi64(sums[stream], _mm256_loadu_si256((const __m256i *)here));
                sums[stream] = _mm256_add_epi64(sums[stream], _mm256_loadu_si256((const __m256i *)(here + 32)));
            }
        alignas(32) long long lanes[4];
        _mm256_store_si256((__m256i *)lanes, _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]),
                                                             _mm256_add_epi64(sums[2], sums[3])));
        total += lanes[0] + lanes[1] + lanes[2] + lanes[3];
    }
    return total;
}

}
