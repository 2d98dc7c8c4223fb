"""Model-written Python, run where it can do no harm. Linux 5.12 or newer.

    caller ── supervisor ── program          a process each; a supervisor serves one program

The caller (`run`) starts the supervisor, which is this file as a script. It leaves the caller's namespaces by one
unshare(2), makes the program's root and starts it, watches the clock and the output, and reports. What holds a program:

    files         user and mount namespaces: a read-only root with the interpreter, its library and the system's, and an
                  empty /tmp of 16 MB, nothing in it executable, gone at the end; no home, no /proc, no /dev
    network       a network namespace with no interface up; abstract Unix sockets are the namespace's own
    processes     a PID namespace whose first process the program is. It sees and signals only its own; and when it ends
                  or is killed, the kernel kills all that it left, daemons included, before the supervisor goes on
    privileges    nobody without capabilities, under root the real nobody; no_new_privs; a session of its own; chroot,
                  inside which Linux makes no user namespaces, so no capabilities come back
    limits        wall-clock and CPU time; 4 processes and threads; address space of each, so 4 × memory_mb in all; open
                  files; output, capped while it is read
    secrets       an empty environment; no file open but its pipes; no argument but constants
    system calls  a seccomp filter: none that make sockets, as not every kind knows namespaces (vsock), take memory past
                  the limits (memfd, System V's), look into other processes (ptrace), reach the kernel's keyrings or
                  log, or that Python never needs (bpf, io_uring, …)

Where one of them does not work, nothing runs: limits alone leave a program free to read keys, send them away and stay,
so there is no weaker mode to fall into. Only the filter, the last layer of several, may be missing, on machines other
than x86-64 and ARM64. `protections` says what works. Not held: holes in the kernel, and what its speed says through
caches.

A program passes when it and its tests ran to their end. An exit status does not say that: `sys.exit(0)` and
`os._exit(0)` have a good one. So after the last test the process copies a nonce from one pipe to another, and the
supervisor compares. Until then the nonce is in no object, frame, file, source, argument or environment, so a program
that ends early, prints, or looks around does not pass. Both are compiled before either runs, and each alone, so no open
bracket and no replaced `exec` swallows the tests. That guards against accidents and shortcuts, not against a program
made to cheat: it shares its process with its tests, so it could copy the nonce itself, or, without a trick, return an
object that equals everything.
"""

import ctypes
import functools
import glob
import json
import os
import platform
import select
import signal
import struct
import subprocess
import sys
import time
from typing import NamedTuple

PROCESSES = 4
FILES_MB = 16
OPEN_FILES = 64
OUTPUT_BYTES = 65536
GRACE = 30  # seconds that a supervisor may take beside its program's
NOBODY = 65534

# The caller's side


class Result(NamedTuple):
    """ok: program and tests ran to their end. output: of stdout and stderr, the first 64 KB. reason: why not ok."""

    ok: bool
    output: str
    reason: str


class Protections(NamedTuple):
    """Names of those of the table above that work here, and of the others with the reason. No active one: no run."""

    active: tuple[str, ...]
    missing: dict[str, str]

    def __str__(self) -> str:
        without = [f"{name} ({why})" for name, why in self.missing.items()]
        return f"sandbox: {', '.join(self.active) or 'none'}; missing: {', '.join(without) or 'none'}"


@functools.cache
def protections() -> Protections:
    """Tried once, by running an empty program."""
    names = ("files", "network", "processes", "privileges", "limits", "secrets", "system calls")
    if sys.platform == "linux":
        answer = _supervised("", "", 30.0, 512)
        why = answer.get("refused") or answer["reason"]
    else:
        why = f"{platform.system()} has no namespaces"
    if why:
        return Protections((), dict.fromkeys(names, why))
    if platform.machine() not in DENIED:
        return Protections(names[:-1], {names[-1]: f"no list for {platform.machine()}"})
    return Protections(names, {})


def check() -> None:
    """Raises UserError where a program cannot be isolated."""
    from nanopause.errors import UserError  # not at the top, as the supervisor is a script that knows no nanopause

    found = protections()
    if not found.active:
        raise UserError(
            f"code that a model wrote cannot be isolated here ({found.missing['files']}): take Linux 5.12 or newer "
            f"where you may make user namespaces (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; "
            f"Docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined)"
        )


def run(program: str, tests: str = "", *, seconds: float = 10.0, memory_mb: int = 512) -> Result:
    """Run a program and then its tests in one process, isolated as above. It has the standard library and nothing else,
    and the same hash seed every time.

    seconds: wall-clock time of both. memory_mb: address space of a process in 2^20 bytes, of which Python takes 20.
    Threads may call it at once. Raises UserError where a program cannot be isolated, OSError where the system has no
    more processes, namespaces or memory to give.
    """
    check()
    answer = _supervised(program, tests, seconds, memory_mb)
    if "refused" in answer:
        raise OSError(f"a program could not be isolated ({answer['refused']})")
    return Result(**answer)


def _supervised(program: str, tests: str, seconds: float, memory_mb: int) -> dict:
    request = {"program": program, "tests": tests, "seconds": seconds, "memory_mb": memory_mb}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is the caller's
    ) as supervisor:  # fmt: skip
        answer = json.loads(supervisor.stdout.readline() or '{"refused": "no supervisor"}')
        if "refused" not in answer:
            try:
                _map_users(supervisor.pid)
                supervisor.stdin.write(json.dumps(request).encode() + b"\n")
                supervisor.stdin.flush()  # and stays open, so that the supervisor sees its caller end
            except OSError as error:
                return {"refused": f"{error.filename}: {error.strerror}"}
            answer = json.loads(supervisor.stdout.readline() or '{"refused": "the supervisor ended"}')
    return answer


def _map_users(pid: int) -> None:
    """Who is who in a process's new user namespace. A user is nobody in it; root is root to set it up, then nobody."""
    root = os.geteuid() == 0

    def users(outside: int) -> str:
        return f"0 0 1\n{NOBODY} {NOBODY} 1" if root else f"{NOBODY} {outside} 1"

    lines = {"setgroups": "allow" if root else "deny", "uid_map": users(os.geteuid()), "gid_map": users(os.getegid())}
    for name, text in lines.items():
        with open(f"/proc/{pid}/{name}", "w") as file:
            try:
                file.write(text)
                file.flush()
            except OSError as error:
                raise OSError(error.errno, error.strerror, name) from None


# The supervisor's side

CLONE_FLAGS = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # user mnt pid net ipc uts
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC = 2, 4, 8, 4096, 16384
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NOSUID_NODEV = 442, -100, 0x8000, 1 | 2 | 4
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
ROOT = "/proc"  # where the program's root is mounted: what exists everywhere and has nothing that Python needs
DENIED = {  # AUDIT_ARCH, and the numbers of socket memfd_create memfd_secret shmget semget msgget
    # ptrace process_vm_readv process_vm_writev add_key request_key keyctl syslog bpf perf_event_open userfaultfd
    # io_uring_setup
    "x86_64": (0xC000003E, [41, 319, 447, 29, 64, 68, 101, 310, 311, 248, 249, 250, 103, 321, 298, 323, 425]),
    "aarch64": (0xC00000B7, [198, 279, 447, 194, 190, 186, 117, 270, 271, 217, 218, 219, 116, 280, 241, 282, 425]),
}
NONCE_FD, VERDICT_FD = 3, 4
RUNNER = f"""
def main():
    import os, sys
    read, write, leave, run = os.read, os.write, os._exit, exec
    codes = [compile(open(file, encoding="utf-8").read(), file, "exec") for file in ("/program.py", "/tests.py")]
    names = {{"__name__": "__main__"}}
    for code in codes:
        run(code, names)
    write({VERDICT_FD}, read({NONCE_FD}, 16))
    try:
        sys.stdout.flush()
    finally:
        leave(0)
main()
"""


def _call(name: str, *arguments) -> None:
    """A function of the C library. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def _supervise() -> None:
    def say(answer: dict) -> None:
        os.write(1, json.dumps(answer).encode() + b"\n")

    os.umask(0o022)
    is_root = os.geteuid() == 0
    try:
        _call("unshare", CLONE_FLAGS)
        say({"ready": True})
        request = json.loads(sys.stdin.buffer.readline() or "null")
        if request is None:
            return  # its caller has gone
        answer = _watched(request, is_root)
    except OSError as error:
        answer = {"refused": f"{error.filename}: {error.strerror}"}
    say(answer)


def _watched(request: dict, is_root: bool) -> dict:
    """Start the program, and the answer when it has ended. Raises OSError: it could not be isolated."""
    signal.alarm(int(request["seconds"]) + GRACE)  # should this process hang; the program dies with it
    nonce = os.urandom(16)
    (nonce_out, nonce_in), (verdict_out, verdict_in), (out, into), (why, because) = (os.pipe() for _ in range(4))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.write(nonce_in, nonce)
    os.close(nonce_in)
    pid = os.fork()
    if not pid:
        try:
            _become(request, is_root, {0: nothing, 1: into, 2: into, NONCE_FD: nonce_out, VERDICT_FD: verdict_in})
        except OSError as error:
            os.write(because, f"{error.filename}: {error.strerror}".encode())
        except BaseException as error:
            os.write(because, repr(error).encode())
        finally:
            os._exit(1)
    for fd in (nonce_out, verdict_in, into, because):
        os.close(fd)
    deadline = time.monotonic() + request["seconds"]
    if refused := os.read(why, 4096):  # closed by exec
        os.waitpid(pid, 0)
        raise OSError(0, refused.decode(), "program")
    for fd in (out, verdict_out):
        os.set_blocking(fd, False)
    ended, output, late = os.pidfd_open(pid), b"", False
    poll = select.poll()
    for fd in (0, out, ended):
        poll.register(fd, select.POLLIN)
    while not late:
        events = dict(poll.poll(max(0, deadline - time.monotonic()) * 1000))
        if out in events:
            chunk = os.read(out, 65536)
            output += chunk[: OUTPUT_BYTES - len(output)]
            if not chunk:
                poll.unregister(out)
        if ended in events:
            break
        late = time.monotonic() >= deadline or 0 in events
    os.kill(pid, signal.SIGKILL)  # and all that it started; not reaped yet, so the PID is still its own
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if 0 in events:  # its caller has gone
        os._exit(1)
    while len(output) < OUTPUT_BYTES and (chunk := _read(out)):
        output += chunk[: OUTPUT_BYTES - len(output)]
    if late:
        reason = f"not done in {request['seconds']:g} s"
    elif status < 0:
        reason = f"killed by {signal.Signals(-status).name}"
    elif _read(verdict_out) != nonce:
        reason = f"exit status {status} before the end of its tests"
    else:
        reason = ""
    return {"ok": not reason, "output": output.decode(errors="replace"), "reason": reason}


def _read(fd: int) -> bytes:
    """What a pipe holds, without waiting."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


def _become(request: dict, is_root: bool, fds: dict[int, int]) -> None:
    """Turn this process, the first of its PID namespace, into the program."""
    import resource

    python = os.readlink("/proc/self/exe")
    os.setsid()
    _make_root(python, {"/program.py": request["program"], "/tests.py": request["tests"]})
    os.chroot(ROOT)
    os.chdir("/tmp")
    if is_root:  # another user is in the namespace as nobody, and loses its capabilities there by exec
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    limits = {
        "AS": request["memory_mb"] << 20,
        "CPU": int(request["seconds"]) + 1,
        "NPROC": PROCESSES + (not is_root),  # the supervisor is of the same user, if that is not root
        "NOFILE": OPEN_FILES,
        "MSGQUEUE": 0,  # bytes
        "CORE": 1,  # byte: 0 keeps none from a core_pattern that is a program, see core(5)
    }
    for name, most in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]  # of the caller, which nothing here may raise
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    moved = {fd: os.dup(source) for fd, source in fds.items()}
    for fd, source in moved.items():
        os.dup2(source, fd)
    arguments = [python, "-B", "-s", "-S", "-c", RUNNER]
    environment = {"HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if platform.machine() in DENIED:
        _filter_calls(*DENIED[platform.machine()])
    os.execve(python, arguments, environment)


def _make_root(python: str, files: dict[str, str]) -> None:
    prefix = os.path.dirname(os.path.dirname(python))
    paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache", python]
    _mount("none", ROOT, "tmpfs", 0, "size=64m,mode=755")
    for path in filter(os.path.exists, [*paths, f"{prefix}/lib", f"{prefix}/lib64"]):
        inside = ROOT + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            if not os.path.lexists(inside):
                os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        elif not os.path.exists(inside):
            open(inside, "x").close()
        _mount(path, inside, "", MS_BIND | MS_REC)
    for packages in glob.glob(f"{ROOT}{prefix}/lib*/python*/*-packages"):
        _mount("none", packages, "tmpfs", 0)
    for path, text in files.items():
        with open(ROOT + path, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(text)
    os.mkdir(ROOT + "/tmp")
    attributes = struct.pack("4Q", READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    _call("syscall", MOUNT_SETATTR, AT_FDCWD, ROOT.encode(), AT_RECURSIVE, attributes, ctypes.c_long(len(attributes)))
    options = f"size={FILES_MB}m,nr_inodes=1k,mode=1777"
    _mount("none", ROOT + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)


def _filter_calls(architecture: int, numbers: list[int]) -> None:
    """A classic BPF program: calls of another architecture kill, those of the list get EPERM."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    n = len(numbers)
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill)]
    steps += [(load, 0, 0, 0), (at_least, n + 1, 0, 0x40000000)]  # x86-64's second table of calls, x32
    steps += [(equal, n - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HP", len(steps), ctypes.addressof(code)))


if __name__ == "__main__":
    _supervise()
