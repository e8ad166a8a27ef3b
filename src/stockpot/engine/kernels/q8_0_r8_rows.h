// Products of 8-bit weights (q8_0, rows interleaved by eight) with columns of 8-bit activations.
//
// Added by Stockpot (Apache-2.0) to iqk_gemm_legacy_quants.cpp, whose names it uses: it is included there before
// mul_mat_q8_0_r8_q8_2, inside HAVE_FANCY_SIMD (AVX-512 with VNNI). Against the library's own loop:
//   - 32 rows at once, so that four activations are spread over the lanes once for all of them, as the memory
//     operand of the product, where the library shuffles registers;
//   - what the shift of the weights by 127 adds is taken off in integers, where the sum begins, and not in a second
//     accumulator;
//   - with many columns the library multiplies 64 rows with eight columns after eight: while the second and third
//     eight are at it, the next 64 rows are brought from memory.
// An element of the result is the same whatever the number of columns.

// `columns` columns of rows [ix, ix + 16*groups); nb blocks of 32 a row; the weights lie bx bytes a row from x on.
// `ahead`: weights to be brought nearer meanwhile, as many as there are here; or null.
template <int columns, int groups>
static void stockpot_q8_0_r8_group(int nb, const char * x, size_t bx, const Q8<columns, block_q8_2_x4>& q8, const DataInfo& info, int ix,
                                   const char * ahead) {
    const block_q8_0_r8 * rows[2*groups];
    for (int g = 0; g < 2*groups; ++g) rows[g] = (const block_q8_0_r8 *)(x + (ix + 8*g)*bx);
    __m512 acc[groups][columns] = {};
    __m512i qx[groups][8];  // a block of 32 weights of all rows: four of each of 16 rows in a register
    __m512 scales[groups];
    auto add = [&] (int iy, const int8_t * y, float d, int sum) {
        __m512i sumi[groups];
        for (int g = 0; g < groups; ++g) sumi[g] = _mm512_set1_epi32(-127*sum);
        for (int j = 0; j < 8; ++j) {
            int32_t four;
            std::memcpy(&four, y + 4*j, 4);
            for (int g = 0; g < groups; ++g) sumi[g] = _mm512_dpbusd_epi32(sumi[g], qx[g][j], _mm512_set1_epi32(four));
        }
        for (int g = 0; g < groups; ++g)
            acc[g][iy] = _mm512_fmadd_ps(_mm512_mul_ps(scales[g], _mm512_set1_ps(d)), _mm512_cvtepi32_ps(sumi[g]), acc[g][iy]);
    };
    auto load = [&] (int ib) {
        if (ahead) {
            for (int at = 0; at < 2*groups*int(sizeof(block_q8_0_r8)); at += 64) _mm_prefetch(ahead + at, _MM_HINT_T1);
            ahead += 2*groups*sizeof(block_q8_0_r8);
        }
        for (int g = 0; g < groups; ++g) {
            auto & l = rows[2*g][ib];
            auto & h = rows[2*g+1][ib];
            scales[g] = _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)l.d))),
                                           _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)h.d)), 1);
            for (int j = 0; j < 8; ++j) {
                qx[g][j] = _mm512_inserti32x8(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)l.qs+j)),
                                              _mm256_loadu_si256((const __m256i *)h.qs+j), 1);
                qx[g][j] = _mm512_add_epi8(qx[g][j], _mm512_set1_epi8(127));
            }
        }
    };
    float d[4*columns];
    int32_t s[4*columns];
    for (int ib4 = 0; ib4 < nb/4; ++ib4) {
        for (int iy = 0; iy < columns; ++iy) {
            auto yd = (const uint16_t *)q8.y[iy][ib4].d;
            _mm_storeu_ps(d + 4*iy, convert_scales_s(yd));
            _mm_storeu_si128((__m128i *)(s + 4*iy), _mm_cvtepi16_epi32(_mm_loadl_epi64((const __m128i *)(yd + 4))));
        }
        for (int k = 0; k < 4; ++k) {
            load(4*ib4 + k);
            for (int iy = 0; iy < columns; ++iy) add(iy, q8.y[iy][ib4].qs + 32*k, d[4*iy+k], s[4*iy+k]);
        }
    }
    for (int ib = 4*(nb/4); ib < nb; ++ib) {
        load(ib);
        for (int iy = 0; iy < columns; ++iy) {
            auto & y = ((const block_q8_2 *)q8.y[iy])[ib];
            add(iy, y.qs, GGML_BF16_TO_FP32(ggml_bf16_t{y.d}), *(const int16_t *)&y.s);
        }
    }
    for (int g = 0; g < groups; ++g)
        for (int iy = 0; iy < columns; ++iy) info.store(ix + 16*g, iy, acc[g][iy]);
}

template <int columns>
static void stockpot_q8_0_r8_rows(int nb, const char * x, size_t bx, const Q8<columns, block_q8_2_x4>& q8, const DataInfo& info, int rows) {
    constexpr int step = 64;  // rows the library takes at a time (mul_mat_NxM)
    const int pass = (info.cur_y + 7)/8;
    int ix = 0;
    for (; ix + 32 <= rows; ix += 32) {
        const bool prefetches = rows == step && pass == 1 + ix/32;
        stockpot_q8_0_r8_group<columns, 2>(nb, x, bx, q8, info, ix, prefetches ? x + (step + ix)*bx : nullptr);
    }
    for (; ix < rows; ix += 16) stockpot_q8_0_r8_group<columns, 1>(nb, x, bx, q8, info, ix, nullptr);
}
