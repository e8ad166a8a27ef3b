// Attention of a few new tokens over many cells of 8-bit keys and values: the decode steps of several streams.
//
// Added by Stockpot (Apache-2.0) to iqk_flash_attn.cpp. The library takes one query head at a time, so keys and
// values are unpacked again for each head of a group and for each stream, and it gives whole heads to threads, so
// two threads share three heads as two and one.
//
// Here all query rows that read the same key head go together, and threads share the cells:
//   - cells are taken in blocks of 32; a block no token sees is skipped, in others only tokens that see some of it
//     take part. So streams share the work for their common prefix, and none pays for the tails of the others;
//   - keys are transposed to 16 cells side by side, scores are integer dot products (VNNI) with queries rounded
//     to 8 bits, as the library does for 8-bit keys;
//   - softmax is online (Milakov, Gimelshein 2018); each thread keeps a partial result, merged after a barrier
//     as in flash decoding (Dao et al. 2023).
// What a row gives depends on the cells it sees, where they lie and how many threads there are; not on the other
// rows of the batch. So a stream says the same alone and among others.

#pragma once

#if defined __AVX512F__ && defined __AVX512VNNI__ && defined __AVX512BW__ && defined __AVX512DQ__ && defined __AVX512VL__
#define STOCKPOT_DECODE_ATTENTION

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml-impl.h"
#include "ggml-quants.h"

namespace stockpot {

constexpr int kBlock = 32;       // cells whose keys and values are unpacked together
constexpr int kRunBlocks = 4;    // blocks that share one step of the softmax
constexpr int kRun = kRunBlocks*kBlock;
constexpr int kMaxTokens = 16;   // more are a prefill, for which the library's kernels are made
constexpr int kMaxHead = 256;    // elements of a head
constexpr int kRowsAtOnce = 6;   // 24 accumulators of 16 floats

struct DecodeAttention {
    int tokens, group, key_heads, cells, head_size;  // group: query heads to a key head
    long q_head, q_token, k_head, k_cell, v_head, v_cell, mask_token;  // strides in bytes
    const char * q, * k, * v, * mask;
    float scale;

    int rows() const { return tokens*group; }
    static int stride(int head_size) { return head_size + 16; }  // floats of a row's partial result: O, M, S
};

inline bool suits(int type_k, int type_v, int dk, int dv, int tokens, int q_heads, int k_heads, int v_heads,
                  int batches, int cells) {
    return type_k == GGML_TYPE_Q8_0 && type_v == GGML_TYPE_Q8_0 && dk == dv && dk%64 == 0 && dk <= kMaxHead
        && tokens <= kMaxTokens && k_heads == v_heads && q_heads%k_heads == 0 && batches == 1 && cells%kBlock == 0;
}

inline size_t work_bytes(int dv, int tokens, int q_heads, int threads) {
    return size_t(threads)*tokens*q_heads*DecodeAttention::stride(dv)*sizeof(float);
}

inline __m512 exp_ps(__m512 x) {  // relative error below 2e-7 for x <= 0; -inf gives 0
    x = _mm512_max_ps(x, _mm512_set1_ps(-104.f));
    auto n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    auto r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    auto p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.f)));
    return _mm512_scalef_ps(p, n);
}

// The queries of one key head, rounded to 8 bits in blocks of 32 with a scale each: to the same numbers as
// quantize_row_q8_2_x4 gives the library's own attention (scales in BF16), so that tokens which were computed in a
// large batch by that and in a small one by this differ by the order of floating-point sums alone.
struct Queries {
    std::vector<int8_t>  qs;      // [row][head_size]
    std::vector<float>   scales;  // [row][head_size/32], the scale of the scores included
    std::vector<int32_t> offsets; // [row][head_size/32]: what keys shifted by 128 add, to be taken off

    void read(const DecodeAttention & a, int key_head) {
        const int blocks = a.head_size/QK8_0;
        qs.resize(a.rows()*a.head_size);
        scales.resize(a.rows()*blocks);
        offsets.resize(a.rows()*blocks);
        for (int row = 0; row < a.rows(); ++row) {
            auto x = (const float *)(a.q + (row/a.group)*a.q_token + (key_head*a.group + row%a.group)*a.q_head);
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
                scales [row*blocks + b] = d*a.scale;
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

// Blocks of cells that take one step of the softmax together. They begin at a multiple of kRun, so that what a
// row gives does not depend on what others see.
struct Run {
    int first_cell;
    uint32_t seen[kRunBlocks];  // bit t: token t sees some cells of the block
    uint32_t seen_by_any;
};

// What a thread needs for one run at a time.
struct Scratch {
    explicit Scratch(int rows) : active(rows), storage(rows*kRun + kBlock*64 + 16) {
        scores = (float *)(((uintptr_t)storage.data() + 63) & ~uintptr_t(63));
        values = scores + rows*kRun;
    }
    std::vector<int> active;  // rows that see the block at hand
    std::vector<float> storage;
    float * scores;           // [row][cell of the run]
    float * values;           // [cell of a block][64]
};

// A thread's share of one key head.
class Share {
public:
    Share(const DecodeAttention & a, int key_head, float * results, Scratch & scratch)
        : a_(a), blocks_(a.head_size/QK8_0), results_(results),
          k_(a.k + key_head*a.k_head), v_(a.v + key_head*a.v_head), scratch_(scratch) {
        queries_.read(a, key_head);
        for (int row = 0; row < a.rows(); ++row) {
            auto r = result(row);
            std::memset(r, 0, a.head_size*sizeof(float));
            r[a.head_size] = -INFINITY;
            r[a.head_size + 1] = 0;
        }
    }

    void add(const Run & run) {
        for (int i = 0; i < kRunBlocks; ++i)
            if (int rows = find_active(run.seen[i])) add_scores(run.first_cell + i*kBlock, rows, scratch_.scores + i*kBlock);
        const int rows = find_active(run.seen_by_any);
        for (int i = 0; i < rows; ++i) weigh(run, scratch_.active[i]);
        for (int i = 0; i < kRunBlocks; ++i)
            if (int rows = find_active(run.seen[i])) add_values(run.first_cell + i*kBlock, rows, scratch_.scores + i*kBlock);
    }

private:
    int find_active(uint32_t seen) {
        int rows = 0;
        for (uint32_t left = seen; left; left &= left - 1) {
            const int token = __builtin_ctz(left);
            for (int g = 0; g < a_.group; ++g) scratch_.active[rows++] = token*a_.group + g;
        }
        return rows;
    }

    float * result(int row) { return results_ + row*DecodeAttention::stride(a_.head_size); }

    void add_scores(int first_cell, int rows, float * scores) {
        for (int half = 0; half < 2; ++half) {
            auto cells = k_ + (first_cell + 16*half)*a_.k_cell;
            for (int b = 0; b < blocks_; ++b) {
                auto block = cells + b*sizeof(block_q8_0);
                auto d = scales_of(block, a_.k_cell);
                block += sizeof(ggml_half);
                __m512i x[8];
                for (int c = 0; c < 8; ++c) {
                    auto lo = _mm256_loadu_si256((const __m256i *)(block + c*a_.k_cell));
                    auto hi = _mm256_loadu_si256((const __m256i *)(block + (c + 8)*a_.k_cell));
                    x[c] = _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
                }
                transpose_dwords(x);
                for (int j = 0; j < 8; ++j) x[j] = _mm512_xor_si512(x[j], _mm512_set1_epi8(-128));
                for (int i = 0; i < rows; ++i) {
                    const int row = scratch_.active[i];
                    auto q = queries_.qs.data() + row*a_.head_size + b*QK8_0;
                    auto sum = _mm512_set1_epi32(queries_.offsets[row*blocks_ + b]);
                    for (int j = 0; j < 8; ++j) {
                        int32_t four;
                        std::memcpy(&four, q + 4*j, 4);
                        sum = _mm512_dpbusd_epi32(sum, x[j], _mm512_set1_epi32(four));
                    }
                    auto part = _mm512_mul_ps(_mm512_mul_ps(d, _mm512_set1_ps(queries_.scales[row*blocks_ + b])),
                                              _mm512_cvtepi32_ps(sum));
                    auto to = scores + row*kRun + 16*half;
                    _mm512_store_ps(to, b == 0 ? part : _mm512_add_ps(part, _mm512_load_ps(to)));
                }
            }
        }
    }

    // Scores become weights, exp(score - M), and what was summed so far is brought to the new M.
    void weigh(const Run & run, int row) {
        const int token = row/a_.group;
        auto mask = (const uint16_t *)(a_.mask + token*a_.mask_token) + run.first_cell;
        auto scores = scratch_.scores + row*kRun;
        auto most = _mm512_set1_ps(-INFINITY);
        for (int i = 0; i < kRunBlocks; ++i) {
            if (!(run.seen[i] >> token & 1)) continue;
            auto hidden = _mm512_test_epi16_mask(_mm512_loadu_si512(mask + i*kBlock), _mm512_set1_epi16(-1));
            for (int half = 0; half < 2; ++half, hidden >>= 16) {
                auto at = scores + i*kBlock + 16*half;
                auto x = _mm512_mask_mov_ps(_mm512_load_ps(at), __mmask16(hidden), _mm512_set1_ps(-INFINITY));
                _mm512_store_ps(at, x);
                most = _mm512_max_ps(most, x);
            }
        }
        auto r = result(row);
        float & M = r[a_.head_size], & S = r[a_.head_size + 1];
        const float now = _mm512_reduce_max_ps(most);  // finite: the token sees a cell of the run
        if (now > M) {
            const float c = std::exp(M - now);
            for (int e = 0; e < a_.head_size; e += 16)
                _mm512_storeu_ps(r + e, _mm512_mul_ps(_mm512_set1_ps(c), _mm512_loadu_ps(r + e)));
            S *= c;
            M = now;
        }
        auto sum = _mm512_setzero_ps();
        for (int i = 0; i < kRunBlocks; ++i) {
            if (!(run.seen[i] >> token & 1)) continue;
            for (int half = 0; half < 2; ++half) {
                auto at = scores + i*kBlock + 16*half;
                auto x = exp_ps(_mm512_sub_ps(_mm512_load_ps(at), _mm512_set1_ps(M)));
                sum = _mm512_add_ps(sum, x);
                _mm512_store_ps(at, x);
            }
        }
        S += _mm512_reduce_add_ps(sum);
    }

    void add_values(int first_cell, int rows, const float * weights) {
        auto cells = v_ + first_cell*a_.v_cell;
        for (int slab = 0; slab < a_.head_size; slab += 64) {
            for (int c = 0; c < kBlock; ++c) {
                auto b = (const block_q8_0 *)(cells + c*a_.v_cell) + slab/QK8_0;
                for (int h = 0; h < 2; ++h) {
                    auto d = _mm512_cvtph_ps(_mm256_set1_epi16(b[h].d));
                    for (int e = 0; e < 2; ++e) {
                        auto x = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)b[h].qs + e));
                        _mm512_store_ps(scratch_.values + c*64 + 32*h + 16*e, _mm512_mul_ps(d, _mm512_cvtepi32_ps(x)));
                    }
                }
            }
            int i = 0;
            for (; i + kRowsAtOnce <= rows; i += kRowsAtOnce) add_rows<kRowsAtOnce>(i, slab, weights);
            switch (rows - i) {
                case 5: add_rows<5>(i, slab, weights); break;
                case 4: add_rows<4>(i, slab, weights); break;
                case 3: add_rows<3>(i, slab, weights); break;
                case 2: add_rows<2>(i, slab, weights); break;
                case 1: add_rows<1>(i, slab, weights); break;
                default: break;
            }
        }
    }

    template <int n>
    void add_rows(int first, int slab, const float * weights) {
        __m512 sums[n][4];
        for (int i = 0; i < n; ++i)
            for (int e = 0; e < 4; ++e) sums[i][e] = _mm512_loadu_ps(result(scratch_.active[first + i]) + slab + 16*e);
        for (int c = 0; c < kBlock; ++c) {
            __m512 v[4];
            for (int e = 0; e < 4; ++e) v[e] = _mm512_load_ps(scratch_.values + c*64 + 16*e);
            for (int i = 0; i < n; ++i) {
                auto p = _mm512_set1_ps(weights[scratch_.active[first + i]*kRun + c]);
                for (int e = 0; e < 4; ++e) sums[i][e] = _mm512_fmadd_ps(p, v[e], sums[i][e]);
            }
        }
        for (int i = 0; i < n; ++i)
            for (int e = 0; e < 4; ++e) _mm512_storeu_ps(result(scratch_.active[first + i]) + slab + 16*e, sums[i][e]);
    }

    const DecodeAttention & a_;
    const int blocks_;
    float * results_;
    const char * k_, * v_;
    Scratch & scratch_;
    Queries queries_;
};

inline Run look(const DecodeAttention & a, int first_cell) {
    Run run{first_cell, {}, 0};
    for (int i = 0; i < kRunBlocks && first_cell + i*kBlock < a.cells; ++i) {
        for (int t = 0; t < a.tokens; ++t) {
            auto m = _mm512_loadu_si512((const uint16_t *)(a.mask + t*a.mask_token) + first_cell + i*kBlock);
            if (_mm512_testn_epi16_mask(m, _mm512_set1_epi16(-1))) run.seen[i] |= 1u << t;
        }
        run.seen_by_any |= run.seen[i];
    }
    return run;
}

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
inline void attend(const DecodeAttention & a, float * work, int thread, int threads) {
    Scratch scratch(a.rows());
    std::vector<Share> shares;
    shares.reserve(a.key_heads);
    for (int h = 0; h < a.key_heads; ++h) {
        auto results = work + (long(thread)*a.key_heads + h)*a.rows()*DecodeAttention::stride(a.head_size);
        shares.emplace_back(a, h, results, scratch);
    }
    std::vector<Run> runs;
    for (int cell = thread*kRun; cell < a.cells; cell += threads*kRun)
        if (auto run = look(a, cell); run.seen_by_any) runs.push_back(run);
    for (size_t i = 0; i < runs.size(); ++i) {
        if (i + 1 < runs.size()) {
            prefetch(a.k, a.k_cell, runs[i + 1]);
            prefetch(a.v, a.v_cell, runs[i + 1]);
        }
        for (auto & share : shares) share.add(runs[i]);
    }
}

inline void merge(const DecodeAttention & a, const float * work, float * out, long out_head, long out_token,
                  int thread, int threads) {
    const int stride = DecodeAttention::stride(a.head_size), rows = a.key_heads*a.rows();
    for (int row = thread; row < rows; row += threads) {
        const int h = row/a.rows(), token = row%a.rows()/a.group, g = row%a.group;
        float M = -INFINITY, S = 0;
        for (int t = 0; t < threads; ++t) M = std::max(M, work[(long(t)*rows + row)*stride + a.head_size]);
        auto to = (float *)((char *)out + (h*a.group + g)*out_head + token*out_token);
        std::memset(to, 0, a.head_size*sizeof(float));
        for (int t = 0; t < threads; ++t) {
            auto from = work + (long(t)*rows + row)*stride;
            if (from[a.head_size + 1] == 0) continue;
            float c = std::exp(from[a.head_size] - M);
            S += c*from[a.head_size + 1];
            for (int e = 0; e < a.head_size; ++e) to[e] += c*from[e];
        }
        const float norm = S > 0 ? 1/S : 0.f;
        for (int e = 0; e < a.head_size; ++e) to[e] *= norm;
    }
}

}  // namespace stockpot

#endif
