"""Keep one server from outliving the process that wanted it.

Runs as a program of its own (`python -I -S guard.py …`) between Sluice and a server: standard input is the *lease*, the
other end of which the parent holds and never writes to. When it ends, because the parent let go or because the kernel
closed it for a parent that was killed, the server is told to stop, and killed when it takes longer than its grace.
Invariants: the server never outlives the guard by more than the kernel needs (Linux) and the guard outlives the server
only until what that left behind has ended; the exit code is the server's, 128 + N when signal N ended it. Standard
library only, no threads.
Who starts a guard and what it is told: `process.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

PARENT_CHECK_S = 1.0  # a forked relative of the parent may hold the lease's other end; then this finds the parent gone
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
LEFT_BEHIND_GRACE_S = 2.0  # Postgres' sessions end themselves when their server was killed, unless busy or paused
LEFT_BEHIND_CHECK_S = 0.05


def main() -> int:
    options = parse_arguments()
    woken = watch_signals()
    adopt_orphans()
    server = start_server(options)
    report_pid(server.pid)
    wait_for_a_reason_to_stop(server, woken, parent_pid=options.parent_pid)
    code = stop(server, stop_signal=options.stop_signal, grace_s=options.grace_s)
    end_what_is_left()
    return code


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--stop-signal", type=int, required=True)
    parser.add_argument("--grace-s", type=float, required=True)
    parser.add_argument("--user", type=int, default=None, help="numeric; only root can ask for it")
    parser.add_argument("--group", type=int, default=None)
    parser.add_argument("--stdin", default=os.devnull, help="a file that the server reads as its standard input")
    parser.add_argument("command", nargs="+")
    return parser.parse_args()


def watch_signals() -> int:
    """Have every signal wake the loop instead of ending us. Answers the descriptor that becomes readable."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: None)  # not SIG_IGN, which the server would inherit
    return reading


def start_server(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    identity = {"user": options.user, "group": options.group, "extra_groups": []} if options.user is not None else {}
    with open(options.stdin, "rb") as standard_input:  # noqa: PTH123  # pathlib costs a third of this program's start
        return subprocess.Popen(  # noqa: S603  # the command is our parent's
            options.command,
            stdin=standard_input,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            cwd="/",
            close_fds=False,  # the data folder's lock goes on to the server: it is held until the last user has gone
            preexec_fn=die_with_me(),  # noqa: PLW1509  # this program has one thread
            **identity,
        )


def die_with_me() -> Callable[[], None]:
    """What the server's process does before it becomes the server: ask to be killed should the guard be killed."""
    if sys.platform != "linux":
        return lambda: None
    import ctypes  # noqa: PLC0415  # where it is not needed it may be missing

    prctl = ctypes.CDLL(None).prctl
    guard_pid = os.getpid()

    def before_exec() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != guard_pid:
            os._exit(125)

    return before_exec


def report_pid(pid: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # then the parent has gone already, which the loop finds out
        os.write(sys.stdout.fileno(), b"%d\n" % pid)
    with open(os.devnull, "wb") as nothing:  # noqa: PTH123  # as above
        os.dup2(nothing.fileno(), sys.stdout.fileno())


def wait_for_a_reason_to_stop(server: subprocess.Popen[bytes], woken: int, *, parent_pid: int) -> None:
    """Return when the server has ended, the lease has, the parent has, or somebody sent SIGTERM."""
    terminated = False
    lease = sys.stdin.fileno()
    while not terminated and server.poll() is None and os.getppid() == parent_pid:
        readable, _, _ = select.select([lease, woken], [], [], PARENT_CHECK_S)
        if lease in readable and not os.read(lease, 1024):
            return
        if woken in readable:
            terminated = signal.SIGTERM in os.read(woken, 1024)


def stop(server: subprocess.Popen[bytes], *, stop_signal: int, grace_s: float) -> int:
    """Ask, wait, insist. Answers the exit code as a shell would give it."""
    if server.poll() is None:
        server.send_signal(stop_signal)
        server.send_signal(signal.SIGCONT)  # a paused server would not hear the first
    deadline = time.monotonic() + grace_s
    try:
        server.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        server.kill()
    code = server.wait()
    return code if code >= 0 else 128 - code


def adopt_orphans() -> None:
    """Become the parent of what the server leaves behind, which else would be nobody's and hold the folder's lock."""
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415  # where it is not needed it may be missing

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_what_is_left() -> None:
    """Wait for the adopted ones to end, and kill those that do not. The server itself has ended."""
    deadline = time.monotonic() + LEFT_BEHIND_GRACE_S
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            if time.monotonic() > deadline:
                kill_children()
            time.sleep(LEFT_BEHIND_CHECK_S)


def kill_children() -> None:
    """All of them by /proc, since we did not start them."""
    for folder in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208  # pathlib costs a third of our start
        with contextlib.suppress(OSError):
            with open(f"/proc/{folder}/stat", "rb") as stat:  # noqa: PTH123  # as above
                parent = int(stat.read().rpartition(b")")[2].split()[1])
            if parent == os.getpid():
                os.kill(int(folder), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
