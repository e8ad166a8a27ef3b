"""Where the natively built library lies, and the edits its source gets.

The fork's shortcuts hold for one sequence that fills the cache from its first cell. Stockpot keeps many
sequences in one cache, their cells mixed, so three places are corrected before compiling:

1. Flash attention left out trailing blocks of cells by looking at their first cell in the mask of the last
   row of a group. A sequence whose newest cells lie in a block that begins with another's cell lost them
   (or the process aborted: no cell left). Now a block is left out when no row sees any of its cells,
   trailing or not.
2. Sliding-window layers looked only at the last cells of the cache; a window may lie anywhere.
3. The highest used cell was searched by pages, and missed above pages that end in free cells.

The plain wheel has none of this: there the driver does without flash attention and closes gaps instead.

Three kernels are added for processors with AVX-512 and VNNI, for what serving does most (`engine/kernels`):
attention over 8-bit cells, products of 8-bit weights, and rounding activations to eight bits for them. Side
by side with the library's own, on 2 processors (AMD EPYC, Zen 4), behind 2,048 tokens: a decode step of one
stream 8.0 ms instead of 10.9, of eight 15.7 instead of 20.5; 40 new tokens 41 ms instead of 58, beside seven
decoding streams 50 instead of 74; 512 new tokens behind 1,024: 390 instead of 515.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from blake3 import blake3

from stockpot.engine.bindings.ik import VERSION
from stockpot.errors import BuildFailed

LIBRARIES = ("libllama.so", "libggml.so")
_FLASH_ATTENTION = "ggml/src/iqk/fa/iqk_fa_templates.h"
_ATTENTION = "ggml/src/iqk/iqk_flash_attn.cpp"
_PRODUCTS = "ggml/src/iqk/iqk_gemm_legacy_quants.cpp"
_QUANTIZATION = "ggml/src/iqk/iqk_quantize.cpp"
_KERNELS = ("attention.h", "q8_0_r8_rows.h", "q8_2_quantize.h")
"""Files of `engine/kernels`."""
_KERNELS_PLACE = "ggml/src/iqk/stockpot_"
"""Where they are put in the source: folder, and what their names there begin with."""


@dataclass(frozen=True, slots=True)
class SourceEdit:
    """`old` stands `count` times in the file `path` and becomes `new`."""

    path: str
    old: str
    new: str
    count: int


_BLOCK_IS_MASKED = """\
// Stockpot: cells of several sequences lie mixed, so a block may be left out only if no row sees any of it.
static inline bool fa_block_is_masked(const char * mask, int stride_m, int rows, int first, int columns) {
    for (int j = 0; j < rows; ++j) {
        auto m = (const uint16_t *)(mask + j*stride_m) + first;
        bool visible = false;
        for (int i = 0; i < columns; ++i) visible |= m[i] == 0;
        if (visible) return false;
    }
    return true;
}

"""
_SKIP_BLOCK = """\
for (int k1 = 0; k1 < ik/k_step; ++k1) {
            if (fa_block_is_masked(mr, stride_m, q_step, 0, k_step)) {
                kh.next_block(k_step);
                vh.next_block(k_step);
                mr += k_step*sizeof(ggml_half);
                continue;
            }
"""
_COMPUTE_HELPER = (
    "template <int Dk, int Dv, int q_step, int k_step, "
    "typename KHelper, typename VHelper, typename KQHelper>\n"
    "void compute_helper("
)

_WORK_SIZE = """\
    size_t size = 0;
    if (Q->ne[1] >= 8 && K->type == GGML_TYPE_Q8_0) {
        size = ggml_row_size("""
_LARGER_WORK_SIZE = """\
    size_t size = 0;
#ifdef STOCKPOT_ATTENTION
    if (stockpot::suits(K->type, V->type, K->ne[0], V->ne[0], Q->ne[2], K->ne[2], V->ne[2], Q->ne[3],
                        K->ne[1])) {
        size = stockpot::work_bytes(V->ne[0], Q->ne[1], Q->ne[2], nth);
    }
#endif
    if (Q->ne[1] >= 8 && K->type == GGML_TYPE_Q8_0) {
        size += ggml_row_size("""
_ATTEND = """\
#ifdef STOCKPOT_ATTENTION
    if (mask && !sinks && softcap == 0.f &&
        stockpot::suits(int_type_k_in, int_type_v, Dk, Dv, neq2, nek2, nev2, neq3, nek1)) {
        const stockpot::Attention a{neq1, neq2/nek2, nek2, nek1, Dk,
            nbq2, stride_q, nbk2, stride_k, nbv2, stride_v, stride_m,
            (const char *)q, (const char *)k, (const char *)v, (const char *)mask, scale};
        stockpot::attend(a, (float *)work_buffer_in, ith, nth);
        barrier(barrier_data);
        stockpot::merge(a, (const float *)work_buffer_in, qkv, nb1, long(ne1)*nb1, ith, nth);
        return true;
    }
#endif

"""
_PRODUCT = """\
template <int nrc_y>
static void mul_mat_q8_0_r8_q8_2(int n, const void * vx, size_t bx, const DataInfo& info, int nrc_x) {
    GGML_ASSERT(nrc_x%16 == 0);
    Q8<nrc_y, block_q8_2_x4> q8(info);
    int nb = n / QK8_0;
"""
_PRODUCT_INSTEAD = (
    '#include "stockpot_q8_0_r8_rows.h"\n'
    + _PRODUCT
    + """\
    stockpot_q8_0_r8_rows<nrc_y>(nb, (const char *)vx, bx, q8, info, nrc_x);
    return;
"""
)

_QUANTIZE = """\
void quantize_row_q8_2_x4(const float * x, void * vy, int64_t k) {
"""
_QUANTIZE_INSTEAD = (
    '#include "stockpot_q8_2_quantize.h"\n\n'
    + _QUANTIZE
    + """\
#ifdef STOCKPOT_Q8_2_QUANTIZE
    stockpot_quantize_row_q8_2_x4(x, vy, k);
    return;
#endif
"""
)

SOURCE_EDITS = (
    SourceEdit(
        _FLASH_ATTENTION,
        old="for (; ik >=0 && Mc[ik] != 0; ik -= k_step);",
        new="(void) Mc;\n"
        "        for (; ik >= 0 && fa_block_is_masked(mr, stride_m, q_step, ik, k_step); ik -= k_step);",
        count=4,
    ),
    SourceEdit(_FLASH_ATTENTION, old="for (int k1 = 0; k1 < ik/k_step; ++k1) {\n", new=_SKIP_BLOCK, count=4),
    SourceEdit(_FLASH_ATTENTION, old=_COMPUTE_HELPER, new=_BLOCK_IS_MASKED + _COMPUTE_HELPER, count=1),
    SourceEdit(
        _ATTENTION,
        old="    if (n_swa > 0 && mask) {",
        new=_ATTEND
        + "    if (false && n_swa > 0 && mask) { // Stockpot: the window may lie anywhere in the cache",
        count=1,
    ),
    SourceEdit(
        _ATTENTION,
        old="#include <unordered_set>\n",
        new='#include <unordered_set>\n\n#include "stockpot_attention.h"\n',
        count=1,
    ),
    SourceEdit(_ATTENTION, old=_WORK_SIZE, new=_LARGER_WORK_SIZE, count=1),
    SourceEdit(_PRODUCTS, old=_PRODUCT, new=_PRODUCT_INSTEAD, count=1),
    SourceEdit(_QUANTIZATION, old=_QUANTIZE, new=_QUANTIZE_INSTEAD, count=1),
    SourceEdit(
        "src/llama.cpp",
        old="auto max_cell = llama_kv_cache_cell_max(kv_self, pad);",
        new="auto max_cell = llama_kv_cache_cell_max(kv_self); // Stockpot: pages may end in free cells",
        count=1,
    ),
)


def kernels() -> dict[str, str]:
    """Our own kernels: paths in the source and contents."""
    folder = files("stockpot.engine").joinpath("kernels")
    return {_KERNELS_PLACE + name: folder.joinpath(name).read_text(encoding="utf-8") for name in _KERNELS}


def apply_edits(source: Path) -> None:
    """Edit the unpacked source in place and add our kernels. Raises BuildFailed where it is not the source
    the edits are for."""
    for edit in SOURCE_EDITS:
        path = source / edit.path
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise BuildFailed(f"The source of ik_llama.cpp lacks {edit.path}: {error.strerror}.") from error
        if text.count(edit.old) != edit.count:
            raise BuildFailed(
                f"{edit.path} is not that of ik_llama.cpp {VERSION}: a passage to correct stands there "
                f"{text.count(edit.old)} times, not {edit.count}."
            )
        path.write_text(text.replace(edit.old, edit.new), encoding="utf-8")
    for place, text in kernels().items():
        (source / place).write_text(text, encoding="utf-8")


def library_folder(cache_dir: Path) -> Path:
    """Where the library for this processor and these edits belongs; other processors get other folders."""
    edits = blake3(repr((SOURCE_EDITS, kernels())).encode()).hexdigest()[:6]
    return cache_dir / "engine" / f"ik-{VERSION}-{edits}-{processor_tag()}"


def native_library(cache_dir: Path) -> Path | None:
    """The library `stockpot engine build` made for this processor; None where it has not."""
    folder = library_folder(cache_dir)
    return folder / LIBRARIES[0] if all((folder / name).is_file() for name in LIBRARIES) else None


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Instruction set extensions, sorted; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return ()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return tuple(sorted(value.split()))
    return ()


def processor_tag() -> str:
    """Names processors that can run each other's native code: machine type and a hash of the extensions."""
    flags = blake3(" ".join(processor_flags()).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{flags}"
