"""Attacks on the sandbox: what a program can access, and that the host is unaffected."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest

from nanopause import sandbox
from nanopause.errors import UserError
from nanopause.tasks import TASKS, Example, load
from nanopause.tasks.metrics import pass_at_k

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("NANOPAUSE_DATA", ROOT.parent / "shared/data")) / "tasks"
WHY_NOT = sandbox.unavailable()
isolated = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
C = """
import ctypes, errno
C = ctypes.CDLL(None, use_errno=True)
def called(name, *arguments):
    ctypes.set_errno(0)
    return "done" if getattr(C, name)(*arguments) >= 0 else errno.errorcode[ctypes.get_errno()]
"""


def run(program, tests="", **limits):
    return sandbox.run(textwrap.dedent(program), tests, **limits)


def printed(program, **limits):
    """The output of a program, which must pass."""
    result = run(program, **limits)
    assert result.ok, result
    return result.output.strip()


@pytest.fixture
def name():
    """A process name by which the host finds a program's processes."""
    return f"np{os.urandom(5).hex()}"


def called(name):
    """First lines of a program that set its process name (PR_SET_NAME), which its children inherit."""
    return f"import ctypes, os, signal, sys, time\nctypes.CDLL(None).prctl(15, b'{name}')\n"


def processes(name):
    found = []
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            if file.read_text().strip() == name:
                found.append(int(file.parent.name))
        except OSError:
            pass  # the process has exited
    return found


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def test_missing_protections_are_due_to_the_system():
    system = "no namespaces|no system-call filter|^(unshare|setgroups|uid_map|gid_map|program: (mount|syscall)): "
    assert not WHY_NOT or re.search(system, WHY_NOT)


# A program and its tests


@isolated
def test_passing_program():
    result = run("import math\ndef f(x):\n    return math.gcd(x, 6)\nprint(f(4))", "assert f(4) == 2")
    assert result == (True, "2\n", "")


@isolated
def test_failing_test():
    result = run("def f(x):\n    return x", "assert f(1) == 1\nassert f(1) == 2")
    assert not result.ok and result.reason == "exit status 1 before the end of its tests"
    assert 'File "/tests.py", line 2' in result.output and "AssertionError" in result.output


@isolated
def test_program_may_break_its_own_modules():
    program = "import builtins, os, sys\nos.read = os.write = os._exit = sys.stdout = builtins.exec = None"
    assert run(program, "assert True").ok and not run(program, "assert False").ok


NEVER = [
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import os; os._exit(0)",
    "import os, atexit; atexit.register(os._exit, 0)",
    "import os, sys; sys.excepthook = lambda *error: os._exit(0)",
    "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "import os\nif os.fork():\n    os._exit(0)",
    "import os, threading, time\nthreading.Timer(0.1, os._exit, [0]).start(); time.sleep(1)",
    "print('passed ok 1'); import sys; sys.stdout.flush(); sys.exit(0)",
    "import os\nfor fd in range(5, 64):\n    try: os.write(fd, b'passed')\n    except OSError: pass",
    "import os\nos.write(4, bytes(16)); os._exit(0)",
    "import builtins; builtins.AssertionError = Warning",
    "import builtins; builtins.exec = builtins.compile = builtins.open = lambda *a, **k: None",
    "import os\nfor f in 'read', 'write', '_exit': setattr(os, f, lambda *a: None)",
    "import sys; sys.exit = lambda *a: None; sys.modules.clear()",
    "__name__ = 'x'; assert_ = lambda *a: None",
    "x = '''",
    "x = (",
    "if 0: \\",
    "x = '''\n'''; del x; 1 / 0",
    "\0",
    "\ud800",
    "raise KeyboardInterrupt",
    "import os; os.close(3)",
    "import os; os.close(4)",
    "import sys, os; os.dup2(os.open('/tmp/x', os.O_CREAT | os.O_RDWR), 3)",
]  # fmt: skip


@isolated
@pytest.mark.parametrize("program", NEVER)
def test_program_that_stops_early_does_not_pass(program):
    result = sandbox.run(program, "assert False", seconds=20)
    assert not result.ok and result.reason


@isolated
@pytest.mark.parametrize(
    "program",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "import os; os.close(4)", "if 0:", "x = '''", "x = 1 + \\"],
)
def test_passing_requires_that_tests_run(program):
    assert not run(program, "''''''; assert True").ok and run("", "''''''; assert True").ok


@isolated
def test_nonce_is_not_visible_to_the_program():
    assert not printed(
        """
        import gc, sys
        def of_its_size(things):
            return [x for x in things if isinstance(x, bytes) and len(x) == 16]
        frame = sys._getframe()
        while frame:
            for x in of_its_size([*frame.f_locals.values(), *frame.f_globals.values()]): print("frame", x)
            frame = frame.f_back
        for thing in gc.get_objects():
            if isinstance(thing, (dict, list, tuple, set)):
                values = list(thing.values()) if isinstance(thing, dict) else list(thing)
                for x in of_its_size(values): print("object", x)
        """
    )


@isolated
def test_results_are_deterministic():
    assert len({printed("print(hash('a'), list({'x', 'y', 'z', 'w'}))") for _ in range(3)}) == 1


@isolated
def test_parallel_programs():
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: printed(f"print({i})", seconds=60), range(16)))
    assert results == [str(i) for i in range(16)]


# Limits


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        "for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(600)",
        "import os, time; os.close(0); os.close(1); os.close(2); time.sleep(600)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "input_ = open(0).read(); assert not input_\nwhile True: print('x' * 9999)",
    ],
)
def test_time_limit(program, name):
    start = time.monotonic()
    result = run(called(name) + program, seconds=0.5)
    assert not result.ok and result.reason == "not done in 0.5 s"
    assert 0.5 <= time.monotonic() - start < 8 and not processes(name)


@isolated
def test_cpu_time_limit():
    """It is longer than the wall-clock limit, so that only programs with several threads reach it."""
    assert printed("import resource; print(resource.getrlimit(resource.RLIMIT_CPU))", seconds=7) == "(8, 8)"


@isolated
def test_process_limit_against_fork_bombs(name):
    n = printed(
        """
        import os, time
        n = 1
        try:
            while True:
                if not os.fork():
                    time.sleep(600)
                n += 1
        except BlockingIOError:
            print(n)
        """
    )
    assert 2 <= int(n) <= sandbox.PROCESSES
    start = time.monotonic()
    run(called(name) + "while True:\n    try: os.fork()\n    except OSError: pass", seconds=1)
    assert time.monotonic() - start < 8 and not processes(name)
    assert subprocess.run(["true"]).returncode == 0  # the host can still fork


@isolated
def test_threads_count_as_processes():
    n = printed(
        """
        import threading, time
        n = 0
        try:
            while True:
                threading.Thread(target=time.sleep, args=[600], daemon=True).start()
                n += 1
        except RuntimeError:
            print(n)
        """
    )
    assert int(n) <= sandbox.PROCESSES


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(1 << 40)",
        "x = []\nwhile True: x.append(b'x' * (1 << 24))",
        "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(99)]",
    ],
)
def test_memory_limit(program):
    result = run(program, seconds=20, memory_mb=200)
    assert not result.ok and ("MemoryError" in result.output or "Cannot allocate" in result.output)
    assert printed("x = bytearray(100 << 20); print(len(x))", memory_mb=200) == str(100 << 20)


@isolated
@pytest.mark.parametrize("size", [1 << 22, 1 << 12])
def test_file_limits(size):
    made = printed(
        f"""
        import errno, os
        n = 0
        try:
            while True:
                with open(f"/tmp/{{n}}", "wb") as file: file.write(bytes({size}))
                n += 1
        except OSError as error:
            assert error.errno == errno.ENOSPC
        print(sum(os.stat(x).st_size for x in os.listdir()), len(os.listdir()))
        """
    )
    total, n = map(int, made.split())
    assert total <= sandbox.FILES_MB << 20 and n <= 1024
    assert printed("import os; print(os.listdir('/tmp'))") == "[]"  # every program has its own /tmp


@isolated
def test_limits_of_open_files_queues_and_core_dumps():
    assert "Too many open files" in run("x = [open('/tests.py') for _ in range(100)]").output
    output = printed("import resource as r\nprint(*[r.getrlimit(k) for k in (r.RLIMIT_CORE, r.RLIMIT_MSGQUEUE)])")
    assert output in ("(1, 1) (0, 0)", "(0, 0) (0, 0)")  # the caller's limit of core dumps may be 0


@isolated
def test_lower_limits_of_the_caller_are_kept():
    code = "from nanopause import sandbox\nprint(sandbox.run('import resource as r; print(r.getrlimit(r.RLIMIT_CORE), "
    code += "r.getrlimit(r.RLIMIT_NOFILE))').output)"
    lower = f'ulimit -c 0; ulimit -n 32; exec {sys.executable} -c "$0"'
    ended = subprocess.run(["sh", "-c", lower, code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.stdout.strip() == "(0, 0) (32, 32)"


@isolated
def test_output_is_capped_while_it_is_read():
    code = """
import resource
from nanopause import sandbox
result = sandbox.run("import os\\nwhile True: os.write(1, b'x' * (1 << 20))", seconds=1.5)
print(len(result.output), set(result.output), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    length, letters, kilobytes = ended.stdout.split()
    assert (int(length), letters) == (sandbox.OUTPUT_BYTES, "{'x'}") and int(kilobytes) < 100_000
    assert run("import sys\nsys.stdout.buffer.write(b'\\xff' * 9)").output == "�" * 9
    assert printed("print('a' * 70000)") == "a" * sandbox.OUTPUT_BYTES


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "def f(): f()\nf()",
        "import sys; sys.setrecursionlimit(10 ** 9)\ndef f(): f()\nf()",  # fills the memory from Python 3.11 on
        "import sys; sys.setrecursionlimit(10 ** 9)\nx = []\nfor _ in range(10 ** 5): x = [x]\nrepr(x)",
        "import ctypes; ctypes.string_at(0)",
        "import os; os.abort()",
    ],
)
def test_crashing_program(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(program, seconds=3, memory_mb=100)
    assert result.reason.startswith(("killed by SIG", "exit status 1", "not done"))
    assert not list(tmp_path.iterdir())  # no core dump


# Files and secrets


@isolated
def test_root_contains_only_python(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    home = os.path.expanduser("~")
    paths = [str(secret), home + "/.ssh", home + "/.cache", "/etc/passwd", "/etc/hostname", "/proc/self", "/proc/1"]
    paths += ["/sys/kernel", "/dev/null", "/run", "/var", "/usr/bin/env", "/bin/sh", str(ROOT / "README.md")]
    seen = printed(f"import os\nprint([x for x in {paths} if os.path.lexists(x)])")
    assert seen == "[]"
    top = set(printed("import os; print(*os.listdir('/'))").split())
    prefix = Path(os.path.realpath(sys.executable)).parts[1]
    assert top <= {"program.py", "tests.py", "tmp", "lib", "lib64", "usr", "nix", "etc", prefix}
    assert printed("import glob; print(glob.glob('/etc/*'))") in ("['/etc/ld.so.cache']", "[]")
    assert "ModuleNotFoundError" in run("import sys, glob\nsys.path += glob.glob(sys.prefix + '/lib/*/site-packages')\n"
                                        "import pip").output  # fmt: skip


@isolated
def test_only_tmp_is_writable(tmp_path):
    library = os.path.dirname(os.__file__)
    paths = ["/", "/usr", "/usr/lib", "/lib", "/etc", "/dev", "/home", "/root", "/nix", "/proc", "/tmp/..", library]
    program = C + textwrap.dedent(
        f"""
        import os, sys
        for path in {paths}:
            for attempt in (lambda: open(path + "/np", "w"), lambda: os.makedirs(path + "/np/np"),
                            lambda: os.chmod(path, 0o777), lambda: os.utime(path), lambda: os.rmdir(path)):
                try: attempt(); print(path)
                except OSError: pass
        RDONLY, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
        for path in ("/", "/usr/lib", os.__file__, sys.executable, "/program.py"):
            assert os.statvfs(path).f_flag & 7 == RDONLY | NOSUID | NODEV, path
        assert os.statvfs("/tmp").f_flag & 15 == NOSUID | NODEV | NOEXEC
        for path in (os.__file__, sys.executable, "/program.py", "/tests.py"):
            for attempt in (lambda: open(path, "a"), lambda: os.unlink(path), lambda: os.link(path, "/tmp/x"),
                            lambda: os.utime(path)):
                try: attempt(); print(path)
                except OSError: pass
        try: os.makedirs({str(tmp_path)!r}); open({str(tmp_path / "np")!r}, "w")
        except OSError: pass
        print(called("mount", b"none", b"/", b"", 32 | 4096, b""), called("mount", b"none", b"/tmp", b"tmpfs", 0, b""),
              called("umount2", b"/tmp", 2), called("umount2", b"/usr/lib", 2))
        """
    )
    before = {path: os.stat(path).st_mtime_ns for path in [library, os.__file__]}
    assert printed(program) == "EPERM EPERM EPERM EPERM"
    assert not list(tmp_path.iterdir()) and before == {path: os.stat(path).st_mtime_ns for path in before}


@isolated
def test_binaries_in_tmp_cannot_be_executed():
    result = run("""
        import os, shutil, sys
        shutil.copyfile(sys.executable, "x")
        os.chmod("x", 0o755)
        os.execv("./x", ["x", "-c", "print('ran')"])
        """)
    assert "PermissionError" in result.output and "ran" not in result.output.splitlines()


@isolated
def test_environment_arguments_and_open_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of the host")
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    with open(secret) as file:
        os.set_inheritable(file.fileno(), True)
        output = printed(
            """
            import os, sys
            print(dict(os.environ), sys.orig_argv, sys.argv, os.getcwd())
            for fd in range(3, 64):
                try: os.fstat(fd); print("open", fd)
                except OSError: pass
            assert os.read(0, 9) == b""
            """
        )
    assert "of the host" not in output and "HF_TOKEN" not in output and str(ROOT) not in output
    assert [int(line.split()[1]) for line in output.splitlines()[-2:]] == [sandbox.NONCE_FD, sandbox.VERDICT_FD]
    assert output.count("\nopen") == 2


# Network


@isolated
def test_network(tmp_path):
    path, abstract = str(tmp_path / "socket"), f"\0np{os.urandom(5).hex()}"
    servers = [socket.create_server(("127.0.0.1", 0)), *(socket.socket(socket.AF_UNIX) for _ in range(2))]
    try:
        for server, where in zip(servers[1:], (path, abstract)):
            server.bind(where)
            server.listen()
        port = servers[0].getsockname()[1]
        code = f"""
import errno, socket
def tried(family, where, kind=socket.SOCK_STREAM):
    try:
        with socket.socket(family, kind) as s:
            s.settimeout(2)
            s.connect(where)
            return "connected"
    except OSError as error:
        return "no"
print(tried(socket.AF_INET, ("127.0.0.1", {port})), tried(socket.AF_UNIX, {path!r}),
      tried(socket.AF_UNIX, {abstract!r}), tried(socket.AF_INET, ("8.8.8.8", 53), socket.SOCK_DGRAM))
"""
        here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.split()
        assert here[:3] == ["connected"] * 3  # the attack works outside the sandbox
        for server in servers:
            server.accept()[0].close()
            server.settimeout(0)
        assert printed(code, seconds=20).split() == ["no"] * 4
        for server in servers:
            with pytest.raises(BlockingIOError):
                server.accept()
    finally:
        for server in servers:
            server.close()


@isolated
def test_network_namespace_is_separate():
    """Checked with a socketpair, which the system-call filter allows."""
    flags = printed(
        """
        import fcntl, socket, struct
        a, b = socket.socketpair()
        SIOCGIFFLAGS, SIOCGIFNAME = 0x8913, 0x8910
        print(struct.unpack("16sH14x", fcntl.ioctl(a, SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0)))[1] & 1)
        """
    )
    assert flags == "0"  # lo is down


# Processes


@isolated
def test_other_processes_cannot_be_killed():
    victim = subprocess.Popen(["sleep", "60"])
    try:
        output = printed(
            f"""
            import os, signal
            outside = {os.getpid()}, {os.getppid()}, {os.getpgrp()}, {victim.pid}
            for pid in (0, -1, os.getppid(), os.getpgrp(), *range(2, 400), *outside, *(-x for x in outside)):
                for number in (signal.SIGTERM, signal.SIGKILL):
                    try: os.kill(pid, number)
                    except OSError: pass
            print(os.getpid(), os.getppid())
            """
        )
        assert output == "1 0" and victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


DAEMON = """
if os.fork() == 0:
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        for fd in range(5):
            os.close(fd)
        time.sleep(600)
    os._exit(0)
time.sleep(0.2)
"""


@isolated
@pytest.mark.parametrize("end", ["", "os._exit(0)", "1 / 0", "time.sleep(600)"])
def test_no_daemon_survives(end, name):
    start = time.monotonic()
    result = run(called(name) + DAEMON + end, seconds=1)
    assert result.ok is (end == "") and not processes(name) and time.monotonic() - start < 8


@isolated
def test_ptrace_of_other_processes_is_denied(name):
    seen = printed(
        C
        + f"""
import os, time
child = os.fork()
if not child:
    time.sleep(600)
print(*[called("ptrace", request, pid, 0, 0) for request in (16, 0x4206) for pid in (child, 1, {os.getpid()})])
"""
    )
    assert set(seen.split()) == {"EPERM"}


# Privileges


@isolated
def test_kernel_status_of_a_running_program(name):
    """Namespaces, user, groups, capabilities and filter in /proc."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run, called(name) + "time.sleep(1.5)", seconds=20)
        pid = wait_for(lambda: processes(name))[0]
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        others = [kind for kind in ("user", "mnt", "pid", "net", "ipc", "uts")
                  if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")]  # fmt: skip
        groups, session = status["Groups"].split(), os.getsid(pid)
        assert future.result().ok
    assert others == ["user", "mnt", "pid", "net", "ipc", "uts"] and session == pid
    user = sandbox.NOBODY if os.geteuid() == 0 else os.geteuid()
    assert {*map(int, status["Uid"].split())} == {user}
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}
    assert status["NoNewPrivs"] == "1" and (os.geteuid() != 0 or not groups)
    assert status["Seccomp"] == "2"


@isolated
def test_capabilities_cannot_be_regained():
    attempts = [("unshare", 0x10000000), ("unshare", 0x10020000), ("unshare", 0x40000000), ("chroot", b"/tmp"),
                ("sethostname", b"x", 1), ("setgroups", 0, None), ("nice", -5)]  # fmt: skip
    output = printed(C + f"print(*[called(*attempt) for attempt in {attempts}])")
    assert output.split() == ["EPERM"] * len(attempts)
    for user in ("setuid(0)", "setgid(0)", "setuid(1)", "setresuid(0, 0, 0)"):  # EINVAL if the id is not mapped
        assert run(f"import os; os.{user}").output.splitlines()[-1].partition(":")[0] in ("PermissionError", "OSError")


@isolated
def test_system_calls():
    denied = sandbox.DENIED[platform.machine()][1]
    output = printed(C + f"print(*[called('syscall', n, 0, 0, 0, 0, 0) for n in {denied}])")
    assert output.split() == ["EPERM"] * len(denied)
    for call in ("os.memfd_create('x')", "socket.socket()", "socket.socket(socket.AF_VSOCK)"):
        assert "PermissionError" in run(f"import os, socket\n{call}").output
    if platform.machine() == "x86_64":
        assert printed(C + "print(called('syscall', 0x40000000 | 39))") == "EPERM"  # getpid with its x32 number
        code = bytes.fromhex("b814000000cd80c3")  # mov eax, 20; int 0x80; ret: getpid in 32-bit x86
        result = run(
            f"""
            import ctypes, mmap
            memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
            memory.write({code})
            ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
            """
        )
        assert result.reason in ("killed by SIGSYS", "killed by SIGSEGV")  # SIGSEGV: kernels without 32-bit calls


# When the caller or the supervisor is killed


@isolated
@pytest.mark.parametrize("victim", ["caller", "supervisor"])
def test_program_ends_with_its_caller_and_supervisor(victim, name):
    code = f"from nanopause import sandbox\nsandbox.run({called(name) + DAEMON + 'time.sleep(600)'!r}, seconds=600)"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        pids = wait_for(lambda: len(found := processes(name)) >= 2 and found, 30)
        first = next(pid for pid in pids if os.getsid(pid) == pid and f"NStgid:\t{pid}\t1\n" in
                     Path(f"/proc/{pid}/status").read_text())  # fmt: skip
        supervisor = int(Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill({"caller": caller.pid, "supervisor": supervisor}[victim], signal.SIGKILL)
        wait_for(lambda: not processes(name))
        stderr = caller.communicate(timeout=30)[1]
        assert victim == "caller" or "the supervisor ended" in stderr
        wait_for(lambda: not Path(f"/proc/{supervisor}").exists())
    finally:
        caller.kill()
        caller.wait()


# Systems without the protections


@isolated
def test_system_without_user_namespaces_is_refused():
    code = """
from pathlib import Path
from nanopause import sandbox
from nanopause.errors import run
from nanopause.tasks import get_task
sandbox._call("unshare", 0x10000000)
Path("/proc/sys/user/max_user_namespaces").write_text("0")
run(lambda: get_task("mbpp").permitted(True))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "Permission" in ended.stderr or "Read-only" in ended.stderr:
        pytest.skip("this system does not let a namespace forbid others")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: code that a model wrote cannot be isolated here (unshare: No space left")


@pytest.fixture
def fresh():
    sandbox.unavailable.cache_clear()
    yield
    sandbox.unavailable.cache_clear()


@pytest.mark.parametrize("platform, machine, reason", [
    ("darwin", "arm64", "Darwin has no namespaces"),
    ("linux", "riscv64", "there is no system-call filter for riscv64"),
])  # fmt: skip
def test_other_systems_are_refused(fresh, monkeypatch, platform, machine, reason):
    monkeypatch.setattr(sandbox.sys, "platform", platform)
    monkeypatch.setattr(sandbox.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(sandbox.platform, "machine", lambda: machine)
    with pytest.raises(UserError, match=rf"cannot be isolated here \({reason}\): use Linux") as error:
        sandbox.run("")
    assert "\n" not in str(error.value)


# MBPP


def test_code_runs_only_if_allowed(monkeypatch):
    monkeypatch.setattr(sandbox, "_supervised", lambda *request: pytest.fail("it ran"))
    example = Example("", "\nx = 1", ("x = 1",), tests="assert x == 1")
    message = "^mbpp runs code that a model wrote: allow it by --allow_code_execution$"
    with pytest.raises(UserError, match=message):
        TASKS["mbpp"].permitted(False)
    with pytest.raises(UserError, match=message):
        TASKS["mbpp"].score("x = 1", example)
    for task in TASKS.values():
        if task.name != "mbpp":
            assert task.permitted(False) is task.permitted(True) is task


@isolated
def test_mbpp_scores():
    task = TASKS["mbpp"].permitted(True)
    row = {"text": "Write a function to add.", "code": "def add(a, b):\r\n\treturn a + b  \r\n", "task_id": 11,
           "test_setup_code": "", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}  # fmt: skip
    (example,) = task.examples(row)
    answers = {
        "\ndef add(a, b):\n\treturn a + b": 1,
        " def add(a, b):\n\treturn b + a\n[DONE]\nassert False": 1,
        "def add(a, b):\n\treturn a - b": 0,  # passes one of the tests
        "def sub(a, b):\n\treturn a + b": 0,
        "def add(a, b) return a + b": 0,
        "import sys\ndef add(a, b):\n\tsys.exit(0)": 0,
        "": 0,
    }
    for answer, score in answers.items():
        assert task.score(task.read(answer), example) == {"pass@1": score}, answer


@isolated
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data in {REAL}; NANOPAUSE_DATA names another folder")
def test_real_mbpp_programs():
    """References pass their own tests and fail those of another problem."""
    task = TASKS["mbpp"].permitted(True)
    some = [e for split in ("train", "validation", "test") for e in load(task, split, REAL)[0]][::80]
    with_setup = next(e for e in load(task, "test", REAL)[0] if "root1 = Node(1)" in e.tests)
    with ThreadPoolExecutor(2) as pool:
        assert all(score["pass@1"] for score in pool.map(lambda e: task.score(e.references[0], e), [*some, with_setup]))
        wrong = [(e.references[0], other) for e, other in zip(some[:8], some[1:])]
        assert not any(score["pass@1"] for score in pool.map(lambda pair: task.score(*pair), wrong))


def test_pass_at_k():
    assert pass_at_k(1, 1, 1) == 1 and pass_at_k(1, 0, 1) == 0
    assert pass_at_k(5, 2, 1) == 0.4
    assert pass_at_k(5, 2, 2) == 0.7  # 1 − C(3, 2) / C(5, 2)
    assert pass_at_k(5, 2, 4) == 1  # only three fail
    assert pass_at_k(200, 1, 100) == 0.5
    assert pass_at_k(10, 0, 10) == 0 and pass_at_k(10, 10, 1) == 1
    passed = [True, True, False, False, False, False]
    for k in range(1, 7):
        subsets = [any(some) for some in combinations(passed, k)]
        assert pass_at_k(6, 2, k) == pytest.approx(sum(subsets) / len(subsets))
    for n, c, k in ((5, 6, 1), (5, -1, 1), (5, 1, 6), (5, 1, 0)):
        with pytest.raises(ValueError, match="1 <= k <= n"):
            pass_at_k(n, c, k)
