"""The walls around generated code: namespaces, a file system of its own, limits, a filter of system calls. Linux."""

import contextlib
import ctypes
import os
import platform
import resource
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)

MOUNTS, UTS, IPC, USER, PIDS, NETWORK = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 0x1000, 0x4000, 0x40000, 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, READ_ONLY_NO_SUID = 442, -100, 0x8000, 3
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
CAPABILITIES_VERSION = 0x20080522
MOST_CAPABILITIES = 64
NOBODY = 65534

ROOT = "/proc"
"""Where the new root is put together, unseen by others: a folder that is always there, with no file that code needs.
The sandbox has no /proc of its own: nothing tells of other processes, or changes the kernel."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")

FORBIDDEN = {  # socket, ptrace, add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd, io_uring_setup
    "x86_64": (0xC000003E, (41, 101, 248, 249, 250, 298, 321, 323, 425)),
    "aarch64": (0xC00000B7, (198, 117, 217, 218, 219, 241, 280, 282, 425)),
}
"""Numbers of system calls by architecture, and its own. Sockets of some families (vsock) know no namespaces."""


class RefusedError(Exception):
    """A wall that the kernel does not let this process put up."""


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library.

    Raises:
        RefusedError: It failed.
    """
    if getattr(LIBC, name)(*arguments) == -1:
        raise RefusedError(f"{name}: {os.strerror(ctypes.get_errno())}")


def prctl(option: int, value: int) -> None:
    """Set something of this process.

    Raises:
        RefusedError: It cannot be set.
    """
    call("prctl", option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def unshare() -> None:
    """Leave all namespaces; the next child is the first process of its own.

    Raises:
        RefusedError: The kernel does not permit it.
    """
    call("unshare", USER | MOUNTS | PIDS | NETWORK | IPC | UTS)


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send a signal when the parent has ended."""
    prctl(PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own has ended."""
    prctl(PR_SET_SUBREAPER, 1)


def enter_own_root(paths: Sequence[str], size_bytes: int) -> None:
    """See only `paths`, read-only, and a /tmp of that size, empty but for those of them that lie there.

    Raises:
        RefusedError: The kernel does not permit it.
        OSError: A file system does not.
    """
    Path("/proc/sys/user/max_user_namespaces").write_text("0")  # none below this one, where there would be rights anew
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    Path(ROOT, "tmp").mkdir()  # before what may lie in it
    _mount("tmpfs", f"{ROOT}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={size_bytes},nr_inodes=1000")
    for path in (*paths, *DEVICES):
        if not Path(path).exists():
            continue
        place = Path(ROOT + path)
        if Path(path).is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        _mount(path, str(place), None, MS_BIND | MS_REC)
        _close_for_writing(str(place), AT_RECURSIVE)
    _close_for_writing(ROOT, 0)
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    given = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    try:
        call("mount", *given[:3], ctypes.c_ulong(flags), given[3])
    except RefusedError as error:
        raise RefusedError(f"{error}, at {target.removeprefix(ROOT) or target}") from None


def _close_for_writing(path: str, how: int) -> None:
    attributes = struct.pack("4Q", READ_ONLY_NO_SUID, 0, 0, 0)
    size = ctypes.c_size_t(len(attributes))
    try:
        call("syscall", ctypes.c_long(MOUNT_SETATTR), AT_FDCWD, os.fsencode(path), how, attributes, size)
    except RefusedError as error:
        raise RefusedError(f"mount_setattr, which Linux has from 5.12 on: {error}") from None


def give_up_rights(user: int | None) -> None:
    """Become a user without any right, in a process that no other may look into.

    Args:
        user: id to take; None for the present one.

    Raises:
        RefusedError: The kernel does not permit it.
    """
    for capability in range(MOST_CAPABILITIES):
        LIBC.prctl(PR_CAPBSET_DROP, *map(ctypes.c_ulong, (capability, 0, 0, 0)))  # refused where there is none to drop
    if os.geteuid() == 0:
        with contextlib.suppress(PermissionError):  # in a container whose users cannot leave their groups
            os.setgroups([])
    if user is not None:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    call("capset", struct.pack("Ii", CAPABILITIES_VERSION, 0), bytes(24))
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)


def limit(limits: Mapping[str, int]) -> None:
    """Set limits by their names in `resource`, as far as they are not lower already."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError):  # some kernels do not limit everything
            resource.setrlimit(kind, (most, most))


def forbid_calls() -> None:
    """Have the kernel refuse sockets and a few calls that are of use to break out only.

    Raises:
        RefusedError: The kernel has no filters.
    """
    if platform.machine() not in FORBIDDEN:
        return
    architecture, numbers = FORBIDDEN[platform.machine()]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001  # EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, refuse), (load, 0, 0, 0)]
    for test, number in ((at_least, 0x40000000), *((equal, number) for number in numbers)):
        program += [(test, 0, 1, number), (answer, 0, 0, refuse)]
    program.append((answer, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    head = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code))
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), head)
