"""One encoding, tried in a process of its own: `python -m stockpot.models.trial JOB.json RESULT.json`.

llama.cpp aborts the whole process where a combination of encoding and kernel is not supported, so trying
what may not work must not happen in the process that asks. The result goes to a file because the library
prints to standard output.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stockpot.errors import StockpotError
from stockpot.models.quality import Quality, compare, save_reference
from stockpot.models.speed import CELLS_NEEDED, PROMPT_TOKENS, STREAMS, Effort, Speed, measure


@dataclass(frozen=True, slots=True)
class Job:
    """Make `target` from `source` in `encoding` (None: it is there already), then measure it.

    `write_reference`: the distributions of this encoding become the file `reference`; otherwise they are
    compared with it, unless it is None.
    """

    source: Path
    target: Path
    encoding: str | None
    binding: str
    library: str
    cache_dir: Path
    threads: int | None
    effort: Effort | None
    reference: Path | None
    write_reference: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a job; `failure` is a sentence when it did not end well."""

    encode_s: float | None = None
    quality: Quality | None = None
    speed: Speed | None = None
    failure: str | None = None


def perform(job: Job) -> Result:
    """Do the job in this process."""
    from stockpot.engine.bindings import open_binding
    from stockpot.engine.llamacpp import open_driver

    encode_s = None
    if job.encoding is not None:
        started = time.perf_counter()
        binding = open_binding(job.binding, library=job.library, cache_dir=job.cache_dir)
        binding.quantize(job.source, job.target, job.encoding)
        encode_s = time.perf_counter() - started
    if job.reference is None and job.effort is None:
        return Result(encode_s)
    driver = open_driver(
        job.target,
        name="trial",
        binding=job.binding,
        library=job.library,
        cache_dir=job.cache_dir,
        cells=CELLS_NEEDED,
        max_sequences=STREAMS,
        max_batch_tokens=PROMPT_TOKENS,
        kv_cell_type="f16",
        threads=job.threads,
    )
    try:
        quality = None
        if job.reference is not None and job.write_reference:
            save_reference(driver, job.reference)
            quality = Quality(0.0, 0.0, 1.0)
        elif job.reference is not None:
            quality = compare(driver, job.reference)
        speed = measure(driver, job.effort) if job.effort else None
    finally:
        driver.close()
    return Result(encode_s, quality, speed)


def main(job_path: str, result_path: str) -> None:
    """Read the job, write its result."""
    job = msgspec.json.decode(Path(job_path).read_bytes(), type=Job, dec_hook=_decode_path)
    try:
        result = perform(job)
    except StockpotError as error:
        result = Result(failure=str(error))
    Path(result_path).write_bytes(msgspec.json.encode(result))


def encode_job(job: Job) -> bytes:
    return msgspec.json.encode(job, enc_hook=str)


def decode_result(data: bytes) -> Result:
    return msgspec.json.decode(data, type=Result)


def _decode_path(kind: type, value: object) -> object:
    return Path(str(value)) if kind is Path else value


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
