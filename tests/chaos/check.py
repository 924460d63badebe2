"""What ledger, executions, faults and store say together: the figures of a run, and what is wrong. Pure.

The bound on extra executions: an input runs once more only because its execution was interrupted, or because a worker
that had it (perhaps not even begun) could not keep its lease. So for each execution more than its kind has, there must
have been a fault of its own while the call was under way, that hit the container of the execution before it, or the
worker or the server of one of the two. One fault explains one more execution of each input that was under way there,
and none of any other.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mesh.protocol import State
from tests.chaos.kinds import CAPS, KINDS
from tests.chaos.ledger import Book, Call, Execution, Seat
from tests.chaos.nemesis import Hit
from tests.chaos.plan import Fault
from tests.chaos.store import Contents, Ended

CALLS, FAULTS, OF_EACH, TIME = 20_000, 100, 5, 600.0  # a run of ten minutes has at least so many; others their share
LONGEST_STALL = 60.0  # seconds in which something is under way and nothing ends; above, it hangs

_NOT_INTERRUPTING = (Fault.CONTAINER_STOP, Fault.CLIENT_KILL, Fault.CUT)  # leases are renewed meanwhile, or right after


@dataclass(slots=True)
class Report:
    """What the run came to. `wrong`: what must not be; each with the call it is about, if it is about one."""

    accepted: int = 0
    submitted: int = 0
    unsure: int = 0
    refused: int = 0
    interrupted: int = 0
    states: Counter[str] = field(default_factory=Counter[str])
    lost: int = 0
    doubled: int = 0
    executions: int = 0
    extra: Counter[str] = field(default_factory=Counter[str])
    unexplained: int = 0
    most_at_once: dict[str, int] = field(default_factory=dict[str, int])
    longest_stall: float = 0.0
    faults: Counter[str] = field(default_factory=Counter[str])
    wrong: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def check(book: Book, hits: list[Hit], before: Contents, after: Contents) -> Report:
    """Everything but whether the run was wild enough."""
    report = Report(interrupted=book.interrupted)
    calls = list(book.calls.values())
    report.submitted, report.accepted = len(calls), len(book.accepted)
    report.unsure = sum(call.unsure for call in calls)
    report.refused = sum(bool(call.refused) for call in calls)
    report.faults = Counter({fault.value: 0 for fault in Fault} | Counter(hit.fault.value for hit in hits))
    report.wrong += [("", f"an error that nothing explains: {line}") for line in book.broken]
    owners = _owners(book, report)
    _check_endings(calls, owners, after, report)
    _check_dead(after, report)
    _check_executions(owners, book.executions, hits, report)
    _check_caps(book.seats, report)
    _check_leftovers(before, after, report)
    report.longest_stall = longest_stall(calls, after.results)
    if report.longest_stall > LONGEST_STALL:
        report.wrong.append(("", f"for {report.longest_stall:.1f} s nothing ended, while calls were under way"))
    return report


def _owners(book: Book, report: Report) -> dict[str, Call]:
    """Every id with its call. Ids that no client learned are those their executions were written down with."""
    owners = {call: known for known in book.calls.values() for call in known.ids}
    for id, executions in book.executions.items():
        call = book.calls.get(executions[0].nonce)
        if call is None:
            report.wrong.append((id, "ran, and nobody submitted it"))
        elif call.refused:
            report.wrong.append((id, f"ran, although its submission was refused: {call.refused}"))
        else:
            call.ids.add(id)
            owners[id] = call
    for call in book.calls.values():
        if len(call.ids) > 1:
            report.doubled += 1
            report.wrong += [(id, f"one of {len(call.ids)} calls that one submission became") for id in call.ids]
    return owners


def _check_endings(calls: list[Call], owners: Mapping[str, Call], after: Contents, report: Report) -> None:
    for id, call in owners.items():
        ended = after.results.get(id)
        expected = KINDS[call.kind].expected(call.n)
        if ended is None:
            if call.accepted or not call.unsure:
                report.lost += 1
                report.wrong.append((id, "lost: it was accepted, or ran, and has no result"))
        elif ended.value != expected and not (ended.state is State.CANCELLED and _may_be_cancelled(call)):
            report.wrong.append((id, f"ended {ended.state} with {ended.value}, not with {expected}"))
        if ended is not None and call.given is not None and call.given != ended.value:
            report.doubled += 1
            report.wrong.append((id, f"its client got {call.given}, and {ended.value} is stored"))
    report.states.update(ended.state.value for ended in after.results.values())
    nameless = [id for id in after.results if id not in owners]
    # A `remote` that never ran is known by no id, neither to its client nor to a function; it can only be cancelled.
    unknown = sum(call.how == "remote" and not call.ids and call.given is None for call in calls)
    for id in nameless:
        if after.results[id].state is not State.CANCELLED or len(nameless) > unknown:
            report.wrong.append((id, f"ended {after.results[id].state}, and nobody submitted it"))
    if after.stored != len(after.results):
        report.doubled += after.stored - len(after.results)
        report.wrong.append(("", f"{after.stored} results are stored for {len(after.results)} calls"))


def _may_be_cancelled(call: Call) -> bool:
    """Where its client cancelled it, or no longer waited for it in `remote`: it was killed, or had no answer."""
    return KINDS[call.kind].cancelled or (call.how == "remote" and call.given is None)


def _check_dead(after: Contents, report: Report) -> None:
    """Dead letters are exactly the calls that failed for good, one of each."""
    failed = {id for id, ended in after.results.items() if ended.state in (State.FAILED, State.TIMED_OUT)}
    report.wrong += [(id, "failed, and left no dead letter") for id in failed - set(after.dead)]
    report.wrong += [(id, "left a dead letter, and has not failed") for id in set(after.dead) - failed]
    report.wrong += [(id, f"left {count} dead letters") for id, count in after.dead.items() if count > 1]


def _check_executions(
    owners: Mapping[str, Call], executions: Mapping[str, list[Execution]], hits: Iterable[Hit], report: Report
) -> None:
    interrupting = [hit for hit in hits if hit.fault not in _NOT_INTERRUPTING]
    interrupting.sort(key=lambda hit: (hit.everyone, not hit.containers))  # the nearest explanation first
    for id, unsorted in executions.items():
        runs = sorted(unsorted, key=lambda run: run.at)
        report.executions += len(runs)
        if id not in owners:
            continue
        _check_cancelled(owners[id], runs, interrupting, report)
        extra = len(runs) - KINDS[owners[id].kind].executions
        reasons = explanations(owners[id].tried, runs, interrupting)
        report.extra.update(hit.fault.value for hit in reasons[: max(0, extra)])
        if extra > len(reasons):
            report.unexplained += extra - len(reasons)
            times = ", ".join(f"{run.at:.2f} in {run.container} of {run.worker}" for run in runs)
            report.wrong.append((id, f"ran {len(runs)} times, and only {len(reasons)} were interrupted: {times}"))


def _check_cancelled(call: Call, runs: list[Execution], hits: list[Hit], report: Report) -> None:
    """Once `cancel` has returned, nothing begins any more; but for a worker that did not hear of it."""
    for run in runs:
        if 0 < call.cancelled < run.at and not any(_explains(hit, call.tried, run, run) for hit in hits):
            report.wrong.append((run.call, f"ran {run.at - call.cancelled:.2f} s after `cancel` had returned"))


def explanations(tried: float, runs: list[Execution], hits: Iterable[Hit]) -> list[Hit]:
    """The faults that made an input, submitted at `tried`, run again; each explains one more execution only."""
    found: list[Hit] = []
    for run, again in itertools.pairwise(runs):
        fitting = (hit for hit in hits if hit not in found and _explains(hit, tried, run, again))
        found += itertools.islice(fitting, 1)
    return found


def _explains(hit: Hit, tried: float, run: Execution, again: Execution) -> bool:
    if not (tried <= hit.end and hit.start <= again.at):
        return False
    interrupted = run.container in hit.containers and hit.end >= run.at
    return interrupted or hit.everyone or bool({run.worker, again.worker} & hit.workers)


def _check_caps(seats: Iterable[Seat], report: Report) -> None:
    """Every execution of a capped function found one of as many seats as it may have containers."""
    report.most_at_once = dict.fromkeys(CAPS, 0)
    for seat in seats:
        at_once = CAPS[seat.function] + 1 if seat.number < 0 else seat.number + 1
        report.most_at_once[seat.function] = max(report.most_at_once[seat.function], at_once)
        if seat.number < 0:
            where = f"container {seat.container} of worker {seat.worker}"
            report.wrong.append(("", f"more than {CAPS[seat.function]} ran {seat.function} at {seat.at:.2f}: {where}"))


def _check_leftovers(before: Contents, after: Contents, report: Report) -> None:
    report.wrong += [("", f"left behind: {what}") for what in sorted(after.deployed - before.deployed)]
    report.wrong += [("", f"gone: {what}") for what in sorted(before.deployed - after.deployed)]
    report.wrong += [("", f"should have ended by itself: {what}") for what in after.overdue]
    report.wrong += [(id, "is still queued") for id in after.queued]
    if after.unsettled:
        report.wrong.append(("", f"consumers still know of {after.unsettled} inputs"))


def longest_stall(calls: Iterable[Call], results: Mapping[str, Ended]) -> float:
    """The longest time in seconds in which calls were under way and none ended."""
    changes: dict[float, int] = defaultdict(int)
    for call in calls:
        ended = next((results[id] for id in call.ids if id in results), None)
        if ended is not None:
            changes[min(call.tried, ended.at)] += 1
            changes[ended.at] -= 1
    longest = since = 0.0
    under_way = 0
    for moment, change in sorted(changes.items()):
        if under_way == 0:
            since = moment
        under_way += change
        if change < 0:
            longest, since = max(longest, moment - since), moment
    return longest


def too_tame(report: Report, seconds: float) -> list[str]:
    """What makes a run of so many seconds say too little: too few calls, or too few faults."""
    share = seconds / TIME
    least = max(1, int(OF_EACH * share))
    few = [
        f"only {count} times {fault}; {least} are the least" for fault, count in report.faults.items() if count < least
    ]
    if sum(report.faults.values()) < FAULTS * share:
        few.append(f"only {sum(report.faults.values())} faults; {FAULTS * share:.0f} are the least")
    if report.accepted < CALLS * share:
        few.append(f"only {report.accepted} calls were accepted; {CALLS * share:.0f} are the least")
    return few
