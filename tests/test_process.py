"""How a parent sees its child's progress, errors and death, and how a child notices its parent's death."""

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from warm import LIBRARIES, may_start_warm

from tapir_local.errors import TapirError
from tapir_local.process import (
    Killed,
    OutOfMemory,
    call_in_process,
    child_environment,
    read_reports,
    run_module,
    withhold_variables,
)
from tapir_local.records import Message

HEAD = """
import os, signal, sys, time
from pathlib import Path
from tapir_local.errors import TapirError
from tapir_local.process import OutOfMemory, child_main, send_remark
"""
TAIL = """
sys.exit(child_main(work))
"""


@pytest.fixture(params=["cold", "warm"])
def started(request, monkeypatch):
    """How children start: as for users, or as in most tests. Both must behave alike."""
    if request.param == "warm":
        if not may_start_warm():
            pytest.skip("there is a GPU or Unsloth")
        for name in ("heavy", "serving"):
            monkeypatch.setitem(LIBRARIES, name, ())


@pytest.fixture
def child(tmp_path, monkeypatch, started):
    """Run the body of a `work(folder, progress)` as a module; the log file is tmp_path/log."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    def run(body: str, progress=None, *more) -> None:
        (tmp_path / "heavy.py").write_text(f"{HEAD}\ndef work(folder, progress):\n    {body}\n{TAIL}")
        run_module("heavy", tmp_path, tmp_path / "log", progress, *more)

    return run


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not count."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(condition())


def test_progress_arrives_in_order_and_prints_go_to_the_log(child, tmp_path):
    seen = []
    child(
        "print('a banner'); progress(1, 2, 'loss 3'); os.system('echo from a shell'); progress(2, 2, 'ö')",
        lambda *step: seen.append(step),
    )
    assert seen == [(1, 2, "loss 3"), (2, 2, "ö")]
    assert "a banner" in (tmp_path / "log").read_text()
    assert "from a shell" in (tmp_path / "log").read_text()


def test_the_childs_own_error_arrives_as_it_was(child):
    with pytest.raises(TapirError) as caught:
        child("raise TapirError('no rows', where='train.jsonl', fix='make some')")
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("no rows", "train.jsonl", "make some")


def test_any_other_error_names_the_log_and_its_last_line(child, tmp_path):
    with pytest.raises(TapirError, match="ZeroDivisionError: division by zero") as caught:
        child("1 / 0")
    assert caught.value.where == str(tmp_path / "log")
    assert "Traceback" in (tmp_path / "log").read_text()


def test_a_kill_is_said_to_be_probably_out_of_memory(child):
    with pytest.raises(TapirError, match=r"signal 9.*memory"):
        child("os.kill(os.getpid(), signal.SIGKILL)")


def test_another_signal_is_named(child):
    with pytest.raises(TapirError, match="SIGABRT"):
        child("os.abort()")


def test_a_missing_module_is_an_error_with_its_reason(tmp_path):
    with pytest.raises(TapirError, match="No module named"):
        run_module("tapir_local.no_such_stage", tmp_path, tmp_path / "log")


def test_an_interrupt_of_the_parent_stops_the_child(child, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child("(folder / 'pid').write_text(str(os.getpid())); progress(0, 1, ''); time.sleep(60)", interrupt)
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("stopped", [False, True])
def test_the_child_ends_when_its_parent_is_killed(tmp_path, stopped):
    (tmp_path / "heavy.py").write_text(
        HEAD
        + """
def work(folder, progress):
    (folder / "pid").write_text(str(os.getpid()))
    os.system(f"sleep 60 & echo $! >{folder}/grandchild")
    time.sleep(60)
"""
        + TAIL
    )
    imports = "import sys; from pathlib import Path; from tapir_local.process import run_module"
    code = f"{imports}; here = Path(sys.argv[1]); run_module('heavy', here, here / 'log')"
    command = [sys.executable, "-c", code, str(tmp_path)]
    path = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    grandchild = tmp_path / "grandchild"
    assert wait_for(lambda: grandchild.exists() and grandchild.read_text().strip())
    if stopped:  # SIGSTOP: it runs no code of its own
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for file in (tmp_path / "pid", grandchild):
        assert wait_for(lambda file=file: not alive(int(file.read_text())))


def test_files_in_the_users_folder_do_not_take_the_place_of_packages(child, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "json.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path / "here")
    seen = []
    child("progress(1, 1, 'well')", lambda *step: seen.append(step))
    assert seen == [(1, 1, "well")]


def test_a_remark_is_said_and_is_no_progress(child):
    seen, said = [], []
    child(
        "send_remark(progress, 'without Unsloth'); progress(1, 1, 'loss')", lambda *step: seen.append(step), said.append
    )
    assert (seen, said) == ([(1, 1, "loss")], ["without Unsloth"])


def test_a_remark_that_nobody_asks_for_is_on_stderr(child, capfd):
    child("send_remark(progress, 'without Unsloth')")
    assert capfd.readouterr().err == "without Unsloth\n"


@pytest.fixture
def serve(tmp_path, monkeypatch, started):
    """Run the body of a `work(folder, parent)` as a module that calls hooks; the log file is tmp_path/serving.log."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "serving", raising=False)

    def run(body: str, **hooks):
        main = "if __name__ == '__main__':\n    sys.exit(serve_parent(work))\n"
        head = HEAD.replace("child_main", "serve_parent")
        (tmp_path / "serving.py").write_text(f"{head}\ndef work(folder, parent):\n    {body}\n{main}")
        work = importlib.import_module("serving").work
        return call_in_process(work, Message("user", "hi"), tmp_path, hooks, {"GREETING": "hello"})

    return run


def test_a_child_calls_hooks_of_its_parent_in_order_and_returns_a_value(serve):
    seen = []
    asks = "found = [parent.ask('double', n) for n in range(3)]; parent.tell('note', *found)"
    job = "import json; job = json.loads((folder / 'job.json').read_text())"
    found = serve(
        f"{job}; {asks}; return [job['content'], os.environ['GREETING'], 0.1]",
        double=lambda n: seen.append(n) or 2 * n,
        note=lambda *values: seen.append(values),
    )
    assert seen == [0, 1, 2, (0, 2, 4)]
    assert found == ["hi", "hello", 0.1]
    assert serve("return None") is None


def test_what_a_hook_raises_stops_the_child(serve, tmp_path):
    def fail(pid):
        assert alive(pid)
        raise ValueError(pid)

    for call in ("ask", "tell"):
        with pytest.raises(ValueError, match=r"\d+") as caught:
            serve(f"parent.{call}('fail', os.getpid()); time.sleep(60)", fail=fail)
        assert not alive(caught.value.args[0])


def test_a_child_that_ends_while_its_parent_replies_is_an_error(serve):
    def slow(pid):
        os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: not alive(pid))

    with pytest.raises(Killed):
        serve("parent.ask('slow', os.getpid())", slow=slow)
    with pytest.raises(TapirError, match="no rows"):
        serve("raise TapirError('no rows')")
    with pytest.raises(TapirError, match="ZeroDivisionError"):
        serve("1 / 0")


def test_memory_that_ran_out_is_known_as_such(child):
    with pytest.raises(OutOfMemory) as caught:
        child("raise OutOfMemory('too much', where='train', fix='less')")
    assert (caught.value.what, type(caught.value)) == ("too much", OutOfMemory)
    with pytest.raises(Killed):
        child("os.kill(os.getpid(), signal.SIGKILL)")


LAUNCHER = """
import os, subprocess, sys
print("a launcher's own line")
many = [subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, "RANK": str(n)}) for n in range(3)]
sys.exit(max(one.wait() != 0 for one in many))
"""


def test_of_a_launchers_processes_the_first_reports_and_any_may_fail(child, tmp_path):
    (tmp_path / "launch.py").write_text(LAUNCHER)
    seen, launcher = [], [sys.executable, str(tmp_path / "launch.py")]
    child("progress(1, 1, os.environ['RANK'])", lambda *step: seen.append(step), print, launcher)
    assert seen == [(1, 1, "0")]
    assert "a launcher's own line" in (tmp_path / "log").read_text()
    with pytest.raises(TapirError, match="the third"):
        child("if os.environ['RANK'] == '2': raise TapirError('the third failed')", None, print, launcher)


NOISY = """
import subprocess, sys
print({"rank": 0, "error": "no"})
print('{"done": 1, "total": 2}')
print("{")
print("[default0]: ", end="", flush=True)
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
print('{"error": {"what": "not ours"}}')
sys.exit(code)
"""


def test_what_a_launcher_prints_is_no_report_whatever_it_looks_like(child, tmp_path):
    (tmp_path / "launch.py").write_text(NOISY)
    seen, launcher = [], [sys.executable, str(tmp_path / "launch.py")]
    child("progress(1, 1, 'loss 3')", lambda *step: seen.append(step), print, launcher)
    assert seen == [(1, 1, "loss 3")]
    log = (tmp_path / "log").read_text()
    for line in ("{'rank': 0, 'error': 'no'}", '{"done": 1, "total": 2}', "{\n", '{"error": {"what": "not ours"}}'):
        assert line in log


def test_what_stands_beside_a_report_in_its_line_goes_to_the_log():
    lines = [b'a-mark {"done": 1}[rank1] noise\n', b"a-mark {half\n", b"\n"]
    log = io.BytesIO()
    assert list(read_reports(lines, b"-mark", log)) == [{"done": 1}]
    assert log.getvalue() == b"a[rank1] noisea {half\n\n"


KEYS = ("OPENAI_API_KEY", "MISTRAL_API_KEY", "apikey", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MY_VENDOR")
KEPT = ("HOME", "TOKENIZERS_PARALLELISM", "MONKEY", "KEYBOARD_LAYOUT", "CUDA_VISIBLE_DEVICES")


def test_a_child_has_no_keys(child, tmp_path, monkeypatch):
    for name in (*KEYS, *KEPT):
        monkeypatch.setenv(name, "sk-0123456789")
    with withhold_variables(["MY_VENDOR"]):
        child("import json; (folder / 'env').write_text(json.dumps(dict(os.environ)))")
    found = json.loads((tmp_path / "env").read_text())
    assert set(KEPT) <= set(found)
    assert not set(KEYS) & set(found)
    assert os.environ["OPENAI_API_KEY"]  # the parent needs it
    child("import json; (folder / 'env').write_text(json.dumps(dict(os.environ)))")
    assert "MY_VENDOR" in json.loads((tmp_path / "env").read_text())


def test_the_classifier_may_download_with_the_hubs_token_and_no_other_key(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    assert child_environment("tapir_local.training.classifier")["HF_TOKEN"] == "hf_0123456789"
    assert "OPENAI_API_KEY" not in child_environment("tapir_local.training.classifier")
    assert "HF_TOKEN" not in child_environment("tapir_local.training.train")


def test_a_launcher_that_is_not_there_is_named(child):
    with pytest.raises(TapirError, match="no-such-launcher cannot be started: No such file"):
        child("pass", None, print, ["no-such-launcher"])
