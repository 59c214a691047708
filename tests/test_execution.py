"""The sandbox against hostile programs: none escapes, the host is unharmed, each is reported as what it was."""

import functools
import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from nanochat_lib.scripts import chat_eval
from nanochat_lib.tasks import execution
from nanochat_lib.tasks.common import Task, conversation_of
from nanochat_lib.tasks.execution import FENCE, run, run_program
from nanochat_lib.tasks.humaneval import HumanEval

FORK_BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
SWALLOW = """
while True:
    try:
        while True: pass
    except BaseException: pass
"""
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for _ in range(300):
            time.sleep(0.1)
            print("still here", flush=True)
    os._exit(0)
"""
DELETE = """
import os, shutil
for folder in ("/bin", "/lib", "/work", "/dev", os.path.dirname(os.__file__) + "/json", "/usr/bin"):
    shutil.rmtree(folder, ignore_errors=True)
for file in (os.__file__, "/usr/bin/env", "/dev/null"):
    try: os.remove(file)
    except OSError: pass
assert os.path.exists(os.__file__) and os.path.exists("/usr/bin/env") and os.path.exists("/dev/null")
"""
SIGNALS = """
import signal, os
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, lambda *a: None)
while True: pass
"""
THREADS = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
FILL = "for n in range(100):\n    with open(f'file{n}', 'wb') as file: file.write(bytes(2**20))"
KILL_ALL = "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGKILL)\n"
RAISED = "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (10**6, 10**6))"
SHARED = "import mmap\nkept = []\nwhile True: kept.append(mmap.mmap(-1, 2**26)); kept[-1].write(bytes(2**26))"
CHILDREN = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        kept = b"1" * (90 << 20)
        time.sleep(60)
time.sleep(60)
"""
ESCAPES = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
results = [libc.chroot(b"/usr"), libc.mount(b"none", b"/work", b"tmpfs", 0, None), libc.umount2(b"/usr", 2),
           libc.ptrace(16, 1, 0, 0)]
assert all(result == -1 for result in results), results
for path in ("/proc/1", "/dev/mem", "/dev/sda", "/sys/kernel", "/etc/shadow", {str(Path.home() / ".ssh")!r}, "/home", "/tmp",
             "/var"):
    assert not os.path.exists(path), path
"""
EVERYWHERE = """
import os
for place in range(3, 64):
    try: LINE
    except OSError: pass
os._exit(0)
"""
LIES = (b'{"signal": 1000}', b'{"open": 5}', b'{"broken": "lie"}', b'{"proved": true, "exit": 0}', b"[" * 50_000, b"\xff\0", b"7")
FAR = EVERYWHERE.replace("LINE", "os.lseek(place, 2**36, 0)") + "os._exit(0)"
UNCOUNTED = """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
segments = []
for _ in range(16):  # 1 GiB that belongs to no process
    segments.append(libc.shmget(0, 2**26, 0o1600))
    if segments[-1] < 0: break
    place = libc.shmat(segments[-1], None, 0)
    ctypes.memset(place, 1, 2**26)
    libc.shmdt(ctypes.c_void_p(place))
else:
    for segment in segments: libc.shmctl(segment, 0, None)
    raise SystemExit("1 GiB")
"""
DEEPER = """
import ctypes, os
libc, clone = ctypes.CDLL(None), {"x86_64": 56, "aarch64": 220}[os.uname().machine]
assert libc.unshare(0x10000000) == -1, "a user namespace"
assert libc.syscall(clone, 0x10000011, 0, 0, 0, 0) == -1, "a child in a user namespace"
assert libc.syscall(435, bytes(88), 88) == -1 and os.fork() >= 0
"""
KILLS_WATCHER = """
import os, signal, time
watcher = os.getppid()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
try: os.kill(watcher, signal.SIGKILL)
except PermissionError: pass
time.sleep(0.2)
"""
INHERITED = """
import os
def is_open(place):
    try: return bool(os.fstat(place))
    except OSError: return False
assert list(filter(is_open, range(1024))) == [0, 1, 2, 11] and os.getuid() != 0
"""
NESTED = "import os\nfor _ in range(3000):\n    os.mkdir('folder')\n    os.chdir('folder')"
NETWORK = """
import socket
for address in (("127.0.0.1", PORT), ("1.1.1.1", 53)):
    try: socket.create_connection(address, 0.5)
    except OSError: pass
    else: raise SystemExit("connected to " + address[0])
"""

HOSTILE = {  # program, timeout, what `reason` must contain ("" = it ran to its end and found every door shut)
    "fork bomb": (FORK_BOMB, 1, "timeout"),
    "plain fork bomb": ("import os\nwhile True: os.fork()", 3, "Resource temporarily unavailable"),
    "thread bomb": (THREADS, 3, "can't start new thread"),
    "endless output": ("while True: print('x' * 10000)", 3, "File too large"),
    "endless errors": ("import os\nwhile True: os.write(2, b'x' * 10000)", 3, "x"),
    "deletes everything": (DELETE, 5, ""),
    "reads the passwords": ("open('/etc/passwd')", 3, "FileNotFoundError"),
    "network": (NETWORK, 5, ""),
    "a server": ("import socket\nsocket.create_server(('8.8.8.8', 80))", 3, "Error"),
    "swallows KeyboardInterrupt": (SWALLOW, 1, "timeout"),
    "huge allocation": ("x = bytearray(2**33)", 3, "MemoryError"),
    "slow allocation": (SHARED, 3, "MemoryError"),
    "many children's memory": (CHILDREN, 4, "too much memory"),
    "os._exit(0)": ("import os\nos._exit(0)\nassert False", 3, "ended early, exit 0"),
    "sys.exit(0)": ("import sys\nsys.exit(0)\nassert False", 3, "ended early, exit 0"),
    "exit code 3": ("import os\nos._exit(3)", 3, "ended early, exit 3"),
    "a signal without a name": ("import os\nos.kill(os.getpid(), 40)", 3, "killed by signal 40"),
    **{f"lies {lie[:20]}": (EVERYWHERE.replace("LINE", f"os.set_blocking(place, False), os.write(place, {lie} + b'\\n')"), 3,
                            "ended early, exit 0") for lie in LIES},
    "writes far away": (FAR, 3, "ended early, exit 0"),
    "a child that gets to the end": ("import os\nif os.fork(): os.wait(); os._exit(3)", 3, "ended early, exit 3"),
    "memory outside of processes": (UNCOUNTED, 5, ""),
    "namespaces of its own": (DEEPER, 3, ""),
    "what it inherits": (INHERITED, 3, ""),
    "kills its watcher": (KILLS_WATCHER, 3, ""),
    "nested folders": (NESTED.replace("3000", "900"), 3, ""),
    "daemon left behind": (DAEMON, 3, ""),
    "infinite loop": ("while True: pass", 1, "timeout"),
    "sleeper": ("import time\ntime.sleep(60)", 1, "timeout"),
    "deep recursion": ("def f(): f()\nf()", 3, "RecursionError"),
    "stack overflow": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return [n, *map(f, [n])]\nf(1)", 3, "SIGSEGV"),
    "reads stdin": ("input()", 3, "EOFError"),
    "signal handlers": (SIGNALS, 1, "timeout"),
    "huge file": ("open('big', 'wb').write(bytes(2**28))", 3, "File too large"),
    "fills the disk": (FILL, 3, "No space left"),
    "segfault": ("import ctypes\nctypes.string_at(0)", 3, "SIGSEGV"),
    "abort": ("import os\nos.abort()", 3, "SIGABRT"),
    "kills all and its parent": (KILL_ALL, 3, ""),
    "raises its limits": (RAISED, 3, "not allowed"),
    "breaks builtins": ("import builtins\nbuiltins.print = builtins.compile = None\nassert 1 == 2, 'a test'", 3, "a test"),
    "breaks the writers": ("import os, sys, json\nos.write = sys.stdout = json.load = None\nassert 1 == 2, 'a test'", 3, "a test"),
    "unicode": ("print('\\ud800' if 0 else 'né 日本 🙂')\nraise ValueError('日本')", 3, "ValueError: 日本"),
    "bytes as output": ("import os\nos.write(1, bytes(range(256)) * 9)\nos.write(2, bytes(range(256)))\nos._exit(1)", 3, ""),
    "reads the environment": ("import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ", 3, ""),
    "syntax error": ("def f(:", 3, "SyntaxError"),
    "null bytes": ("\0", 3, "null bytes"),
    "keys to the house": (ESCAPES, 3, ""),
}
TO_THE_END = {"deletes everything", "network", "daemon left behind", "reads the environment", "keys to the house",
              "memory outside of processes", "namespaces of its own", "kills its watcher", "nested folders", "what it inherits"}


def survivors():
    """Processes of sandboxes that are still there after a while (those of a test beside this one end in time)."""
    found = [p for p in psutil.process_iter(["cmdline"]) if "json.load(text)" in " ".join(p.info["cmdline"] or [])]
    return [p for p in psutil.wait_procs(found, 12)[1] if p.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture(scope="module")
def fences():
    """All of them, or no test: hostile programs are not for a kernel without namespaces, and CI must have one with."""
    outcome = run("", 30)
    assert outcome.passed, outcome
    if outcome.open:
        assert set(outcome.open) <= {"files", "network", "processes", "calls"} and outcome.why
        reason = f"no fences around {', '.join(outcome.open)}: {outcome.why}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


@pytest.fixture(scope="module")
def port():
    """A real listener on this machine, which no program may reach."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs(name, fences, port, tmp_path):
    program, timeout, reason = HOSTILE[name]
    timeout = timeout if reason == "timeout" else 30  # on a busy machine even a start takes a while
    canary = tmp_path / "canary"
    canary.write_text("alive")
    begin = time.monotonic()
    outcome = run(program.replace("PORT", str(port)), timeout, memory=512)
    assert reason in outcome.reason and outcome.open == (), outcome
    if name in TO_THE_END:
        assert outcome.passed, outcome
    elif name != "kills all and its parent":
        assert not outcome.passed
    assert time.monotonic() - begin < timeout + 30 and len(outcome.output) <= 10_000
    assert canary.read_text() == "alive" and os.path.exists("/etc/passwd")
    assert survivors() == []


@pytest.mark.parametrize("namespaces", [True, False])
def test_honest_programs_pass(namespaces):
    program = "import math, re, dataclasses\nopen('notes', 'w').write('x')\nprint(math.pi)\nassert open('notes').read() == 'x'"
    outcome = run(program, 30, namespaces=namespaces)
    assert outcome.passed and outcome.output.startswith("3.14")
    assert run_program("assert 1 == 2, 'one is not two'", 30) == "AssertionError: one is not two"
    assert run_program("x = " + repr("y" * 200_000), 30) == ""


def test_missing_fences_are_named():
    outcome = run("assert True", 30, namespaces=False)
    assert outcome.open[:3] == ("files", "network", "processes") and outcome.why == "not asked for"


def test_missing_fences_are_said_once(monkeypatch, capsys):
    monkeypatch.setattr(execution, "run", functools.partial(run, namespaces=False))
    execution.fences_missing.cache_clear()
    try:
        task = HumanEval.__new__(HumanEval)
        asked = {**conversation_of("def one():\n", ""), "entry_point": "one", "test": "def check(f): assert f() == 1"}
        assert task.evaluate(asked, "    return 1") and not task.evaluate(asked, "    return 2")
        assert capsys.readouterr().out.count("without fences around files, network, processes") == 1
        assert execution.fences_missing()[:3] == ("files", "network", "processes")
    finally:
        execution.fences_missing.cache_clear()


@pytest.mark.parametrize("task, kept", [(HumanEval, {"fences_missing": ["files"]}), (Task, {})])
def test_missing_fences_are_kept_with_the_grades(task, kept, base_dir, monkeypatch):
    grades = dict.fromkeys(("tasks", "counts", "chance", "centered", "pass_at_k", "calculator"), {}) | {"chatcore": 0.0}
    monkeypatch.setattr(chat_eval, "fences_missing", lambda: ("files",))
    monkeypatch.setattr(chat_eval, "chosen_tasks", lambda settings: {"a task": task.__new__(task)})
    monkeypatch.setattr(chat_eval, "load_model", lambda *rest: (None, None, {"step": 1}))
    monkeypatch.setattr(chat_eval, "evaluate_chat", lambda *rest, **more: (grades, []))
    chat_eval.chat_eval(chat_eval.ChatEval())
    found = json.loads((base_dir / "report" / "result_chat_eval_sft.json").read_text())
    assert {name: found[name] for name in found if name == "fences_missing"} == kept


def test_what_is_told_is_checked():
    """Only without fences can a program get at the watcher; even then nothing it tells brings us down."""
    told = b"\n".join([*LIES, b'{"exit": "0"}', b'{"why": []}', b'{"exit": true}', b"[1]", b"[" * 200_000, b'{"why": "so"}'])
    facts = execution.read_facts(told)
    assert facts == {"signal": 1000, "broken": "lie", "proved": True, "exit": 0, "why": "so"}
    assert execution.reason_of({"signal": 1000}, "") == "killed by signal 1000"
    assert execution.reason_of({"exit": 0}, "") == "ended early, exit 0"


def test_output_is_read_up_to_a_limit(tmp_path):
    with open(tmp_path / "far", "w+b") as file:
        file.truncate(2**36)
        assert len(execution.beginning(file)) == 2**20


@pytest.mark.parametrize("program, timeout, reason", [
    ("while True: pass", 1, "timeout"), ("x = bytearray(2**33)", 3, "MemoryError"), (DAEMON, 3, ""),
    ("import os\nos._exit(0)", 3, "ended early, exit 0"), ("open('big', 'wb').write(bytes(2**28))", 3, "File too large"),
    (NESTED, 3, ""), (UNCOUNTED, 5, ""), (DEEPER, 3, ""), ("import os\nos.mkdir('shut')\nos.mkdir('shut/in')\nos.chmod('shut', 0)", 3, ""),
])
def test_limits_hold_without_namespaces(program, timeout, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # what is left there is seen
    outcome = run(program, timeout if reason == "timeout" else 30, namespaces=False)
    assert reason in outcome.reason and outcome.passed == (not reason)
    assert survivors() == [] and not list(tmp_path.iterdir())


def test_who_kills_its_watcher_leaves_nobody():
    run(KILLS_WATCHER, 30, namespaces=False)
    assert survivors() == []


def test_users_without_rights_have_the_same_fences():
    """Root can try how it is for others; others have seen it in the tests above."""
    if os.getuid() != 0 or not os.access("/usr/bin/python3", os.X_OK):
        return
    ours, theirs = socket.socketpair()
    code = "import sys\nexec(compile(sys.argv[1], 'fence', 'exec'), globals())\nmain()"
    settings = dict(memory=512, seconds=9, processes=16, namespaces=True, reachable=True, others=0)
    program = "import os\nassert os.getuid() == 1000 and not os.path.exists('/etc')"
    with ours, theirs:
        ours.sendall(json.dumps([program, settings]).encode())
        ours.shutdown(socket.SHUT_WR)
        done = subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", code, open(FENCE).read()], cwd="/", stdin=theirs,
                              user=65533, group=65533, extra_groups=[], capture_output=True)
        facts = execution.read_facts(ours.recv(1 << 16))
    assert "files" in facts["open"] or (done.stderr == b"" and facts["proved"]), (done, facts)
