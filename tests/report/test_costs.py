"""What was paid and saved, by run, round, stage and task."""

from pathlib import Path

import pytest
from server import Server, says, teacher

from tapir_local.errors import TapirError
from tapir_local.files import write_rows
from tapir_local.method import prompts
from tapir_local.recipe.endpoints import Price
from tapir_local.records import Example, Message, Request
from tapir_local.report.costs import round_receipt, summarize_costs
from tapir_local.store.store import Store
from tapir_local.teacher.ask import ask

PRICE = Price(input=1_000_000, output=1_000_000)  # a token costs 1


def wanted(stage: str, *ids: str, number: int = 0) -> list[Request]:
    return [Request(prompts.answer_prompt((Message("user", f"{stage} {id}"),)), id, stage, number) for id in ids]


@pytest.fixture
def path(server: Server, tmp_path: Path) -> Path:
    """Run `one` paid for four calls and for an empty answer; run `two` found two of them. Each has 10 tokens."""
    server.faults["seeds c"] = [says("")]
    with Store(tmp_path / "cache" / "teacher.db") as store:
        priced = teacher(server, price=PRICE)
        ask(wanted("seeds", "a", "b", "c"), priced, store, run="one")
        ask(wanted("judge", "a#0", number=1), priced, store, run="one")
        ask(wanted("seeds", "a", "b"), priced, store, run="two")
        ask(wanted("seeds", "d"), teacher(server), store, run="two")
    rows = [Example(id, (), "", task) for id, task in (("a", "Math"), ("b", "Code"), ("c", "Math"))]
    write_rows(tmp_path / "cache" / "runs" / "one" / "seeds.jsonl", rows)
    return tmp_path / "cache" / "teacher.db"


def told(rows: list[dict[str, object]], by: str, *names: str) -> dict[object, tuple[object, ...]]:
    return {row[by]: tuple(row[name] for name in names) for row in rows}


def test_by_stage_with_what_failed_and_what_it_cost(path: Path) -> None:
    names = ("stage", "paid", "from_store", "failed", "tokens_in", "tokens_out", "money")
    found = told(summarize_costs(path, "stage", "one"), *names)
    assert found == {"seeds": (3, 0, 1, 28, 12, 40.0), "judge": (1, 0, 0, 7, 3, 10.0)}


def test_by_run_with_what_the_store_saved_and_what_has_no_price(path: Path) -> None:
    found = told(summarize_costs(path, "run"), "run", "paid", "from_store", "money", "saved", "unpriced")
    assert found == {"one": (4, 0, 50.0, 0.0, 0), "two": (1, 2, 0.0, 20.0, 1)}


def test_by_task_and_for_one_round(path: Path) -> None:
    assert told(summarize_costs(path, "task", "one"), "task", "paid") == {"Math": (3,), "Code": (1,)}
    assert told(summarize_costs(path, "task", "one", 1), "task", "paid") == {"Math": (1,)}
    assert told(summarize_costs(path, "task", "two"), "task", "paid") == {"unknown": (1,)}  # its folder is not there
    assert told(summarize_costs(path, "round", "one"), "round", "paid") == {"0": (3,), "1": (1,)}


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(TapirError, match="no store yet"):
        summarize_costs(tmp_path / "teacher.db", "stage")


def test_a_receipt_names_money_only_where_some_was_spent() -> None:
    row = {"paid": 5_427, "from_store": 12, "failed": 0, "money": 0.0, "saved": 0.0, "unpriced": 0, "unpriced_hits": 0}
    assert round_receipt([], "calls cost") == ""
    assert round_receipt([row], "calls cost") == "5,427 calls asked, 12 from the store; no money spent"
    priced = {**row, "failed": 3, "money": 1.5, "saved": 0.25}
    assert round_receipt([row, priced], "calls cost --run a") == (
        "10,854 calls asked, 24 from the store, 3 failed attempts; money 1.50, saved 0.2500. "
        "By stage: calls cost --run a"
    )
    assert "money unknown" in round_receipt([{**row, "unpriced": 5_427}], "calls cost")
