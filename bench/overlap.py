"""Seconds that a round's answers and judgements take, with the judge asked in turn and asked while the student answers.

    python bench/overlap.py [--replies 0.2 3] [--rows 480 160] [--share 1] [--repeat 1]
    python bench/overlap.py --pocket

For each time of a reply, with as many rows: the judge is a server on loopback, a process of its own that answers any
number of requests at once, 16 of which are sent. The student is a stand-in that waits: it writes answers at an even
rate, in `share` times the seconds that the judge needs for them, as a student on a GPU would that leaves the processor
free. `--pocket` uses the pocket student with llama.cpp on the processor instead. Both ways take turns, each with a new
store, and go through the functions of a run. The output has the seconds of both, their ratio and the least possible one
(the longer of the two parts by both), how many requests the server got, and whether the files are the same bytes.
"""

import argparse
import asyncio
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tapir_local.export.base import base_gguf
from tapir_local.files import link_or_copy, read_rows, write_text
from tapir_local.recipe.schema import Recipe
from tapir_local.recipe.text import override, parse_recipe
from tapir_local.records import Completion, Example, Message, noop
from tapir_local.run_dir import RunDir
from tapir_local.stages.backends import real_backends
from tapir_local.stages.context import Work
from tapir_local.stages.judge import write_judgements
from tapir_local.stages.rounds import generate_answers

IN_FLIGHT = 16
WAYS = {"in turn": False, "ahead": True}
FILES = ("round-01/answers.jsonl", "round-01/judgements.jsonl", "tapir.lock")


@dataclass(frozen=True)
class Part:
    """What a way took: seconds of the student's answers and of the judge's stage after them, and the files' bytes."""

    answers: float
    judge: float
    files: tuple[bytes, ...]
    requests: int
    twice: int

    @property
    def seconds(self) -> float:
        return self.answers + self.judge


def main() -> None:
    """Measure both ways with each time of a reply."""
    asked = arguments()
    if asked.serve is not None:
        asyncio.run(serve(asked.serve))
        return
    student = "pocket student, llama.cpp on the processor" if asked.pocket else "student that waits"
    print(f"{student}; {IN_FLIGHT} requests in flight; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    os.environ["OPENAI_API_KEY"] = "none"
    for seconds, rows in zip(asked.replies, asked.rows, strict=True):
        found: dict[str, list[Part]] = {way: [] for way in WAYS}
        for number in range(-1, asked.repeat):  # a first pair with few rows loads the libraries
            for way, ahead in WAYS.items():
                measured = measure(asked, seconds, rows if number >= 0 else 4, ahead)
                if number >= 0:
                    found[way].append(measured)
        tell(seconds, rows, found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=float, nargs="+", default=[0.2, 3.0], metavar="SECONDS")
    parser.add_argument("--rows", type=int, nargs="+", default=[480, 160])
    parser.add_argument("--share", type=float, default=1.0, help="seconds of the student per second of the judge")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--pocket", action="store_true", help="the pocket student instead of one that waits")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def tell(seconds: float, rows: int, found: dict[str, list[Part]]) -> None:
    """Print a line for each way, and their ratio."""
    medians = {way: statistics.median(part.seconds for part in parts) for way, parts in found.items()}
    for way, parts in found.items():
        part = sorted(parts, key=lambda part: part.seconds)[len(parts) // 2]
        print(
            f"{seconds:g} s a reply, {rows} rows, {way:7}  {part.seconds:6.2f} s = answers {part.answers:.2f} + "
            f"judge {part.judge:.2f}; {part.requests} requests, {part.twice} sent twice",
            flush=True,
        )
    first, second = found["in turn"][0], found["ahead"][0]
    least = max(first.answers, first.judge) / first.seconds
    same = len({part.files for parts in found.values() for part in parts}) == 1
    print(
        f"{seconds:g} s a reply: ratio {medians['ahead'] / medians['in turn']:.3f} (least possible {least:.3f}), "
        f"files {'the same' if same else 'DIFFERENT'}, requests {second.requests} of {first.requests}\n",
        flush=True,
    )


# The two ways


def measure(asked: argparse.Namespace, seconds: float, rows: int, ahead: bool) -> Part:
    """Answer and judge some rows in one way, with a server and a store of its own."""
    with tempfile.TemporaryDirectory() as folder, serving(seconds) as (url, close):
        recipe, run = make_recipe(url, ahead), RunDir(Path(folder), "bench")
        examples = [
            Example(f"row-{n:05}", (Message("user", f"Tell me about the number {n}."),), f"It is {n}.", "Math")
            for n in range(rows)
        ]
        with real_backends(recipe, run, noop) as real:
            if asked.pocket:
                run.round(0).mkdir(parents=True)
                link_or_copy(base_gguf(recipe, run, noop), run.round(0) / "student.gguf")
                backends = real
            else:
                write_text(run.round(0) / "student.gguf", "a stand-in")
                backends = replace(real, generate=waiting_student(asked.share * 2 * seconds / IN_FLIGHT))
            times = answer_and_judge(Work(recipe, run, backends, 1), examples)
        files = tuple((run.path / name).read_bytes() for name in FILES)
        return Part(*times, files, **close())


def make_recipe(url: str, ahead: bool) -> Recipe:
    """The pocket student with a judge behind a server; its alias gives calls the same keys on every port."""
    recipe = parse_recipe("student: {path: pocket, max_tokens: 64}\nseeds: pocket\nteacher: {model: m}", "bench")
    judge = {"model": "m", "base_url": url, "alias": "bench", "concurrency": IN_FLIGHT, "ahead": ahead}
    return override(recipe, {f"judge.{name}": value for name, value in judge.items()})


def answer_and_judge(work: Work, rows: Sequence[Example]) -> tuple[float, float]:
    """The seconds of the two stages."""
    answers, judgements = work.folder / "answers.jsonl", work.folder / "judgements.jsonl"
    answers.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    generate_answers(replace(work, step="round-01/answer"), rows, work.run.round(0), answers, "judge")
    answered = time.perf_counter()
    write_judgements(replace(work, step="round-01/judge"), "judge", rows, read_rows(Completion, answers), judgements)
    return answered - began, time.perf_counter() - answered


def waiting_student(seconds: float) -> Any:
    """A student that writes an answer every so many seconds."""

    def generate(*, ids: Sequence[str], on_result: Callable[[Completion], None], **rest: Any) -> list[Completion]:
        began, found = time.perf_counter(), list[Completion]()
        for number, id in enumerate(ids, 1):
            time.sleep(max(0.0, began + number * seconds - time.perf_counter()))
            found.append(Completion(id, f"I do not know {id}.", "stop", 6))
            on_result(found[-1])
        return found

    return generate


# The server


@contextmanager
def serving(seconds: float) -> Iterator[tuple[str, Callable[[], dict[str, int]]]]:
    """The URL of a server in a process of its own, and a function that ends it and returns what it counted."""
    command = [sys.executable, __file__, "--serve", str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout

        def close() -> dict[str, int]:
            told, _ = server.communicate()
            counted: dict[str, int] = json.loads(told)
            return counted

        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1", close


async def serve(seconds: float) -> None:
    """Score any two answers after so many seconds, until stdin closes; then print the number of requests."""
    from aiohttp import web

    seen = collections.Counter[bytes]()

    async def score(request: web.Request) -> web.Response:
        seen[await request.read()] += 1
        await asyncio.sleep(seconds)
        return web.json_response(COMPLETION)

    await serve_completions(score)
    print(json.dumps({"requests": seen.total(), "twice": sum(count > 1 for count in seen.values())}), flush=True)


async def serve_completions(reply: Callable[[Any], Awaitable[Any]]) -> None:
    """Answer requests for chat completions on loopback with `reply` until stdin is closed; print the port first."""
    from aiohttp import web

    app = web.Application()
    app.router.add_post("/v1/chat/completions", reply)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


COMPLETION = {
    "object": "chat.completion",
    "model": "m",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": '{"answer_1": 7, "answer_2": 5}'},
            "finish_reason": "stop",
        }
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
}


if __name__ == "__main__":
    main()
