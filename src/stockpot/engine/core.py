"""The engine without its thread: requests in, steps, events out. Everything here runs on one thread.

A step: admit, decode one batch, choose a token for every sequence that got logits, send the events out, let
finished sequences leave the context. `engine.Engine` puts a thread and a command queue around it; tests call
it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stockpot.clock import Clock
from stockpot.engine.admission_account import explain_admission
from stockpot.engine.driver import Batch, Driver, DriverFailure, OutOfCells
from stockpot.engine.reports import EngineStats, Observer, Report, RequestReport, StepReport, TierFigures
from stockpot.engine.residency import Residency
from stockpot.engine.sampling import NoToken, choose
from stockpot.engine.scheduler import Scheduler, Work
from stockpot.engine.sequence import Phase, Sequence, Task
from stockpot.events import (
    CacheTier,
    Completed,
    Delta,
    Event,
    Finished,
    FinishReason,
    Progress,
    Queued,
    Started,
    Timings,
    TokenDetail,
    Usage,
)
from stockpot.kv.block import Namespace, token_key
from stockpot.kv.cache import CacheLimits, KVCache
from stockpot.kv.invalidation import Invalidation

Sink = Callable[[list[tuple[Task, Event]]], None]
"""Takes events, in order. Must not block or raise."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The engine's share of the settings (see `settings.EngineSettings` and `CacheSettings`)."""

    prefill_tokens_beside_decode: int = 256
    queue_limit: int = 256
    cache_enabled: bool = True
    cache_automatic: bool = True
    block_tokens: int = 256
    ram_bytes: int = 2**30
    check_integrity: bool = False


class EngineCore:
    """Runs requests on a driver, a step at a time."""

    def __init__(
        self,
        driver: Driver,
        limits: EngineLimits,
        *,
        sink: Sink,
        observers: Iterable[Observer],
        clock: Clock,
        cache: KVCache | None = None,
    ) -> None:
        """`cache` is used where the limits enable it; None makes one with RAM alone."""
        self._driver = driver
        self._automatic = limits.cache_automatic
        self._sink = sink
        self._observers = tuple(observers)
        self._clock = clock
        if not limits.cache_enabled:
            cache = None
        elif cache is None:
            cache = KVCache(
                Namespace(driver.facts.fingerprint, driver.facts.layout),
                CacheLimits(block_tokens=limits.block_tokens, ram_bytes=limits.ram_bytes),
                clock=clock,
            )
        self.cache = cache
        self._residency = Residency(driver, cache, clock)
        self._scheduler = Scheduler(
            self._residency,
            max_batch_tokens=driver.max_batch_tokens,
            prefill_tokens_beside_decode=limits.prefill_tokens_beside_decode,
            on_admit=self._on_admit,
            on_preempt=self._on_preempt,
        )
        self._outbox: list[tuple[Task, Event]] = []
        self._tasks: dict[Task, None] = {}  # in order of arrival
        self._steps = 0
        self._computed_tokens = 0
        self._cached_tokens: dict[CacheTier, int] = {"context": 0, "ram": 0, "disk": 0, "redis": 0}
        self._generated_tokens = 0
        self._preemptions = 0
        self._moved_up = False  # a request has left since positions were told

    @property
    def tasks(self) -> list[Task]:
        """Requests that are not over."""
        return list(self._tasks)

    def submit(self, task: Task) -> None:
        """Take a request; its sequences wait from now on."""
        self._tasks[task] = None
        if self.cache is not None:
            shared = token_key(task.prompt[: task.labels.shared_tokens])
            task.scope = self.cache.store.scope(task.labels.tenant, shared)
            task.labels = replace(task.labels, epoch=self.cache.invalidations.latest)
            if not self._automatic:
                task.marked_tokens = max((each.tokens for each in task.labels.promises), default=0)
        for sequence in task.sequences:
            self._residency.start_fetch(sequence)
            self._scheduler.add(sequence)

    def end(self, task: Task, reason: FinishReason, detail: str | None = None) -> None:
        """End a request early; what it computed stays in the store. Harmless for one that is over."""
        if task not in self._tasks:
            return
        for sequence in task.sequences:
            if sequence.phase is not Phase.DONE:
                self._finish(sequence, reason, detail)
                self._scheduler.retire(sequence)
                self._residency.leave(sequence)
        self._settle(task)

    def expire(self) -> None:
        """End requests whose deadline has passed."""
        now_s = self._clock.monotonic()
        for task in self.tasks:
            if task.deadline_s is not None and now_s >= task.deadline_s:
                self.end(task, "deadline")

    def abandon(self, detail: str) -> None:
        """The driver is dead: end everything with an error, without touching it."""
        for task in self.tasks:
            for sequence in task.sequences:
                if sequence.phase is not Phase.DONE:
                    self._finish(sequence, "error", detail)
                    sequence.phase = Phase.DONE
            self._settle(task)
        self.flush()

    def preempt_one(self) -> None:
        """Take the sequence admitted last out of the batch, as pressure would; it goes on later."""
        if self._scheduler.running:
            self._scheduler.preempt()

    def invalidate(self, records: Iterable[Invalidation]) -> int:
        """Drop what the records match from RAM, now; how many blocks. Requests that run finish with what they
        have, and nobody else takes it from them."""
        if self.cache is None:
            return 0
        records = list(records)
        oldest = min((record.epoch for record in records), default=0)
        for task in self._tasks:
            if not any(sequence.admissions for sequence in task.sequences):
                continue  # it holds nothing yet
            task.shareable = False
            # It may know of the records and hold what they match all the same, reused before they came here:
            # what it computed must not be kept as if it were younger than they are.
            task.labels = replace(task.labels, epoch=min(task.labels.epoch, max(0, oldest - 1)))
        return self.cache.store.invalidate(records)

    def patience_s(self) -> float | None:
        """Seconds until a waiting request gives up what it waits for; None where none waits."""
        fetches = [each.fetch for each in self._scheduler.waiting if each.fetch is not None]
        if not fetches:
            return None
        if any(fetch.done for fetch in fetches):
            return 0.0
        return max(0.0, min(fetch.give_up_s for fetch in fetches) - self._clock.monotonic())

    def step(self) -> bool:
        """Admit, decode one batch, choose, send, let leave. False where there was nothing to do."""
        self._scheduler.admit()
        work = self._scheduler.plan()
        if not work:
            self.flush()
            return False
        started_s = self._clock.monotonic()
        logits, work = self._decode(work)
        decode_tokens = sum(1 for each in work if each.sequence.generated and each.tokens == 1)
        for each in work:
            if not each.sequence.generated:
                self._computed_tokens += each.tokens
            each.sequence.computed += each.tokens
        sampling_s = self._clock.monotonic()
        finished, gaps = self._choose(logits, [each.sequence for each in work if each.last])
        ended_s = self._clock.monotonic()
        self._steps += 1
        prefill_tokens = sum(each.tokens for each in work) - decode_tokens
        if self.cache is not None and prefill_tokens > decode_tokens:
            self.cache.prefill.computed(prefill_tokens, sampling_s - started_s)
        for sequence in finished:
            self._scheduler.retire(sequence)
            self._settle(sequence.task)
        self._report_progress(work)
        self.flush()  # clients first: leaving the context takes milliseconds
        for sequence in finished:
            self._residency.leave(sequence)
        self._tell(
            StepReport(
                decode_tokens=decode_tokens,
                prefill_tokens=prefill_tokens,
                sequences=len(work),
                duration_s=ended_s - started_s,
                sample_s=ended_s - sampling_s,
                inter_token_s=tuple(gaps),
            )
        )
        return True

    def flush(self) -> None:
        """Send what is in the outbox."""
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._sink(events)

    def check_integrity(self) -> None:
        """Raise AssertionError where pool, tree, tier and library disagree."""
        self._residency.check_integrity()

    def stats(self) -> EngineStats:
        """A snapshot. May be called from any thread: counts may then be a step apart from each other."""
        store, pool = self._residency.store, self._residency.pool
        cache = self.cache
        waiting = self._scheduler.waiting.copy()
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=len(waiting),
            joining=sum(1 for each in waiting if each.join is not None),
            preempted=sum(1 for each in waiting if each.generated),
            steps=self._steps,
            cells=pool.cells,
            cells_used=pool.used,
            kv_bytes_per_token=self._driver.facts.kv_bytes_per_token,
            ram_capacity_bytes=store.ram.capacity_bytes if store else 0,
            ram_used_bytes=store.ram.used_bytes if store else 0,
            ram_blocks=len(store.ram) if store else 0,
            ram_pinned_blocks=store.pinned_blocks if store else 0,
            prompt_tokens_computed=self._computed_tokens,
            prompt_tokens_cached=dict(self._cached_tokens),
            tokens_generated=self._generated_tokens,
            preemptions=self._preemptions,
            evicted_blocks=dict(store.evicted) if store else {},
            fetching=sum(1 for each in waiting if each.fetch is not None),
            tenant_bytes=dict(store.tenant_bytes) if store else {},
            promised_bytes=store.promises.used_bytes if store else 0,
            promises_refused=store.promises.refused if store else 0,
            prefill_s_per_token=cache.prefill.seconds_per_token if cache else 0.0,
            write_behind_bytes=cache.queued_bytes if cache else 0,
            tiers={slot.tier.name: TierFigures(slot.tier.stats(), slot.meter.speed) for slot in cache.slots}
            if cache
            else {},
        )

    def _decode(self, work: list[Work]) -> tuple[NDArray[np.float32], list[Work]]:
        """Run the batch; where no free run of cells is found, move cells together, then preempt."""
        defragmented = False
        while True:
            try:
                logits = self._driver.decode(_batch(work))
            except OutOfCells:
                if not defragmented:
                    self._driver.defragment()
                    defragmented = True
                elif len(self._scheduler.running) > 1:
                    self._scheduler.preempt()
                    work = self._scheduler.plan()
                else:
                    raise DriverFailure(
                        "a single sequence does not fit the context it was admitted to"
                    ) from None
            else:
                for each in work:
                    self._residency.pool.extend(_slot(each.sequence), each.tokens)
                return logits, work

    def _report_progress(self, work: list[Work]) -> None:
        """Tell those who wait how far they are: prompts that need another step, and, where a request has
        left, all that have not started how many stand before them."""
        for each in work:
            sequence = each.sequence
            if not each.last and not sequence.generated and sequence.choice == 0 and sequence.admissions == 1:
                cached = sum(sequence.task.cached_tokens.values())
                progress = Progress(sequence.computed - cached, sequence.prompt_length - cached)
                self._outbox.append((sequence.task, progress))
        if self._moved_up:
            self._moved_up = False
            for position, task in enumerate(self._tasks):
                if task.started_s is None:
                    self._outbox.append((task, Queued(position)))

    def _choose(
        self, logits: NDArray[np.float32], chosen: list[Sequence]
    ) -> tuple[list[Sequence], list[float]]:
        """Give every sequence with logits its next token; those that are complete, and the seconds between
        each stream's last two tokens."""
        finished: list[Sequence] = []
        gaps: list[float] = []
        if not chosen:
            return finished, gaps
        picks = choose(logits, [each.sampler for each in chosen])
        now_s = self._clock.monotonic()
        for sequence, pick in zip(chosen, picks, strict=True):
            if isinstance(pick, NoToken):
                self._finish(sequence, "error", pick.reason)
                finished.append(sequence)
                continue
            if sequence.last_token_s is not None:
                gaps.append(now_s - sequence.last_token_s)
            sequence.last_token_s = now_s
            if sequence.task.first_token_s is None:
                sequence.task.first_token_s = now_s
            if self._take(sequence, pick.token_id, pick.detail):
                finished.append(sequence)
        return finished, gaps

    def _take(self, sequence: Sequence, token: int, detail: TokenDetail | None) -> bool:
        """Append a token and emit its text; whether the choice is complete."""
        sequence.task.generated += 1
        self._generated_tokens += 1
        sequence.append(token)
        reason: FinishReason | None = None
        if self._driver.vocabulary.ends_generation(token):
            text, reason = "", "stop"
        else:
            text = sequence.text.push(token)
            if sequence.text.stopped is not None or sequence.sampler.complete:
                reason = "stop"
            elif not sequence.room:
                reason = "length"
        if reason is not None:
            text += sequence.text.finish()
        details = (detail,) if detail is not None else ()
        self._outbox.append((sequence.task, Delta(sequence.choice, text, (token,), details)))
        if reason is not None:
            self._finish(sequence, reason)
        return reason is not None

    def _finish(self, sequence: Sequence, reason: FinishReason, detail: str | None = None) -> None:
        sequence.finish_reason = reason
        self._outbox.append((sequence.task, Finished(sequence.choice, reason, detail)))

    def _settle(self, task: Task) -> None:
        """When all choices are over, the request is."""
        if not task.done or task not in self._tasks:
            return
        del self._tasks[task]
        self._moved_up = True
        now_s = self._clock.monotonic()
        started_s = task.started_s if task.started_s is not None else now_s
        timings = Timings(
            queue_s=started_s - task.arrived_s,
            ttft_s=task.first_token_s - task.arrived_s if task.first_token_s is not None else None,
            total_s=now_s - task.arrived_s,
        )
        usage = Usage(len(task.prompt), dict(task.cached_tokens), task.generated, _promised(task))
        self._outbox.append((task, Completed(usage, timings)))
        reason = task.sequences[0].finish_reason or "error"
        self._tell(RequestReport(reason, usage, timings, task.preemptions))

    def _on_admit(self, sequence: Sequence, reused: dict[CacheTier, int]) -> None:
        """Count what the cache gave; the request has started when its first choice is admitted."""
        task = sequence.task
        if sequence.admissions > 1:
            return  # back from preemption: its prompt was counted when it first came
        for tier, tokens in reused.items():
            self._cached_tokens[tier] += tokens
        if task.started_s is None:
            task.started_s = self._clock.monotonic()
            task.cached_tokens = reused
            queue_s = task.started_s - task.arrived_s
            self._outbox.append((task, Started(len(task.prompt), dict(reused), queue_s)))
            explain_admission(self.cache, sequence, reused, now_s=self._clock.wall())

    def _on_preempt(self, sequence: Sequence) -> None:
        sequence.task.preemptions += 1
        self._preemptions += 1

    def _tell(self, report: Report) -> None:
        for observer in self._observers:
            observer.observe(report)


def _batch(work: list[Work]) -> Batch:
    """The driver's arrays for a step's work."""
    count = sum(each.tokens for each in work)
    tokens, positions, sequences = (np.empty(count, np.int32) for _ in range(3))
    wants_logits = np.zeros(count, np.bool_)
    at = 0
    for each in work:
        sequence, end = each.sequence, at + each.tokens
        tokens[at:end] = sequence.tokens[sequence.computed : sequence.computed + each.tokens]
        positions[at:end] = np.arange(sequence.computed, sequence.computed + each.tokens)
        sequences[at:end] = _slot(sequence)
        wants_logits[end - 1] = each.last
        at = end
    return Batch(tokens, positions, sequences, wants_logits)


def _promised(task: Task) -> Mapping[int, int] | None:
    """What `Usage.promised_tokens` says of a request."""
    if not task.labels.promises:
        return None
    return task.labels.by_ttl(sum(task.cached_tokens.values()), len(task.prompt))


def _slot(sequence: Sequence) -> int:
    if sequence.slot is None:
        raise RuntimeError(f"a sequence of request {sequence.task.request_id} was planned without a slot")
    return sequence.slot
