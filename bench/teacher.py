"""Rows per second of tapir_local.teacher.ask.ask with a server that answers in 200 ms, compared with the plain client.

    python bench/teacher.py [--rows 12800] [--in-flight 64]
    python bench/teacher.py --crowd 60

The ideal is in-flight / 0.2 rows/s. The rival is openai's own client in the same process: asyncio.gather behind a
semaphore, its own retries, nothing stored. With faults, 5 % of the requests get 429, 1 % get 500 and 1 % a dropped
connection, each at once, and 1 % a reply that is cut in the middle, after 200 ms. The server is a process of its own.
`--crowd`: for that many seconds, 8 threads in each of 4 processes ask one store for rows from the same 20,000.
"""

import argparse
import asyncio
import collections
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import openai

from tapir_local.recipe.endpoints import Teacher
from tapir_local.records import Message, Request
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask

LATENCY = 0.2
FAULTS = ((0.05, 429), (0.06, 500), (0.07, "drop"), (0.08, "cut"))  # cumulative shares
REASON = {200: "OK", 429: "Too Many Requests", 500: "Internal Server Error"}


def main() -> None:
    """Measure both, without and with faults."""
    options = arguments()
    if options.serve:
        asyncio.run(serve(options.faulty))
        return
    if options.member:
        print(json.dumps(member(options.member, Path(options.store), options.crowd, options.number)))
        return
    if options.crowd:
        crowd(options.crowd)
        return
    print(f"openai {openai.__version__}, {options.rows:,} rows, {options.in_flight} in flight, {LATENCY} s a reply")
    for faulty in (False, True):
        for name, way in (("tapir-local", ours), ("openai alone", plain)):
            measure(name, way, faulty, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_800)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--crowd", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--member", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--faulty", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(name: str, way: Any, faulty: bool, options: argparse.Namespace) -> None:
    """Measure one way with a server of its own."""
    command = [sys.executable, __file__, "--serve", *(["--faulty"] if faulty else [])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        cpu = time.process_time()
        seconds, answered = way(url, options.rows, options.in_flight)
        cpu = time.process_time() - cpu
        server.stdin.close()
        seen = json.loads(server.stdout.read())
    rate, extra = options.rows / seconds, seen["requests"] - options.rows
    told = (
        f"{rate:6.1f} rows/s  {rate * LATENCY / options.in_flight:6.1%} of ideal  {cpu / options.rows * 1e3:.2f} ms CPU"
    )
    counts = f"answered {answered:,}, twice {seen['twice']}, extra requests {extra}, faults {seen['faults']}"
    print(f"{name:12} {'faults' if faulty else 'clean ':6}  {told} a row  {counts}", flush=True)


def ours(url: str, rows: int, in_flight: int) -> tuple[float, int]:
    """Through the store; each answer is on disk before it counts."""
    teacher = Teacher(base_url=url, model="m", concurrency=in_flight, timeout=30)
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "teacher.db") as store:
        ask(requests(1), teacher, store, run="warm-up")
        began = time.perf_counter()
        answers = ask(requests(rows + 1)[1:], teacher, store, run="bench")
        return time.perf_counter() - began, sum(answer.text == f"re: row {n}" for n, answer in enumerate(answers, 1))


def requests(rows: int) -> list[Request]:
    return [Request((Message("user", f"row {number}"),), str(number), "answers") for number in range(rows)]


def plain(url: str, rows: int, in_flight: int) -> tuple[float, int]:
    """Plain code with openai's client."""

    async def run() -> tuple[float, int]:
        limits = openai.DefaultAsyncHttpxClient(timeout=30)
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=10, http_client=limits) as client:
            turn = asyncio.Semaphore(in_flight)

            async def one(number: int) -> bool:
                async with turn:
                    messages: Any = [{"role": "user", "content": f"row {number}"}]
                    try:
                        reply = await client.chat.completions.create(model="m", messages=messages)
                    except (openai.APIError, ValueError):
                        return False
                    return reply.choices[0].message.content == f"re: row {number}"

            await one(0)
            began = time.perf_counter()
            found = await asyncio.gather(*(one(number) for number in range(1, rows + 1)))
            return time.perf_counter() - began, sum(found)

    return asyncio.run(run())


# A crowd


def crowd(seconds: float) -> None:
    """Results of 32 threads in 4 processes, and what the server saw."""
    command = [sys.executable, __file__]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([*command, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server,
    ):
        assert server.stdin
        assert server.stdout
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
        command += ["--crowd", str(seconds), "--member", url, "--store", f"{folder}/teacher.db", "--number"]
        members = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in range(4)]
        told = [json.loads(process.communicate()[0]) for process in members]
        server.stdin.close()
        seen = json.loads(server.stdout.read())
    sums = {name: sum(row[name] for row in told) for name in ("asked", "hits", "errors")}
    print(
        f"32 threads in 4 processes, {seconds:.0f} s: {sums['asked']:,} rows asked for, {sums['hits']:,} of them hits,"
        f" {seen['requests']:,} requests sent, {seen['twice']} rows sent twice, {sums['errors']} errors"
        f" {[row['error'] for row in told if row['error']]}"
    )


def member(url: str, path: Path, seconds: float, number: int) -> dict[str, Any]:
    """Eight threads of one process ask for random rows until the time is up."""
    teacher, end = Teacher(base_url=url, model="m", concurrency=4, timeout=30), time.monotonic() + seconds
    sums: dict[str, Any] = {"asked": 0, "hits": 0, "errors": 0, "error": ""}
    everything, lock = requests(20_001)[1:], threading.Lock()

    def work(thread: int) -> None:
        chance = random.Random(8 * number + thread)
        while time.monotonic() < end:
            try:
                answers = ask(chance.sample(everything, 50), teacher, store, run=f"{number}-{thread}")
            except Exception as error:  # noqa: BLE001  (counted, and printed at the end)
                with lock:
                    sums["errors"], sums["error"] = sums["errors"] + 1, str(error)
                continue
            with lock:
                sums["asked"] += len(answers)
                sums["hits"] += sum(answer.hit for answer in answers)

    with Store(path) as store:
        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sums


# The server


async def serve(faulty: bool) -> None:
    """Answer until stdin closes, then print what was received."""
    chance, seen, answered = random.Random(1), collections.Counter[str](), collections.Counter[str]()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
        row = json.loads(await reader.readexactly(length))["messages"][-1]["content"]
        counts = row != "row 0"  # the warm-up is not counted and gets no faults
        seen["requests"] += counts
        draw = chance.random() if faulty and counts else 1.0
        fault = next((kind for share, kind in FAULTS if draw < share), None)
        seen["faults"] += fault is not None
        if fault == "drop":
            return False
        if fault in (429, 500):
            writer.write(reply(int(fault), b'{"error": {"message": "no"}}'))
            return True
        await asyncio.sleep(LATENCY)
        body = json.dumps(completion(f"re: {row}")).encode()
        answered[row] += fault is None
        writer.write(reply(200, body[: len(body) // 2] if fault else body))
        return True

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps({**seen, "faults": seen["faults"], "twice": sum(count > 1 for count in answered.values())}))
    sys.stdout.flush()
    server.close()


def reply(status: int, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status} {REASON[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


if __name__ == "__main__":
    main()
