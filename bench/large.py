"""A simulated run of many seeds: seconds, calls and memory of each stage, its growth with the size, and resuming it.

    python bench/large.py --folder DIR [--seeds 52000] [--calls 500000]
    python bench/large.py --folder DIR --store 10000000

The first form makes two runs, one of an eighth of the seeds, with as many rounds as --calls needs. Real: all stages,
files, near-duplicate checks, the pocket tokenizer, the client, HTTP, the store and its writer. The teacher, which also
judges, is a server on loopback in a process of its own that answers at once. The student is a stand-in that writes a
sentence for each row; nothing is trained or exported. Each run is killed (SIGKILL) in the middle of its last judge
stage, resumed to its end, and started once more when it is finished. The tables have each step's rows, calls, seconds,
and the largest resident memory of the process during the step; the ratio is the seconds of the large run by those of
the small one, 8.0 if the step is linear. The step that was killed has the seconds of the resumed part.

The second form fills a store with that many calls (2.4 KB each; see bench/store.py), and measures how long it takes
to open it, to read and compare a sample of its calls, and to search it. A filled store is used again.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from overlap import serve_completions
from store import TEXT, URL, answer, fill, prose, request

from tapir_local.export.gate import Figures, GateReport
from tapir_local.files import link_or_copy, read_rows, write_json, write_record, write_rows, write_text
from tapir_local.method import prompts
from tapir_local.pipeline.loop import Step, Watch, distill
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.tasks import TASKS
from tapir_local.recipe.text import parse_recipe
from tapir_local.records import Completion, Example, noop
from tapir_local.resources import POCKET_STUDENT
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import real_backends
from tapir_local.stages.context import Backends, nothing
from tapir_local.stages.row_check import read_student_format
from tapir_local.store import keys
from tapir_local.store.queries import measure_store
from tapir_local.store.search import search_calls
from tapir_local.store.store import Store
from tapir_local.training.classifier import Prediction

SMALLER = 8  # times fewer seeds in the small run
IN_FLIGHT = 64
LEAST_SEEDS = 800  # an eighth of them leaves one row for the holdout
LEAST_SECONDS = 0.2  # of a step of the small run whose ratio is printed: a shorter one is mostly fixed costs
SAMPLE = 10_000  # calls of a store that are read and compared
COMMON = ("apple", "bear")  # words that most calls have, because they are made of 179 words
PASSED = GateReport((), 600, 0, (), 0, 0, Figures(1e-4, 0.5, 0.01, 1.0, 100), 1e-2, 0.9)
STUDENT_WORDS = "I believe that it is so"  # how the stand-in begins each answer, by which the teacher knows it
RECIPE = """
name: large
rounds: {rounds}
seeds: {{path: {seeds}, holdout: {holdout}}}
student: {{path: pocket}}
teacher: {{base_url: {url}, model: m, alias: large, concurrency: {in_flight}, send_seed: true}}
curriculum: {{rows: {rows}, first_rows: {rows}, alpha: 0.6}}
classifier: {{labelled: {labelled}}}
limits: {{unusable: 0.2}}
"""

Found = dict[str, dict[str, Any]]  # what each step took, by its name


def main() -> None:
    """Make both runs, or measure a store."""
    asked = arguments()
    if asked.serve:
        asyncio.run(serve())
    elif asked.work:
        work(asked)
    elif asked.store:
        measure_large_store(asked.folder, asked.store)
    else:
        measure_runs(asked)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the runs or the store; the runs need an empty one")
    parser.add_argument("--seeds", type=int, default=52_000)
    parser.add_argument("--calls", type=int, default=500_000, help="about as many calls in the large run")
    parser.add_argument(
        "--store", type=int, default=0, metavar="CALLS", help="measure a store of so many calls instead"
    )
    for name in ("--serve", "--work", "--url", "--cut"):
        parser.add_argument(name, help=argparse.SUPPRESS, default="", nargs="?", const="yes")
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if not (asked.folder or asked.serve):
        parser.error("--folder is required")
    return asked


# Both runs


def measure_runs(asked: argparse.Namespace) -> None:
    """Make the small and the large run; print their tables."""
    if asked.seeds < LEAST_SEEDS:
        raise SystemExit(f"error: --seeds {asked.seeds}: name at least {LEAST_SEEDS}")
    rounds = max(1, round((asked.calls - asked.seeds) / (2.3 * asked.seeds)))
    print(f"{asked.seeds:,} seeds, {rounds} rounds, {IN_FLIGHT} requests in flight; {os.cpu_count()} processors")
    small = measure_run(asked.folder / "small", asked.seeds // SMALLER, rounds)
    large = measure_run(asked.folder / "large", asked.seeds, rounds)
    print("\n| step | rows | calls | from the store | seconds | calls/s | peak MB | seconds / those of 1/8 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, step in large.items():
        print(table_line(name, step, small.get(name)), flush=True)


def table_line(name: str, step: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """A line of the table of steps."""
    calls, seconds = step["paid"] + step["hits"], step["seconds"]
    ratio = f"{seconds / before['seconds']:.1f}" if before and before["seconds"] >= LEAST_SECONDS else ""
    rate = f"{calls / seconds:,.0f}" if calls else ""
    counts = (f"{step['rows']:,}", f"{step['paid']:,}", f"{step['hits']:,}")
    return f"| {' | '.join((name, *counts, f'{seconds:.2f}', rate, str(step['peak_mb']), ratio))} |"


def measure_run(folder: Path, seeds: int, rounds: int) -> Found:
    """What each step of a run took, in a run that is killed once; prints its totals and those of resuming it."""
    if folder.exists():
        raise SystemExit(f"error: {folder} exists; name another --folder")
    folder.mkdir(parents=True)
    write_text(folder / "seeds.json", json.dumps([{"instruction": ask_about(n)} for n in range(seeds)]))
    cut = f"round-{rounds:02d}/judge"
    with serving() as (url, close):
        words = ["--folder", str(folder), "--seeds", str(seeds), "--rounds", str(rounds), "--url", url]
        first, killed = start(words, ["--cut", cut])
        rest, ended = start(words, [])
        assert (killed, ended) == (-signal.SIGKILL, 0), f"exit codes {killed} and {ended}"
        began = time.perf_counter()
        again, _ = start(words, [])
        resumed, requests = time.perf_counter() - began, close()
    found = {name: step for name, step in {**first, **rest}.items() if name != "end"}
    peak = max(step["peak_mb"] for step in (*first.values(), *rest.values()))
    calls, size = measure_store(folder / "teacher.db")
    print(
        f"\n{seeds:,} seeds: {calls:,} calls in the store, {size / 1e6:,.0f} MB; {requests:,} requests at the teacher; "
        f"{sum(step['seconds'] for step in found.values()):,.1f} s in all steps; largest resident memory {peak:,} MB\n"
        f"{seeds:,} seeds, killed in the middle of {cut}: the resumed stage took {rest[cut]['seconds']:.1f} s, "
        f"{rest[cut]['paid']:,} calls and {rest[cut]['hits']:,} from the store; {requests - calls:,} paid for again\n"
        f"{seeds:,} seeds, the finished run started again: {resumed:.1f} s with the start of Python, "
        f"{again['end']['paid']} calls, {again['end']['peak_mb']:,} MB",
        flush=True,
    )
    return found


def start(words: Sequence[str], more: Sequence[str]) -> tuple[Found, int]:
    """Work on a run in a process of its own: (what each step took, its exit code)."""
    command = [sys.executable, __file__, "--work", *words, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        lines = [json.loads(line) for line in child.stdout]
    return {line.pop("step"): line for line in lines}, child.returncode


# A run, in a process of its own


def work(asked: argparse.Namespace) -> None:
    """Start or resume the run; print a line of JSON at the end of each step and at the end of the run."""
    recipe = make_recipe(asked)
    run, began = RunDir(asked.folder, recipe.name), time.perf_counter()
    tell = StepLines(asked.cut)
    with real_backends(recipe, run, noop) as real:
        distill(recipe, run, stand_in_student(real), Watch(tell.begins, tell.progress, tell.ends))
    tell.print_line("end", seconds=time.perf_counter() - began, rows=0, paid=tell.paid, hits=0)


def make_recipe(asked: argparse.Namespace) -> Recipe:
    """A recipe whose numbers of rows grow with the seeds."""
    os.environ["OPENAI_API_KEY"] = "none"
    seeds = asked.seeds
    path, shares = json.dumps(str(asked.folder / "seeds.json")), {"holdout": 100, "rows": 5, "labelled": 26}
    counts = {name: seeds // share for name, share in shares.items()}
    text = RECIPE.format(rounds=asked.rounds, seeds=path, url=asked.url, in_flight=IN_FLIGHT, **counts)
    return parse_recipe(text, "large")


class StepLines:
    """Prints what each step took; kills the process in the middle of the step `cut`."""

    def __init__(self, cut: str) -> None:
        self.cut, self.step, self.began, self.paid = cut, "", 0.0, 0

    def begins(self, step: Step) -> None:
        self.step, self.began = step.name, time.perf_counter()
        reset_peak()

    def progress(self, done: int, total: int, said: str) -> None:
        if self.step == self.cut and total and 2 * done >= total:
            self.print_line("end", seconds=0.0, rows=0, paid=self.paid, hits=0)
            os.kill(os.getpid(), signal.SIGKILL)

    def ends(self, step: Step, taken: Mapping[str, Any]) -> None:
        self.paid += taken["paid"]
        rows = taken["output"].get("rows", 0)
        seconds = time.perf_counter() - self.began
        self.print_line(step.name, seconds=seconds, rows=rows, paid=taken["paid"], hits=taken["hits"])

    def print_line(self, name: str, **found: Any) -> None:
        print(json.dumps({"step": name, **found, "peak_mb": peak_megabytes()}), flush=True)


def reset_peak() -> None:
    """Measure the largest resident memory from now on; where that is not allowed, it is that since the start."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> int:
    """The largest resident memory of this process since `reset_peak`, in MB; by getrusage where there is no /proc."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 // 1_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000


def stand_in_student(real: Backends) -> Backends:
    """The real teacher, judge and store, with a student that is not trained; its tokenizer is the pocket student's."""
    known = replace(read_student_format(POCKET_STUDENT, 4096), length=4096)
    return replace(
        real,
        generate=generate,
        classify=classify,
        train=train,
        export=lambda adapter, out, progress: write_text(out, (adapter / "round").read_text()),
        export_untrained=lambda out, progress: write_text(out, "untrained"),
        gate=lambda adapter, gguf, rows, out, progress: write_record(out, PASSED),
        ship=ship,
        student_format=lambda: known,
        begin=nothing,
        check=None,
    )


def generate(
    *, gguf: Path, ids: Sequence[str], on_result: Callable[[Completion], None], **rest: Any
) -> list[Completion]:
    """A sentence for each row, another in each round."""
    trained, found = gguf.read_text(), list[Completion]()
    for id in ids:
        found.append(Completion(id, f"{STUDENT_WORDS}: {sentence(f'{trained} {id}')}", "stop", 20))
        on_result(found[-1])
    return found


def classify(*, labelled: Path, rows: Path, seed: int, out: Path, **rest: Any) -> None:
    """A task by chance for each row that has none."""
    out.mkdir()
    known, labels = {row.id for row in read_rows(Example, labelled)}, list(TASKS)
    chance = random.Random(seed)
    left = (row.id for row in read_rows(Example, rows) if row.id not in known)
    write_rows(out / "predictions.jsonl", (Prediction(id, chance.choice(labels), 0.99) for id in left))
    write_json(out / "agreement.json", {"agreement": 0.9, "rows": 100})


def train(*, out: Path, **rest: Any) -> None:
    """An adapter that holds only the name of its round."""
    out.mkdir()
    (out / "round").write_text(out.parent.name)


def ship(*, student: Path, out: Path, **rest: Any) -> None:
    """The files of a model/ that the card is made of."""
    for name in ("student.gguf", "gate.json"):
        link_or_copy(student / name, out / name)
    (out / "Modelfile").write_text("FROM ./student.gguf\n")


def sentence(name: str) -> str:
    """One of 20,000 sentences, always the same for a name."""
    return TEXT[zlib.crc32(name.encode()) % len(TEXT)]


def ask_about(name: object) -> str:
    """An instruction of 80 to 260 characters."""
    return f"Explain why {prose(random.Random(f'seed {name}'), 1, 4).lower()} Is it so?"


# The teacher, in a process of its own


@contextmanager
def serving() -> Iterator[tuple[str, Callable[[], int]]]:
    """The URL of the teacher, and a function that ends it and returns the number of requests."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin
        assert server.stdout

        def close() -> int:
            return int(server.communicate()[0])

        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1", close


async def serve() -> None:
    """Answer until stdin closes; then print the number of requests."""
    from aiohttp import web

    count = 0

    async def reply(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        raw = await request.read()
        return web.json_response(completion(reply_text(json.loads(raw)["messages"], zlib.crc32(raw))))

    await serve_completions(reply)
    print(count, flush=True)


def reply_text(messages: Sequence[Mapping[str, str]], number: int) -> str:
    """What the teacher says; `number` is a hash of the request."""
    system, text = messages[0]["content"], messages[-1]["content"]
    if system == prompts.CLASSIFY:
        return json.dumps({"task": list(TASKS)[number % len(TASKS)]})
    if system == prompts.JUDGE:
        first, _, second = text.partition("</answer_1>")
        return json.dumps({f"answer_{n}": score(part) for n, part in enumerate((first, second), 1)})
    if system == prompts.EXPAND:
        return f"<new_instruction>{ask_about(number)}</new_instruction>"
    return prose(random.Random(number), 2, 6)


def score(part: str) -> int:
    """3 to 9 for the student's answer, by its text; 9 for the teacher's."""
    _, found, own = part.partition(STUDENT_WORDS)
    return 3 + zlib.crc32(own.partition("\n")[0].encode()) % 7 if found else 9


def completion(text: str) -> dict[str, Any]:
    """A reply as an OpenAI endpoint sends it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    tokens = len(text) // 4
    usage = {"prompt_tokens": 200, "completion_tokens": tokens, "total_tokens": 200 + tokens}
    return {"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


# A large store


def measure_large_store(folder: Path, calls: int) -> None:
    """Fill a store unless it is filled; time opening it, reading a sample of it, and searching it."""
    folder.mkdir(parents=True, exist_ok=True)
    fill("tapir-local", folder, calls)
    path = folder / "tapir-local" / "teacher.db"
    print("| what | seconds | peak MB |\n|---|---|---|")
    print(store_line("opened and closed", lambda: Store(path).close()))
    print(store_line(f"{SAMPLE:,} calls at random read and compared", lambda: compare_sample(path, calls)))
    one = (f"{calls // 2}",)  # the number of a row, with which its prompt begins
    print(store_line("the first search, which makes the index", lambda: search_calls(path, one)), flush=True)
    print(store_line("a search for a number that one call has", lambda: search_calls(path, one)), flush=True)
    print(store_line("a search for two words that most calls have", lambda: search_calls(path, COMMON)))
    size = sum(file.stat().st_size for file in path.parent.iterdir() if ".search" in file.name)
    print(f"\n{calls:,} calls, {measure_store(path)[1] / 1e6:,.0f} MB, with {size / 1e6:,.0f} MB of index")


def store_line(name: str, act: Callable[[], object]) -> str:
    """A line of the table: the seconds of `act`, and the largest resident memory meanwhile."""
    reset_peak()
    began = time.perf_counter()
    act()
    return f"| {name} | {time.perf_counter() - began:.3f} | {peak_megabytes():,} |"


def compare_sample(path: Path, calls: int) -> None:
    """Read SAMPLE calls by their requests; stop if one is not what was stored."""
    chance = random.Random(1)
    rows = [chance.randrange(calls) for _ in range(SAMPLE)]
    asked = {keys.request_key(URL, request(row)): row for row in rows}
    with Store(path, "read-only") as store:
        found = store.get_many(list(asked))
    wrong = [row for key, row in asked.items() if found.get(key) != answer(row)]
    if wrong:
        raise SystemExit(f"error: {len(wrong)} of {len(asked)} calls are not what was stored; row {wrong[0]}")


if __name__ == "__main__":
    main()
