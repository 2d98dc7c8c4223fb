"""Sandbox for model-written Python. Linux 5.12 or newer on x86-64 or ARM64.

    caller ── supervisor ── program          one process each; a supervisor serves one program

The caller (`run`) starts the supervisor, which is this file as a script. The supervisor leaves the caller's namespaces
by one unshare(2), creates the program's root, starts the program, enforces the limits on time and output, and reports
the result. Protections:

    files         user and mount namespaces: a read-only root with the interpreter, its library and the system's
                  libraries, and an empty noexec /tmp of 16 MB that is discarded at the end; no home, no /proc, no /dev
    network       a network namespace with no interface up; abstract Unix sockets are local to the namespace
    processes     a PID namespace with the program as its first process. When it ends, the kernel kills all remaining
                  ones, daemons included, before the supervisor continues
    privileges    user nobody without capabilities, the host's nobody under root; no_new_privs; a separate session;
                  chroot, within which Linux refuses new user namespaces, so capabilities cannot be regained
    limits        wall-clock and CPU time; 4 processes and threads; address space of each, so 4 × memory_mb in total;
                  open files; output, capped while it is read
    secrets       an empty environment; no open files except its pipes; constant arguments only
    system calls  a seccomp filter. Denied: sockets, as some kinds ignore namespaces (vsock); memory outside the limits
                  (memfd, System V's); access to other processes (ptrace); the kernel's keyrings and log; calls that
                  Python never needs (bpf, io_uring, …)

If one of them does not work, nothing runs: with limits alone a program could read keys, send them away and stay
running. Not protected against: kernel bugs and cache side channels.

A program passes if it and its tests run to their end. The exit status does not show that: `sys.exit(0)` and
`os._exit(0)` return 0 too. Therefore, after the last test, the process copies a nonce from one pipe to another, and the
supervisor compares it. Until then the nonce is in no object, frame, file, source, argument or environment variable.
Program and tests are compiled separately before either runs, so neither an open bracket nor a replaced `exec` can skip
the tests. This guards against accidents and shortcuts, not against a program written to cheat: it shares its process
with its tests, so it could copy the nonce itself, or simply return an object that equals everything.
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
GRACE = 30  # seconds that a supervisor may take in addition to its program
NOBODY = 65534  # user and group id

# The caller's side


class Result(NamedTuple):
    """ok: program and tests ran to their end. output: stdout and stderr, the first 64 KB. reason: why not ok, or ""."""

    ok: bool
    output: str
    reason: str


@functools.cache
def unavailable() -> str:
    """Why programs cannot be isolated on this machine, tested once by running an empty program; "" if they can."""
    if sys.platform != "linux":
        return f"{platform.system()} has no namespaces"
    if platform.machine() not in DENIED:
        return f"there is no system-call filter for {platform.machine()}"
    result = _supervised("", "", 30.0, 512)
    return result.get("refused") or result["reason"]


def check() -> None:
    """Raises UserError if programs cannot be isolated on this machine."""
    from nanopause.errors import UserError  # not at the top: the supervisor runs this file without nanopause

    if reason := unavailable():
        raise UserError(
            f"code that a model wrote cannot be isolated here ({reason}): use Linux 5.12 or newer with user namespaces "
            f"allowed (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; "
            f"Docker: --security-opt seccomp=unconfined --security-opt apparmor=unconfined)"
        )


def run(program: str, tests: str = "", *, seconds: float = 10.0, memory_mb: int = 512) -> Result:
    """Run a program and then its tests in one isolated process, with the standard library only and a fixed hash seed.

    seconds: wall-clock limit of both together. memory_mb: address space per process in 2^20 bytes, of which Python
    takes 20. Thread-safe. Raises UserError if programs cannot be isolated on this machine, OSError if the system is out
    of processes, namespaces or memory.
    """
    check()
    result = _supervised(program, tests, seconds, memory_mb)
    if "refused" in result:
        raise OSError(f"a program could not be isolated ({result['refused']})")
    return Result(**result)


def _supervised(program: str, tests: str, seconds: float, memory_mb: int) -> dict:
    """The supervisor's result: the fields of Result, or {"refused": why the program was not isolated and not run}."""
    request = {"program": program, "tests": tests, "seconds": seconds, "memory_mb": memory_mb}
    with subprocess.Popen(
        [sys.executable, "-I", "-S", os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,  # only the caller receives Ctrl-C
    ) as supervisor:  # fmt: skip
        result = json.loads(supervisor.stdout.readline() or '{"refused": "no supervisor"}')
        if "refused" not in result:
            try:
                _map_users(supervisor.pid)
                supervisor.stdin.write(json.dumps(request).encode() + b"\n")
                supervisor.stdin.flush()  # not closed: its end shows the supervisor that the caller has ended
            except OSError as error:
                return {"refused": f"{error.filename}: {error.strerror}"}
            result = json.loads(supervisor.stdout.readline() or '{"refused": "the supervisor ended"}')
    return result


def _map_users(pid: int) -> None:
    """Write the id maps of a process's new user namespace. An ordinary user becomes nobody in it; root stays root for
    the setup and becomes nobody afterwards."""
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
ROOT = "/proc"  # mount point of the program's root: it exists everywhere and holds nothing that Python needs
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
    """Call a function of the C library. Raises OSError on failure."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    _call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())


def _supervise() -> None:
    """Main function of the supervisor: request on stdin, result on stdout, each a line of JSON."""
    os.umask(0o022)
    is_root = os.geteuid() == 0
    try:
        _call("unshare", CLONE_FLAGS)
        print(json.dumps({"ready": True}), flush=True)
        if not (line := sys.stdin.buffer.readline()):
            return  # the caller has ended
        result = _run_program(json.loads(line), is_root)
    except OSError as error:
        result = {"refused": f"{error.filename}: {error.strerror}"}
    print(json.dumps(result), flush=True)


def _run_program(request: dict, is_root: bool) -> dict:
    """Run the program and return the fields of Result. Raises OSError if it could not be isolated."""
    signal.alarm(int(request["seconds"]) + GRACE)  # in case this process hangs; the program dies with it
    nonce = os.urandom(16)
    nonce_out, nonce_in = os.pipe()
    verdict_out, verdict_in = os.pipe()
    program_out, program_in = os.pipe()
    error_out, error_in = os.pipe()
    null = os.open(os.devnull, os.O_RDONLY)
    os.write(nonce_in, nonce)
    os.close(nonce_in)
    pid = os.fork()
    if not pid:
        fds = {0: null, 1: program_in, 2: program_in, NONCE_FD: nonce_out, VERDICT_FD: verdict_in}
        try:
            _become(request, is_root, fds)
        except OSError as error:
            os.write(error_in, f"{error.filename}: {error.strerror}".encode())
        except BaseException as error:
            os.write(error_in, repr(error).encode())
        finally:
            os._exit(1)
    for fd in (nonce_out, verdict_in, program_in, error_in):
        os.close(fd)
    deadline = time.monotonic() + request["seconds"]
    if refused := os.read(error_out, 4096):  # empty once exec has closed the other end
        os.waitpid(pid, 0)
        raise OSError(0, refused.decode(), "program")
    for fd in (program_out, verdict_out):
        os.set_blocking(fd, False)
    ended = os.pidfd_open(pid)
    output = b""
    is_late = False
    poll = select.poll()
    for fd in (0, program_out, ended):
        poll.register(fd, select.POLLIN)
    while not is_late:
        events = dict(poll.poll(max(0, deadline - time.monotonic()) * 1000))
        if program_out in events:
            chunk = os.read(program_out, 65536)
            output += chunk[: OUTPUT_BYTES - len(output)]
            if not chunk:
                poll.unregister(program_out)
        if ended in events:
            break
        is_late = time.monotonic() >= deadline or 0 in events
    os.kill(pid, signal.SIGKILL)  # with all its descendants; the PID cannot be reused before waitpid
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if 0 in events:  # the caller has ended
        os._exit(1)
    while len(output) < OUTPUT_BYTES and (chunk := _read(program_out)):
        output += chunk[: OUTPUT_BYTES - len(output)]
    if is_late:
        reason = f"not done in {request['seconds']:g} s"
    elif status < 0:
        reason = f"killed by {signal.Signals(-status).name}"
    elif _read(verdict_out) != nonce:
        reason = f"exit status {status} before the end of its tests"
    else:
        reason = ""
    return {"ok": not reason, "output": output.decode(errors="replace"), "reason": reason}


def _read(fd: int) -> bytes:
    """Up to 64 KiB from a non-blocking pipe; empty if there is nothing to read."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


def _become(request: dict, is_root: bool, fds: dict[int, int]) -> None:
    """Turn this process, the first of its PID namespace, into the program. Does not return.

    fds: file descriptors of the program and the ones they are copied from."""
    import resource

    python = os.readlink("/proc/self/exe")
    os.setsid()
    _make_root(python, {"/program.py": request["program"], "/tests.py": request["tests"]})
    os.chroot(ROOT)
    os.chdir("/tmp")
    if is_root:  # an ordinary user already is nobody in the namespace, and exec drops the capabilities
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    limits = {
        "AS": request["memory_mb"] << 20,
        "CPU": int(request["seconds"]) + 1,
        "NPROC": PROCESSES + (not is_root),  # without root the supervisor has the same user and is counted
        "NOFILE": OPEN_FILES,
        "MSGQUEUE": 0,  # bytes
        "CORE": 1,  # byte; 0 would not stop a core_pattern that pipes to a program, see core(5)
    }
    for name, most in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]  # the caller's hard limit, which cannot be raised
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (most, most))
    moved = {fd: os.dup(source) for fd, source in fds.items()}
    for fd, source in moved.items():
        os.dup2(source, fd)
    arguments = [python, "-B", "-s", "-S", "-c", RUNNER]
    environment = {"HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _filter_calls(*DENIED[platform.machine()])
    os.execve(python, arguments, environment)


def _make_root(python: str, files: dict[str, str]) -> None:
    """Mount the program's read-only root at ROOT. files: paths within it and their texts."""
    prefix = os.path.dirname(os.path.dirname(python))
    paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache", python]
    _mount("none", ROOT, "tmpfs", 0, "size=64m,mode=755")
    for path in filter(os.path.exists, [*paths, f"{prefix}/lib", f"{prefix}/lib64"]):
        target = ROOT + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            if not os.path.lexists(target):
                os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        elif not os.path.exists(target):
            open(target, "x").close()
        _mount(path, target, "", MS_BIND | MS_REC)
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
    """Install a classic BPF program: a system call of another architecture kills the process, the listed ones fail with
    EPERM."""
    load, equal, at_least, ret = 0x20, 0x15, 0x35, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    n = len(numbers)
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (ret, 0, 0, kill)]
    steps += [(load, 0, 0, 0), (at_least, n + 1, 0, 0x40000000)]  # x86-64's second system-call table, x32
    steps += [(equal, n - i, 0, number) for i, number in enumerate(numbers)]
    steps += [(ret, 0, 0, allow), (ret, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, struct.pack("HP", len(steps), ctypes.addressof(code)))


if __name__ == "__main__":
    _supervise()
