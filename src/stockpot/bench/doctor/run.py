"""How well the doctor names causes, beside other tools on the same conversations; and how fast it is."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stockpot.bench.charts import Bars, Chart
from stockpot.bench.doctor.breaking import BREAKS
from stockpot.bench.doctor.corpus import Corpus, write_corpus
from stockpot.bench.doctor.million import MillionRun, run_doctor, write_requests
from stockpot.bench.doctor.peers import Peer, peers
from stockpot.bench.machine import measure_idleness
from stockpot.bench.progress import BenchProgress, silent
from stockpot.bench.results import Cell, Result, Table, Verdict
from stockpot.doctor.doctor import examine
from stockpot.doctor.finding import Checked
from stockpot.doctor.readers.files import ReadCounts, read_files
from stockpot.errors import BuildFailed
from stockpot.recall.evidence.bounds import clopper_pearson

# Floors of the project.
_RIGHT_SHARE = 0.95
_SECONDS = 60.0
_GROWTH = 1.1


@dataclass(frozen=True, slots=True)
class DoctorPlan:
    """`each` conversations for each cause, `healthy` that are not broken; `requests` of the run for speed
    (0: none)."""

    each: int = 14
    healthy: int = 110
    seed: int = 2026
    requests: int = 1_000_000
    with_peers: bool = True

    @classmethod
    def quick(cls) -> DoctorPlan:
        """Enough to see that everything works."""
        return cls(each=2, healthy=8, requests=5_000, with_peers=False)


@dataclass(frozen=True, slots=True)
class Named:
    """What was said of the conversations of one set: by cause, how many there are, of how many a break was
    seen, its cause named, and the place too; and of healthy ones with a false alarm."""

    total: Counter[str]
    detected: Counter[str]
    right: Counter[str]
    placed: Counter[str]
    false_alarms: int
    healthy: int

    def share(self) -> float:
        return self.right.total() / self.total.total() if self.total else 0.0


def measure_doctor(plan: DoctorPlan, *, cache_dir: Path, progress: BenchProgress = silent) -> Result:
    """Two sets of programs, one of which nobody looked at while the doctor was written."""
    idleness = measure_idleness()
    sets: dict[str, Named] = {}
    others: dict[str, Named | str] = {}
    with tempfile.TemporaryDirectory(prefix="stockpot-bench-") as name:
        for title, held_out in (("known programs", False), ("other programs", True)):
            folder = Path(name) / title.replace(" ", "-")
            corpus = write_corpus(
                folder, seed=plan.seed, each=plan.each, healthy_count=plan.healthy, held_out=held_out
            )
            sets[title] = examined(corpus)
            progress(title, 1, 1)
        if plan.with_peers:
            for peer in peers():
                others[peer.name] = _of_peer(peer, corpus, cache_dir, progress)
        million = _million(plan, Path(name), progress)
    return Result(
        name="doctor",
        parameters=asdict(plan),
        tables=(_by_cause(sets), _beside(sets["other programs"], others), *_speed(million)),
        figures={
            "sets": {title: _figures(named) for title, named in sets.items()},
            "peers": {n: each if isinstance(each, str) else _figures(each) for n, each in others.items()},
            "million": None if million is None else asdict(million),
        },
        idleness=idleness,
        verdicts=_verdicts(sets, million),
        notes=_notes(),
        chart=_chart(sets["other programs"], others),
    )


def examined(corpus: Corpus) -> Named:
    """By the files, as a user has them; the cause of most lost tokens is the one that is named."""
    lost: defaultdict[str, Counter[str]] = defaultdict(Counter)
    paths: defaultdict[str, set[str]] = defaultdict(set)

    def told(checked: Checked) -> None:
        finding = checked.finding
        if finding is not None:
            name = corpus.owners[finding.pair.later.file, finding.pair.later.line]
            lost[name][finding.cause] += finding.tokens_lost
            paths[name].add(finding.place.path)

    counts = ReadCounts()
    examine(read_files(corpus.files, counts), counts=counts, told=told)
    named = _empty()
    alarms = healthy = 0
    for name, label in corpus.labels.items():
        if not label.cause:
            healthy += 1
            alarms += bool(lost[name])
            continue
        named[0][label.cause] += 1
        named[1][label.cause] += bool(lost[name])
        right = bool(lost[name]) and lost[name].most_common(1)[0][0] == label.cause
        named[2][label.cause] += right
        named[3][label.cause] += right and _is_place(label.path, paths[name])
    return Named(*named, alarms, healthy)


def _is_place(label: str, found: set[str]) -> bool:
    """Whether the place is in the part of the request that was broken: APIs name it differently."""
    if not label:
        return True
    part = label.partition("[")[0].partition(".")[0]
    parts = {"messages": ("messages", "system", "instructions", "input")}.get(part, (part,))
    return any(path.startswith(parts) for path in found)


def _of_peer(peer: Peer, corpus: Corpus, cache_dir: Path, progress: BenchProgress) -> Named | str:
    try:
        said = peer.named(corpus.conversations, cache_dir, progress)
    except BuildFailed as error:
        return str(error)
    named = _empty()
    alarms = healthy = 0
    for name, label in corpus.labels.items():
        if not label.cause:
            healthy += 1
            alarms += peer.detected(said[name])
            continue
        named[0][label.cause] += 1
        named[1][label.cause] += peer.detected(said[name])
        named[2][label.cause] += peer.right(said[name], label.cause)
    return Named(*named, alarms, healthy)


def _empty() -> tuple[Counter[str], Counter[str], Counter[str], Counter[str]]:
    return Counter(), Counter(), Counter(), Counter()


def _million(plan: DoctorPlan, folder: Path, progress: BenchProgress) -> MillionRun | None:
    if not plan.requests:
        return None
    path = folder / "requests.jsonl"
    write_requests(path, plan.requests, progress)
    try:
        return run_doctor(path, plan.requests, progress)
    finally:
        path.unlink()


def _by_cause(sets: Mapping[str, Named]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for cause in (*BREAKS, "all"):
        cells: list[Cell] = [cause.replace("_", " ")]
        for named in sets.values():
            counts = [
                each.total() if cause == "all" else each[cause]
                for each in (named.total, named.right, named.placed)
            ]
            cells += counts
        rows.append(tuple(cells))
    heads = [f"{title}: {what}" for title in sets for what in ("conversations", "cause right", "and place")]
    return Table("Causes named", ("cause", *heads), tuple(rows))


def _beside(ours: Named, others: Mapping[str, Named | str]) -> Table:
    rows: list[tuple[Cell, ...]] = [_row("stockpot doctor", ours)]
    for name, named in others.items():
        rows.append((name, *(None,) * 5) if isinstance(named, str) else _row(name, named))
    columns = ("tool", "broken", "break seen", "cause right", "right %", "false alarms of healthy")
    return Table("The other programs' conversations, beside other tools", columns, tuple(rows))


def _row(name: str, named: Named) -> tuple[Cell, ...]:
    alarms = f"{named.false_alarms} of {named.healthy}"
    total = named.total.total()
    return name, total, named.detected.total(), named.right.total(), 100 * named.share(), alarms


def _speed(million: MillionRun | None) -> Sequence[Table]:
    if million is None:
        return ()
    columns = (
        "requests",
        "file GiB",
        "seconds",
        "requests/s",
        "peak MiB",
        "third quarter MiB",
        "last quarter MiB",
    )
    row: tuple[Cell, ...] = (
        million.requests,
        million.file_bytes / 2**30,
        million.seconds,
        million.requests / million.seconds,
        million.peak_mib,
        million.half_mib,
        million.end_mib,
    )
    return (Table("One file, one process", columns, (row,)),)


def _verdicts(sets: Mapping[str, Named], million: MillionRun | None) -> tuple[Verdict, ...]:
    verdicts: list[Verdict] = []
    for title, named in sets.items():
        verdicts.append(
            Verdict(f"{title}: causes not named right, share", 1 - named.share(), 1 - _RIGHT_SHARE)
        )
        verdicts.append(Verdict(f"{title}: false alarms", named.false_alarms, 0))
    if million is not None:
        limit = _SECONDS * million.requests / 1_000_000
        verdicts.append(
            Verdict(f"seconds for {million.requests:,} requests", million.seconds, max(limit, 5.0))
        )
        verdicts.append(
            Verdict("memory, last quarter over third", million.end_mib / million.half_mib, _GROWTH)
        )
    return tuple(verdicts)


def _figures(named: Named) -> dict[str, object]:
    total, right = named.total.total(), named.right.total()
    lower, upper = clopper_pearson(total - right, total, 0.95)
    return {
        "total": dict(named.total),
        "detected": dict(named.detected),
        "right": dict(named.right),
        "placed": dict(named.placed),
        "false_alarms": named.false_alarms,
        "healthy": named.healthy,
        "wrong_share_bounds_95": [lower, upper],
    }


def _notes() -> tuple[str, ...]:
    return (
        "The corpus is made by this package (bench/doctor): written from the providers' documentation, by the"
        " same people as the doctor. Its first programs were used to mend the doctor, the others were not.",
        "Ours reads the files with all conversations interleaved. The other tools are given each conversation"
        " by itself, in OpenAI's chat shape where they read no other; what they say is mapped generously.",
        "kvlint counts with a tokenizer of bytes here (it fetches one from a hub, else). pcdlint 0.3.0 is"
        " left out: it reads Python source, not requests.",
    )


def _chart(ours: Named, others: Mapping[str, Named | str]) -> Chart:
    known = {"stockpot": ours, **{n: each for n, each in others.items() if not isinstance(each, str)}}
    total = ours.total.total() or 1
    return Chart(
        (
            Bars(
                "Conversations broken on purpose",
                "",
                "% of them",
                list(known),
                {
                    "break seen": [100 * each.detected.total() / total for each in known.values()],
                    "cause right": [100 * each.right.total() / total for each in known.values()],
                },
            ),
        )
    )
