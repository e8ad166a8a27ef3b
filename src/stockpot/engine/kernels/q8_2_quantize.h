// Activations rounded to 8 bits: what every product with 8-bit weights begins with.
//
// Added by Stockpot (Apache-2.0) to iqk_quantize.cpp, whose names it uses. The same numbers, to the bit, as the
// library's own quantize_row_q8_2_x4, but four blocks of 32 at a time: there the scale of each block goes through
// a scalar conversion, a function call for which all vector registers are saved. That took 13 % of a long prefill.

#pragma once

#if defined __AVX512F__ && defined __AVX512BW__ && defined __AVX512DQ__ && defined __AVX512VL__
#define STOCKPOT_Q8_2_QUANTIZE

// Scales of `blocks` blocks from their largest magnitudes, as BF16 (rounded to nearest even); their inverses.
static inline __m128i stockpot_q8_2_scales(__m128 most, __m128 & inverse) {
    auto d = _mm_castps_si128(_mm_div_ps(most, _mm_set1_ps(127.f)));
    auto odd = _mm_and_si128(_mm_srli_epi32(d, 16), _mm_set1_epi32(1));
    auto bits = _mm_srli_epi32(_mm_add_epi32(d, _mm_add_epi32(odd, _mm_set1_epi32(0x7fff))), 16);
    auto rounded = _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
    auto positive = _mm_cmp_ps_mask(rounded, _mm_setzero_ps(), _CMP_GT_OQ);
    inverse = _mm_maskz_div_ps(positive, _mm_set1_ps(1.f), rounded);
    return bits;
}

// One block: 32 bytes to `to`, their sum returned.
static inline int stockpot_q8_2_block(__m512 lo, __m512 hi, float inverse, int8_t * to) {
    auto ilo = _mm512_cvtps_epi32(_mm512_mul_ps(lo, _mm512_set1_ps(inverse)));
    auto ihi = _mm512_cvtps_epi32(_mm512_mul_ps(hi, _mm512_set1_ps(inverse)));
    _mm_storeu_si128((__m128i *)to,     _mm512_cvtsepi32_epi8(ilo));
    _mm_storeu_si128((__m128i *)to + 1, _mm512_cvtsepi32_epi8(ihi));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(ilo, ihi));
}

static void stockpot_quantize_row_q8_2_x4(const float * x, void * vy, int64_t k) {
    const int64_t blocks = k/QK8_1;
    auto most_of = [] (__m512 lo, __m512 hi) {
        return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(lo), _mm512_abs_ps(hi)));
    };
    auto four = (block_q8_2_x4 *)vy;
    int64_t i = 0;
    for (; i + 4 <= blocks; i += 4, x += 4*QK8_1, ++four) {
        __m512 lo[4], hi[4];
        alignas(16) float most[4], inverse[4];
        for (int b = 0; b < 4; ++b) {
            lo[b] = _mm512_loadu_ps(x + b*QK8_1);
            hi[b] = _mm512_loadu_ps(x + b*QK8_1 + 16);
            most[b] = most_of(lo[b], hi[b]);
        }
        __m128 inverses;
        auto scales = stockpot_q8_2_scales(_mm_load_ps(most), inverses);
        _mm_store_ps(inverse, inverses);
        _mm_storel_epi64((__m128i *)four->d, _mm_cvtepi32_epi16(scales));
        for (int b = 0; b < 4; ++b) {
            const auto sum = (int16_t)stockpot_q8_2_block(lo[b], hi[b], inverse[b], four->qs + b*QK8_1);
            std::memcpy(four->d + 4 + b, &sum, sizeof(sum));
        }
    }
    for (auto one = (block_q8_2 *)vy + i; i < blocks; ++i, x += QK8_1, ++one) {
        auto lo = _mm512_loadu_ps(x), hi = _mm512_loadu_ps(x + 16);
        __m128 inverse;
        const auto scale = (uint16_t)_mm_cvtsi128_si32(stockpot_q8_2_scales(_mm_set_ss(most_of(lo, hi)), inverse));
        const auto sum = (int16_t)stockpot_q8_2_block(lo, hi, _mm_cvtss_f32(inverse), one->qs);
        std::memcpy(&one->d, &scale, sizeof(scale));
        std::memcpy(&one->s, &sum, sizeof(sum));
    }
}

#endif
