"""The store compared with the disk caches of diskcache, litellm and DSPy: hits, writes, bytes, kill -9 while writing.

    python bench/store.py --folder DIR [--rows 1000000] [--other-rows 100000] [--kills 100]

Rows are requests and answers of 2 to 8 KB in total: a shared system prompt, an instruction of its own, an answer. A hit
starts with the request's dict and ends with the answer's bytes, hashing included; diskcache gets the fastest key,
orjson and SHA-256. It is measured twice: with answers only, and with request and answer, as the store keeps them
(without requests nothing could be listed, searched, explained or checked). litellm and DSPy keep answers only; they are
left out if they are not installed. `tapir-local many` looks up 200 at once, as a run does. Rivals take turns in short
rounds, so that other work on the machine affects all. Filled caches are used again, so an interrupted bench resumes.
"""

import argparse
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from tapir_local.pocket.words import COUNTABLE_WORDS
from tapir_local.store import keys
from tapir_local.store.rows import Call, Use
from tapir_local.store.schema import connect
from tapir_local.store.store import KEYS_PER_LOOKUP, Store

URL = "http://localhost:8000/v1"
HITS = 4000  # of a round
MANY = "tapir-local many"
ROUNDS = 7
CROWD = 8  # processes
CROWD_SECONDS = 6.0

Read = Callable[[dict[str, Any]], object]


def main() -> None:
    """Fill, measure, print."""
    options = arguments()
    if options.crowd:
        print(crowd_member(options.crowd, options.folder, options.rows, options.seed))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    print("versions:", ", ".join(f"{name} {installed(name)}" for name in ("diskcache", "litellm", "dspy", "orjson")))
    sizes = {"tapir-local": options.rows, "diskcache": options.rows, "diskcache both": options.rows}
    sizes |= {name: options.other_rows for name in ("litellm", "dspy") if installed(name) != "absent"}
    for name, rows in sizes.items():
        fill(name, options.folder, rows)
    hits(options.folder, sizes)
    crowds(options.folder, options.rows)
    if options.kills:
        kills(options.folder, options.kills)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--other-rows", type=int, default=100_000, help="rows for litellm and DSPy, which fill slowly")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


# Rows


def sentences() -> list[str]:
    """20,000 sentences of ten words, so that a row is made in microseconds and few rows share a sentence."""
    chance = random.Random("sentences")
    return [" ".join(chance.choices(COUNTABLE_WORDS, k=10)) + "." for _ in range(20_000)]


TEXT = sentences()
SYSTEM = " ".join(TEXT[:16])


def prose(chance: random.Random, least: int, most: int) -> str:
    """That many sentences of about 60 characters."""
    return " ".join(chance.choices(TEXT, k=chance.randint(least, most)))


def request(row: int) -> dict[str, Any]:
    """The body of row `row`: 1.2 to 4 KB."""
    text = f"{row}: {prose(random.Random(row), 2, 48)}"
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"model": "m", "messages": messages, "temperature": 0.7, "max_tokens": 1024}


def answer(row: int) -> bytes:
    """The reply to it: 0.8 to 4 KB."""
    text = prose(random.Random(f"answer {row}"), 10, 60)
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 500, "completion_tokens": len(text) // 5, "total_tokens": 500 + len(text) // 5}
    return orjson.dumps(
        {"id": f"c-{row}", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
    )


def call(row: int) -> Call:
    return Call(keys.request_text(URL, request(row), 0), answer(row), "stop", "bench", "m", "", 500, 300, 1.0)


# Rivals: how each is filled, read and measured on the disk


def plain_key(body: dict[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def reader(name: str, folder: Path) -> Read:
    """From a request's dict to its answer."""
    if name == "tapir-local":
        store = Store(folder / name / "teacher.db", "read-only")
        return lambda body: store.get(keys.request_key(URL, body))
    if name.startswith("diskcache"):
        cache = disk_cache(folder / name)
        return lambda body: cache.get(plain_key(body))
    if name == "litellm":
        lite = litellm_cache(folder)
        return lambda body: lite.get_cache(**body)
    dspy = dspy_cache(folder)
    return lambda body: dspy.get(body)


def disk_cache(folder: Path) -> Any:
    import diskcache

    return diskcache.Cache(str(folder), size_limit=2**40, eviction_policy="none", cull_limit=0)


def litellm_cache(folder: Path) -> Any:
    from litellm.caching.caching import Cache

    return Cache(type="disk", disk_cache_dir=str(folder / "litellm"))


def dspy_cache(folder: Path) -> Any:
    from dspy.clients.cache import Cache

    return Cache(
        enable_disk_cache=True,
        enable_memory_cache=False,
        disk_cache_dir=str(folder / "dspy"),
        disk_size_limit_bytes=2**40,
    )


def fill(name: str, folder: Path, rows: int) -> None:
    """Fill a rival with the rows that it lacks; print the rate and the bytes per row."""
    done = folder / f"{name}.filled"
    if not done.exists() or int(done.read_text()) != rows:
        spent = FILLS[name](folder, rows)
        done.write_text(str(rows))
        print(f"{name:14} filled with {rows:,} rows at {rows / spent:,.0f} rows/s", flush=True)
    size = sum(file.stat().st_size for file in (folder / name).rglob("*") if file.is_file())
    print(f"{name:14} {size / rows:,.0f} bytes a row", flush=True)


def fill_ours(folder: Path, rows: int) -> float:
    """Hand rows over as a run does, with their uses, waiting for each batch; making the rows is not counted."""
    spent = 0.0
    with Store(folder / "tapir-local" / "teacher.db") as store:
        for calls in chunks(rows):
            began = time.perf_counter()
            for number, item in calls:
                store.put(item, [Use("bench", 1, "refine", str(number), keys.hash_request(item.request), 1)])
            store.flush()
            spent += time.perf_counter() - began
    return spent


def chunks(rows: int) -> Iterator[list[tuple[int, Call]]]:
    for start in range(0, rows, 5000):
        yield [(row, call(row)) for row in range(start, min(rows, start + 5000))]


def fill_diskcache(folder: Path, rows: int, name: str = "diskcache") -> float:
    """Fill in transactions, which is not how it is used but saves hours."""
    cache, spent = disk_cache(folder / name), 0.0
    for start in range(0, rows, 5000):
        pairs = [(plain_key(request(row)), text_of(row, name)) for row in range(start, min(rows, start + 5000))]
        began = time.perf_counter()
        with cache.transact():
            for key, value in pairs:
                cache.set(key, value)
        spent += time.perf_counter() - began
    cache.close()
    return spent


def text_of(row: int, name: str) -> bytes:
    """What diskcache stores for a row."""
    return answer(row) if name == "diskcache" else orjson.dumps(request(row)) + answer(row)


def fill_litellm(folder: Path, rows: int) -> float:
    cache = litellm_cache(folder)
    began = time.perf_counter()
    with cache.cache.disk_cache.transact():
        for row in range(rows):
            cache.add_cache(answer(row).decode(), **request(row))
    return time.perf_counter() - began


def fill_dspy(folder: Path, rows: int) -> float:
    cache = dspy_cache(folder)
    began = time.perf_counter()
    for row in range(rows):
        cache.put(request(row), answer(row).decode())
    return time.perf_counter() - began


FILLS: dict[str, Callable[[Path, int], float]] = {
    "tapir-local": fill_ours,
    "diskcache": fill_diskcache,
    "diskcache both": partial(fill_diskcache, name="diskcache both"),
    "litellm": fill_litellm,
    "dspy": fill_dspy,
}


# Measurements


def hits(folder: Path, sizes: dict[str, int]) -> None:
    """Hits per second on one thread, in turns; p50 and p99 of a hit."""
    readers = {name: reader(name, folder) for name in sizes}
    readers[MANY] = many(folder)
    rates: dict[str, list[float]] = {name: [] for name in readers}
    each: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(ROUNDS):
        for name, read in readers.items():
            bodies = sample(sizes.get(name, sizes["tapir-local"]), f"{turn} {name}")  # rows not read just before
            times = bulk_times(read, bodies) if name == MANY else [timed(read, body) for body in bodies]
            rates[name].append(len(times) / sum(times))
            each[name] += times
    ours, bulk = statistics.median(rates["tapir-local"]), statistics.median(rates[MANY])
    for name, found in rates.items():
        cuts = statistics.quantiles(each[name], n=100)
        rate = statistics.median(found)
        print(
            f"{name:16} {rate:9,.0f} hits/s  p50 {cuts[49] * 1e6:6.1f} us  p99 {cuts[98] * 1e6:6.1f} us"
            f"  tapir-local / it {ours / rate:5.2f}, many / it {bulk / rate:5.2f}",
            flush=True,
        )


def sample(rows: int, turn: int | str) -> list[dict[str, Any]]:
    """Bodies drawn at random, made before the clock starts."""
    chance = random.Random(turn)
    return [request(chance.randrange(rows)) for _ in range(HITS)]


def many(folder: Path) -> Any:
    """From the dicts of several requests to their answers, at once."""
    store = Store(folder / "tapir-local" / "teacher.db", "read-only")
    return lambda bodies: store.get_many([keys.request_key(URL, body) for body in bodies])


def bulk_times(read: Any, bodies: list[dict[str, Any]]) -> list[float]:
    """Seconds of each hit; hits that are looked up together have equal shares."""
    times: list[float] = []
    for start in range(0, len(bodies), KEYS_PER_LOOKUP):
        some = bodies[start : start + KEYS_PER_LOOKUP]
        times += [timed(read, some) / len(some)] * len(some)
    return times


def timed(read: Any, body: Any) -> float:
    began = time.perf_counter()
    found = read(body)
    taken = time.perf_counter() - began
    assert found
    return taken


def crowds(folder: Path, rows: int) -> None:
    """Hits per second of CROWD processes at once, in turns."""
    rates: dict[str, list[float]] = {"tapir-local": [], MANY: [], "diskcache": [], "diskcache both": []}
    for turn in range(3):
        for name, found in rates.items():
            found.append(crowd(name, folder, rows, turn))
    ours, bulk = statistics.median(rates["tapir-local"]), statistics.median(rates[MANY])
    for name, found in rates.items():
        rate = statistics.median(found)
        ratios = f"tapir-local / it {ours / rate:5.2f}, many / it {bulk / rate:5.2f}"
        print(f"{CROWD} processes  {name:16} {rate:9,.0f} hits/s  {ratios}", flush=True)


def crowd(name: str, folder: Path, rows: int, turn: int) -> float:
    command = [sys.executable, __file__, "--folder", str(folder), "--rows", str(rows), "--crowd", name]
    members = [
        subprocess.Popen([*command, "--seed", str(turn * CROWD + n)], stdout=subprocess.PIPE) for n in range(CROWD)
    ]
    return sum(float(member.communicate()[0]) for member in members)


def crowd_member(name: str, folder: Path, rows: int, seed: int) -> float:
    """Hits per second of one process among several that start at the same second."""
    bodies = sample(rows, 1000 + seed)
    read: Any = many(folder) if name == MANY else reader(name, folder)
    turns: list[Any] = (
        [bodies[at : at + KEYS_PER_LOOKUP] for at in range(0, HITS, KEYS_PER_LOOKUP)] if name == MANY else bodies
    )
    size = KEYS_PER_LOOKUP if name == MANY else 1
    for turn in turns[:5]:
        read(turn)
    time.sleep(max(0.0, START_GRID - time.time() % START_GRID))
    count, end = 0, time.perf_counter() + CROWD_SECONDS
    began = time.perf_counter()
    while time.perf_counter() < end:
        read(turns[count % len(turns)])
        count += 1
    return size * count / (time.perf_counter() - began)


START_GRID = 8.0  # seconds: enough for every member to import and to draw its bodies

WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from store import call
from tapir_local.store.store import Store
store = Store(Path(sys.argv[1]))
calls = [(row, call(row)) for row in range(int(sys.argv[2]), int(sys.argv[2]) + 3000)]
print("ready", flush=True)
while True:
    for start in range(0, len(calls), 100):
        waiting = [(row, store.put(item)) for row, item in calls[start : start + 100]]
        for row, done in waiting:
            done.result()
        print("\\n".join(str(row) for row, _ in waiting), flush=True)
"""


def kills(folder: Path, count: int) -> None:
    """kill -9 while writing, `count` times; then every acknowledged row must be there and the file intact."""
    path, acknowledged, chance = folder / "killed" / "teacher.db", set[int](), random.Random(1)
    for number in range(count):
        command = [sys.executable, "-c", WRITER, str(path), str(number * 3000), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.25))
            writer.send_signal(signal.SIGKILL)
            lines = writer.stdout.read().split(b"\n")
        acknowledged |= {int(line) for line in lines[:-1]}
    with Store(path) as store:
        lost = sum(store.get(keys.request_key(URL, request(row))) != answer(row) for row in sorted(acknowledged))
        print(f"kill -9 {count} times: {len(acknowledged):,} rows acknowledged, {lost} lost, notices {store.notices}")
    conn = connect(path, write=False)
    print("integrity_check:", conn.execute("PRAGMA integrity_check").fetchone()[0])
    conn.close()


if __name__ == "__main__":
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    main()
