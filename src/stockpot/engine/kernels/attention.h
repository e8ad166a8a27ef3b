// Attention of new tokens, one or thousands, over cells of 8-bit keys and values.
//
// Added by Stockpot (Apache-2.0) to iqk_flash_attn.cpp. The library takes one query head at a time, so keys and
// values are unpacked again for each head of a group and for each stream, and it gives whole heads to threads, so
// two threads share three heads as two and one.
//
// Here all query rows that read the same key head go together, and threads share the cells:
//   - cells are taken in runs of 128; a run no token sees is skipped, in others only tokens that see some of it
//     take part. So streams share the work for their common prefix, and none pays for the tails of the others;
//   - keys are transposed to 16 cells side by side; scores are integer dot products (VNNI) with queries rounded
//     to 8 bits, as the library does for 8-bit keys;
//   - a row's weights in a run, 2^(score - the largest) times the scale of the value, are rounded to 15 bits of the
//     largest, and summed with the values in integers, exactly, whatever the order;
//   - runs are brought together by online softmax (Milakov, Gimelshein 2018); each thread keeps a partial result,
//     merged after a barrier as in flash decoding (Dao et al. 2023).
// To the bit, a row's result depends on the cells it sees, where they lie and how many threads there are; not on
// the other rows of the batch, nor on how many they are. So a prompt gives the same numbers whatever pieces it is
// computed in, and so with the cache as without it (tests/engine/test_exactness.py prints how many answers agree).

#pragma once

#if defined __AVX512F__ && defined __AVX512VNNI__ && defined __AVX512BW__ && defined __AVX512DQ__ && defined __AVX512VL__
#define STOCKPOT_ATTENTION

// Each inner loop in a function of its own: in one, their registers were spilled (47 tokens behind 2,048 cells,
// 30 layers: 29 ms instead of 21).
#define STOCKPOT_APART __attribute__((noinline))

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml-impl.h"
#include "ggml-quants.h"

namespace stockpot {

constexpr int kBlock = 32;          // cells a token sees some of, or none
constexpr int kRunBlocks = 4;       // blocks that share one step of the softmax
constexpr int kRun = kRunBlocks*kBlock;
constexpr int kTileTokens = 16;     // tokens whose rows go together
constexpr int kTileRows = 64;       // about as many rows: their scores stay in the first-level cache
constexpr int kMaxHead = 256;       // elements of a head
constexpr int kSlab = 64;           // elements of a head whose sums are in registers together
constexpr int kRowsAtOnce = 6;      // 24 accumulators of 16
constexpr float kLog2e = 1.44269504f;
constexpr float kNothing = -1e30f;  // the largest score of a row that saw nothing yet

struct Attention {
    int tokens, group, key_heads, cells, head_size;  // group: query heads to a key head
    long q_head, q_token, k_head, k_cell, v_head, v_cell, mask_token;  // strides in bytes
    const char * q, * k, * v, * mask;
    float scale;

    int rows() const { return tokens*group; }
    int blocks() const { return head_size/QK8_0; }
    int tile_tokens() const { return std::clamp(kTileRows/group, 1, kTileTokens); }
    static int stride(int head_size) { return head_size + 16; }  // floats of a row's partial result: O, M, S
};

inline bool suits(int type_k, int type_v, int dk, int dv, int q_heads, int k_heads, int v_heads, int batches, int cells) {
    return type_k == GGML_TYPE_Q8_0 && type_v == GGML_TYPE_Q8_0 && dk == dv && dk%kSlab == 0 && dk <= kMaxHead
        && k_heads == v_heads && q_heads%k_heads == 0 && batches == 1 && cells%kBlock == 0;
}

inline size_t work_bytes(int dv, int tokens, int q_heads, int threads) {
    return size_t(threads)*tokens*q_heads*Attention::stride(dv)*sizeof(float);
}

// 2^x for x <= 0, by the best polynomial of degree 4: relative error below 3e-6, a fifth of what rounding weights to
// 15 bits costs. At -126 and below, as at -126.
inline __m512 exp2_ps(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));
    auto n = _mm512_roundscale_ps(x, 8);
    auto r = _mm512_sub_ps(x, n);
    auto p = _mm512_set1_ps(9.570102207362652e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.591785907745361e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40247443318367e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931217908859253e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999992847442627e-1f));
    return _mm512_scalef_ps(p, n);
}

// The queries of one key head, rounded to 8 bits in blocks of 32 with a scale each: to the same numbers as
// quantize_row_q8_2_x4 gives the library's own attention (scales in BF16).
struct Queries {
    std::vector<int8_t>  qs;      // [row][head_size]
    std::vector<float>   scales;  // [row][head_size/32], times that of scores, which are for 2^score
    std::vector<int32_t> offsets; // [row][head_size/32]: what keys shifted by 128 add, to be taken off

    void read(const Attention & a, int key_head, int first_token, int tokens) {
        const int blocks = a.blocks(), rows = tokens*a.group;
        qs.resize(rows*a.head_size);
        scales.resize(rows*blocks);
        offsets.resize(rows*blocks);
        for (int row = 0; row < rows; ++row) {
            auto x = (const float *)(a.q + (first_token + row/a.group)*a.q_token + (key_head*a.group + row%a.group)*a.q_head);
            for (int b = 0; b < blocks; ++b, x += QK8_0) {
                auto lo = _mm512_loadu_ps(x), hi = _mm512_loadu_ps(x + 16);
                float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(lo), _mm512_abs_ps(hi)));
                const float d = GGML_BF16_TO_FP32(GGML_FP32_TO_BF16(most/127.f));
                auto inverse = _mm512_set1_ps(d > 0 ? 1/d : 0.f);
                auto ilo = _mm512_cvtps_epi32(_mm512_mul_ps(lo, inverse));
                auto ihi = _mm512_cvtps_epi32(_mm512_mul_ps(hi, inverse));
                auto to = qs.data() + row*a.head_size + b*QK8_0;
                _mm_storeu_si128((__m128i *)to,     _mm512_cvtepi32_epi8(ilo));
                _mm_storeu_si128((__m128i *)to + 1, _mm512_cvtepi32_epi8(ihi));
                scales [row*blocks + b] = d*a.scale*kLog2e;
                offsets[row*blocks + b] = -128*_mm512_reduce_add_epi32(_mm512_add_epi32(ilo, ihi));
            }
        }
    }
};

// 8 rows of 32 bytes in each half of the registers: x[j] becomes the j-th dword of all of them.
inline void transpose_dwords(__m512i * x) {
    __m512i t[8];
    for (int i = 0; i < 4; ++i) {
        t[2*i]   = _mm512_unpacklo_epi32(x[2*i], x[2*i+1]);
        t[2*i+1] = _mm512_unpackhi_epi32(x[2*i], x[2*i+1]);
    }
    __m512i u[8];
    for (int i = 0; i < 2; ++i) {
        u[4*i]   = _mm512_unpacklo_epi64(t[4*i],   t[4*i+2]);
        u[4*i+1] = _mm512_unpackhi_epi64(t[4*i],   t[4*i+2]);
        u[4*i+2] = _mm512_unpacklo_epi64(t[4*i+1], t[4*i+3]);
        u[4*i+3] = _mm512_unpackhi_epi64(t[4*i+1], t[4*i+3]);
    }
    // u[j] and u[4+j] hold, in each 256-bit half, dword j (low 128) and 4 + j (high 128) of rows 0..3 and 4..7.
    const auto low  = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const auto high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int j = 0; j < 4; ++j) {
        x[j]   = _mm512_permutex2var_epi64(u[j], low,  u[4+j]);
        x[4+j] = _mm512_permutex2var_epi64(u[j], high, u[4+j]);
    }
}

inline __m512 scales_of(const char * first, long stride) {  // of the q8_0 blocks of 16 cells
    alignas(32) uint16_t d[16];
    for (int c = 0; c < 16; ++c) std::memcpy(d + c, first + c*stride, sizeof(uint16_t));
    return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *)d));
}

// The cells of a run, as the tokens of a tile see them. Runs begin at a multiple of kRun, so that what a row gives
// does not depend on what others see.
struct Run {
    int first_cell;
    uint32_t visible[kTileTokens][kRunBlocks];  // bit c: the token sees cell c of the block
    uint32_t seen[kRunBlocks];                  // bit t: token t sees some cells of the block
    uint32_t seen_by_any;
};

inline bool look(const Attention & a, int first_token, int tokens, int first_cell, Run & run) {
    run.first_cell = first_cell;
    run.seen_by_any = 0;
    for (int i = 0; i < kRunBlocks; ++i) {
        const int cell = first_cell + i*kBlock;
        run.seen[i] = 0;
        for (int t = 0; t < tokens; ++t) {
            uint32_t visible = 0;
            if (cell < a.cells) {
                auto m = _mm512_loadu_si512((const uint16_t *)(a.mask + (first_token + t)*a.mask_token) + cell);
                visible = _mm512_testn_epi16_mask(m, _mm512_set1_epi16(-1));
            }
            run.visible[t][i] = visible;
            if (visible) run.seen[i] |= 1u << t;
        }
        run.seen_by_any |= run.seen[i];
    }
    return run.seen_by_any;
}

// What a thread needs for the rows of a tile and one run at a time; every part begins at 64 bytes.
struct Scratch {
    Scratch(int rows, int blocks)
        : active(rows) {
        const int padded = (rows + 15)/16*16;
        storage.resize((4 + blocks)*padded + rows*kRun + rows*blocks*kRun/2 + blocks*kRun + kRun/2*kSlab + 16);
        auto at = (float *)(((uintptr_t)storage.data() + 63) & ~uintptr_t(63));
        most = at;        at += padded;
        sum = at;         at += padded;
        keep = at;        at += padded;
        take = at;        at += padded;
        units = at;       at += blocks*padded;
        scores = at;      at += rows*kRun;
        weights = (int16_t *)at; at += rows*blocks*kRun/2;
        scales = at;      at += blocks*kRun;
        values = (int16_t *)at;
    }
    std::vector<int> active;  // rows that see the block or run at hand
    std::vector<float> storage;
    float * most, * sum;      // [row] of the run: largest score, sum of 2^(score - most)
    float * keep, * take;     // [row] factors of the partial result and of the run
    float * units;            // [row][block of 32 elements]: what a weight of 1 stands for
    float * scores;           // [row][cell]
    int16_t * weights;        // [row][block of 32 elements][cell]
    float * scales;           // [block of 32 elements][cell]: of the values
    int16_t * values;         // [pair of cells][element of a slab][2]
};

// A thread's share of one key head of a tile.
class Share {
public:
    Share(const Attention & a, int key_head, Scratch & scratch)
        : a_(a), key_head_(key_head), blocks_(a.blocks()), k_(a.k + key_head*a.k_head), v_(a.v + key_head*a.v_head),
          s_(scratch) {}

    void begin(int first_token, int tokens, float * results) {
        results_ = results;
        rows_ = tokens*a_.group;
        queries_.read(a_, key_head_, first_token, tokens);
        for (int row = 0; row < rows_; ++row) {
            auto r = result(row);
            std::memset(r, 0, a_.head_size*sizeof(float));
            r[a_.head_size] = kNothing;
            r[a_.head_size + 1] = 0;
        }
    }

    void add(const Run & run) {
        for (int i = 0; i < kRunBlocks; ++i)
            if (int rows = find_active(run.seen[i])) add_scores(run.first_cell + i*kBlock, rows, s_.scores + i*kBlock);
        read_scales(run);
        const int rows = find_active(run.seen_by_any);
        for (int i = 0; i < rows; ++i) weigh(run, s_.active[i]);
        update(rows);
        for (int slab = 0; slab < a_.head_size; slab += kSlab) {
            read_values(run, slab);
            int i = 0;
            for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) add_rows<kRowsAtOnce>(run, i, slab);
            switch (rows - i) {
                case 5: add_rows<5>(run, i, slab); break;
                case 4: add_rows<4>(run, i, slab); break;
                case 3: add_rows<3>(run, i, slab); break;
                case 2: add_rows<2>(run, i, slab); break;
                case 1: add_rows<1>(run, i, slab); break;
                default: break;
            }
        }
    }

private:
    int find_active(uint32_t seen) {
        int rows = 0;
        for (uint32_t left = seen; left; left &= left - 1) {
            const int token = __builtin_ctz(left);
            for (int g = 0; g < a_.group; ++g) s_.active[rows++] = token*a_.group + g;
        }
        return rows;
    }

    float * result(int row) { return results_ + row*Attention::stride(a_.head_size); }

    // 16 cells of 32 elements: x[j] gets elements 4j .. 4j+3 of every cell, shifted by 128.
    __m512 read_keys(const char * block, __m512i * x) {
        auto d = scales_of(block, a_.k_cell);
        block += sizeof(ggml_half);
        for (int c = 0; c < 8; ++c) {
            auto lo = _mm256_loadu_si256((const __m256i *)(block + c*a_.k_cell));
            auto hi = _mm256_loadu_si256((const __m256i *)(block + (c + 8)*a_.k_cell));
            x[c] = _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
        }
        transpose_dwords(x);
        for (int j = 0; j < 8; ++j) x[j] = _mm512_xor_si512(x[j], _mm512_set1_epi8(-128));
        return d;
    }

    static __m512 dot(const __m512i * x, const int8_t * q, int32_t offset) {
        auto sum = _mm512_set1_epi32(offset);
        for (int j = 0; j < 8; ++j) {
            int32_t four;
            std::memcpy(&four, q + 4*j, 4);
            sum = _mm512_dpbusd_epi32(sum, x[j], _mm512_set1_epi32(four));
        }
        return _mm512_cvtepi32_ps(sum);
    }

    STOCKPOT_APART void add_scores(int first_cell, int rows, float * scores) {
        for (int half = 0; half < 2; ++half) {
            auto cells = k_ + (first_cell + 16*half)*a_.k_cell;
            for (int b = 0; b < blocks_; b += 2) {
                __m512i x[16];
                auto d0 = read_keys(cells + b*sizeof(block_q8_0), x);
                auto d1 = read_keys(cells + (b + 1)*sizeof(block_q8_0), x + 8);
                for (int i = 0; i < rows; ++i) {
                    const int row = s_.active[i], at = row*blocks_ + b;
                    auto q = queries_.qs.data() + row*a_.head_size + b*QK8_0;
                    auto s0 = dot(x, q, queries_.offsets[at]), s1 = dot(x + 8, q + QK8_0, queries_.offsets[at + 1]);
                    auto part = _mm512_mul_ps(_mm512_mul_ps(d0, _mm512_set1_ps(queries_.scales[at])), s0);
                    part = _mm512_fmadd_ps(_mm512_mul_ps(d1, _mm512_set1_ps(queries_.scales[at + 1])), s1, part);
                    auto to = scores + row*kRun + 16*half;
                    _mm512_store_ps(to, b == 0 ? part : _mm512_add_ps(part, _mm512_load_ps(to)));
                }
            }
        }
    }

    STOCKPOT_APART void read_scales(const Run & run) {
        for (int b = 0; b < blocks_; ++b) {
            for (int c = 0; c < kRun; c += 16) {
                auto d = _mm512_setzero_ps();
                if (run.seen[c/kBlock])
                    d = scales_of(v_ + (run.first_cell + c)*a_.v_cell + b*sizeof(block_q8_0), a_.v_cell);
                _mm512_store_ps(s_.scales + b*kRun + c, d);
            }
        }
    }

    // Scores become weights; cells the token does not see weigh nothing. The largest weight is 32767, whatever
    // cells other rows see.
    STOCKPOT_APART void weigh(const Run & run, int row) {
        const int token = row/a_.group;
        auto scores = s_.scores + row*kRun;
        auto visible = [&] (int c) { return __mmask16(run.visible[token][c/kBlock] >> c%kBlock); };
        auto most = _mm512_set1_ps(kNothing);
        for (int c = 0; c < kRun; c += 16) most = _mm512_mask_max_ps(most, visible(c), most, _mm512_load_ps(scores + c));
        most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        __m512 p[kRun/16];
        auto sum = _mm512_setzero_ps();
        for (int i = 0; i < kRun/16; ++i) {
            p[i] = _mm512_maskz_mov_ps(visible(16*i), exp2_ps(_mm512_sub_ps(_mm512_load_ps(scores + 16*i), most)));
            sum = _mm512_add_ps(sum, p[i]);
        }
        s_.most[row] = _mm512_cvtss_f32(most);
        s_.sum[row] = _mm512_reduce_add_ps(sum);
        for (int b = 0; b < blocks_; ++b) {
            __m512 w[kRun/16];
            auto largest = _mm512_setzero_ps();
            for (int i = 0; i < kRun/16; ++i) {
                w[i] = _mm512_mul_ps(p[i], _mm512_load_ps(s_.scales + b*kRun + 16*i));
                largest = _mm512_max_ps(largest, w[i]);
            }
            const float unit = _mm512_reduce_max_ps(largest)*(1/32767.f);
            auto inverse = _mm512_set1_ps(unit > 0 ? 1/unit : 0.f);
            auto to = s_.weights + (row*blocks_ + b)*kRun;
            for (int i = 0; i < kRun/16; ++i) {
                auto rounded = _mm512_cvtps_epi32(_mm512_mul_ps(w[i], inverse));
                _mm256_store_si256((__m256i *)(to + 16*i), _mm512_cvtsepi32_epi16(rounded));
            }
            s_.units[row*blocks_ + b] = unit;
        }
    }

    // The largest score so far, what that makes of the partial result, and with which factor the run joins it.
    STOCKPOT_APART void update(int rows) {
        for (int first = 0; first < rows; first += 16) {
            alignas(64) float M[16], most[16];
            const int n = std::min(16, rows - first);
            for (int i = 0; i < 16; ++i) {
                const int row = s_.active[first + std::min(i, n - 1)];
                M[i] = result(row)[a_.head_size];
                most[i] = s_.most[row];
            }
            auto before = _mm512_load_ps(M), now = _mm512_max_ps(before, _mm512_load_ps(most));
            alignas(64) float keep[16], take[16];
            _mm512_store_ps(keep, exp2_ps(_mm512_sub_ps(before, now)));
            _mm512_store_ps(take, exp2_ps(_mm512_sub_ps(_mm512_load_ps(most), now)));
            _mm512_store_ps(M, now);
            for (int i = 0; i < n; ++i) {
                const int row = s_.active[first + i];
                auto r = result(row) + a_.head_size;
                r[0] = M[i];
                r[1] = r[1]*keep[i] + s_.sum[row]*take[i];
                s_.keep[row] = keep[i];
                s_.take[row] = take[i];
            }
        }
    }

    STOCKPOT_APART void read_values(const Run & run, int slab) {
        for (int i = 0; i < kRunBlocks; ++i) {
            if (!run.seen[i]) continue;
            for (int c = i*kBlock; c < (i + 1)*kBlock; c += 2) {
                auto even = (const block_q8_0 *)(v_ + (run.first_cell + c)*a_.v_cell) + slab/QK8_0;
                auto odd  = (const block_q8_0 *)((const char *)even + a_.v_cell);
                auto to = (__m512i *)(s_.values + c*kSlab);
                for (int b = 0; b < kSlab/QK8_0; ++b) {
                    auto x = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)even[b].qs), 0xd8);
                    auto y = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)odd[b].qs), 0xd8);
                    _mm512_store_si512(to + 2*b,     _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y)));
                    _mm512_store_si512(to + 2*b + 1, _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y)));
                }
            }
        }
    }

    // The sums stay below 2^31: 128 cells, weights below 2^15, values of at most 128.
    template <int n>
    STOCKPOT_APART void add_rows(const Run & run, int first, int slab) {
        __m512i sums[n][4] = {};
        const int16_t * weights[n];
        uint32_t tokens = 0;
        for (int i = 0; i < n; ++i) {
            const int row = s_.active[first + i];
            weights[i] = s_.weights + (row*blocks_ + slab/QK8_0)*kRun;
            tokens |= 1u << row/a_.group;
        }
        for (int block = 0; block < kRunBlocks; ++block) {
            if (!(run.seen[block] & tokens)) continue;
            for (int c = block*kBlock; c < (block + 1)*kBlock; c += 2) {
                __m512i v[4];
                for (int e = 0; e < 4; ++e) v[e] = _mm512_load_si512((const __m512i *)(s_.values + c*kSlab) + e);
                for (int i = 0; i < n; ++i) {
                    int32_t two;
                    std::memcpy(&two, weights[i] + c, 4);
                    auto w = _mm512_set1_epi32(two);
                    sums[i][0] = _mm512_dpwssd_epi32(sums[i][0], v[0], w);
                    sums[i][1] = _mm512_dpwssd_epi32(sums[i][1], v[1], w);
                    std::memcpy(&two, weights[i] + kRun + c, 4);
                    w = _mm512_set1_epi32(two);
                    sums[i][2] = _mm512_dpwssd_epi32(sums[i][2], v[2], w);
                    sums[i][3] = _mm512_dpwssd_epi32(sums[i][3], v[3], w);
                }
            }
        }
        for (int i = 0; i < n; ++i) {
            const int row = s_.active[first + i];
            auto to = result(row) + slab;
            auto keep = _mm512_set1_ps(s_.keep[row]);
            for (int e = 0; e < 4; ++e) {
                auto take = _mm512_set1_ps(s_.take[row]*s_.units[row*blocks_ + slab/QK8_0 + e/2]);
                auto kept = _mm512_mul_ps(keep, _mm512_loadu_ps(to + 16*e));
                _mm512_storeu_ps(to + 16*e, _mm512_fmadd_ps(take, _mm512_cvtepi32_ps(sums[i][e]), kept));
            }
        }
    }

    const Attention & a_;
    const int key_head_, blocks_;
    const char * k_, * v_;
    Scratch & s_;
    int rows_ = 0;
    float * results_ = nullptr;
    Queries queries_;
};

// The rows of all heads of a cell lie side by side: asked for while the run before is computed.
inline void prefetch(const char * first, long cell_bytes, const Run & run) {
    for (int i = 0; i < kRunBlocks; ++i) {
        if (!run.seen[i]) continue;
        auto block = first + (run.first_cell + i*kBlock)*cell_bytes;
        for (long at = 0; at < kBlock*cell_bytes; at += 64) _mm_prefetch(block + at, _MM_HINT_T1);
    }
}

// Every thread calls this, then, after a barrier, `merge`. `work`: work_bytes. Runs go to threads in turn,
// whoever sees them: that too keeps a row's result independent of the others.
inline void attend(const Attention & a, float * work, int thread, int threads) {
    const int tile = std::min(a.tokens, a.tile_tokens());
    Scratch scratch(tile*a.group, a.blocks());
    std::vector<Share> shares;
    shares.reserve(a.key_heads);
    for (int h = 0; h < a.key_heads; ++h) shares.emplace_back(a, h, scratch);
    Run runs[2];
    for (int first = 0; first < a.tokens; first += tile) {
        const int tokens = std::min(tile, a.tokens - first);
        for (int h = 0; h < a.key_heads; ++h) {
            auto row = (long(thread)*a.key_heads + h)*a.rows() + first*a.group;
            shares[h].begin(first, tokens, work + row*Attention::stride(a.head_size));
        }
        int cell = thread*kRun;
        auto next = [&] (Run & run) {
            for (; cell < a.cells; cell += threads*kRun) {
                if (!look(a, first, tokens, cell, run)) continue;
                cell += threads*kRun;
                return true;
            }
            return false;
        };
        bool more = next(runs[0]);
        for (int i = 0; more; i ^= 1) {
            more = next(runs[i ^ 1]);
            if (more) {
                prefetch(a.k, a.k_cell, runs[i ^ 1]);
                prefetch(a.v, a.v_cell, runs[i ^ 1]);
            }
            for (auto & share : shares) share.add(runs[i]);
        }
    }
}

inline void merge(const Attention & a, const float * work, float * out, long out_head, long out_token,
                  int thread, int threads) {
    const int stride = Attention::stride(a.head_size), rows = a.key_heads*a.rows();
    for (int row = thread; row < rows; row += threads) {
        const int h = row/a.rows(), token = row%a.rows()/a.group, g = row%a.group;
        float M = kNothing, S = 0;
        for (int t = 0; t < threads; ++t) M = std::max(M, work[(long(t)*rows + row)*stride + a.head_size]);
        auto to = (float *)((char *)out + (h*a.group + g)*out_head + token*out_token);
        std::memset(to, 0, a.head_size*sizeof(float));
        for (int t = 0; t < threads; ++t) {
            auto from = work + (long(t)*rows + row)*stride;
            if (from[a.head_size + 1] == 0) continue;
            float c = std::exp2(from[a.head_size] - M);
            S += c*from[a.head_size + 1];
            for (int e = 0; e < a.head_size; ++e) to[e] += c*from[e];
        }
        const float norm = S > 0 ? 1/S : 0.f;
        for (int e = 0; e < a.head_size; ++e) to[e] *= norm;
    }
}

}  // namespace stockpot

#endif
