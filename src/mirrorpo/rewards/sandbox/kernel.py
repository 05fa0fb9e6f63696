"""The kernel's means to lock a process in: system calls by number, Landlock, namespaces, a system call filter.

*Landlock* (``man 7 landlock``): only the given folders stay readable, nothing stays writable; newer kernels also take
away TCP, device controls, abstract sockets and signals to outside. It does not hide that a file exists, nor its size.

*Namespaces*: no network, no other processes, a root with one folder. Root may make them directly and then becomes
nobody; an ordinary user makes a user namespace first. The new root holds Python's standard library, read-only, and
nothing else: no ``/proc``, ``/dev``, ``/home``, ``/tmp``. They are entered here, and by bubblewrap only where the
kernel grants them to it alone: it starts no faster (1.2 s each under load), has to be installed, puts a process more
between the trainer and the template, and leaves root root.

*Filter* (``man 2 seccomp``, classic BPF): a list of what is allowed, so that a call nobody thought of is refused, on
x86_64 and aarch64. Refused are network, new processes and threads, tracing, signals to others, mounting, writing to
files, and every call that a later kernel adds: they fail with EPERM (a program sees ``PermissionError``), a call of
another machine's numbering kills.

Standard library only: the isolated side imports this file as well.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable


def _table(*lines: str) -> dict[str, tuple[int | None, ...]]:
    """Names of system calls with their numbers on both machines; "-" where there is none."""
    words = (word.partition("=") for line in lines for word in line.split())
    return {name: tuple(None if n == "-" else int(n) for n in numbers.split("/")) for name, _, numbers in words}


# What a program may call, as name=x86_64/aarch64.
_ALLOWED = _table(
    # descriptors that are open already
    "read=0/63 write=1/64 readv=19/65 writev=20/66 pread64=17/67 preadv=295/69 close=3/57 close_range=436/436",
    "lseek=8/62 dup=32/23 dup2=33/- dup3=292/24 pipe=22/- pipe2=293/59 eventfd2=290/19 select=23/-",
    "pselect6=270/72 poll=7/- ppoll=271/73 epoll_create=213/- epoll_create1=291/20 epoll_ctl=233/21",
    "epoll_wait=232/- epoll_pwait=281/22 recvfrom=45/207 shutdown=48/210 getsockopt=55/209 getsockname=51/204",
    "getpeername=52/205",
    # files: to look at (opening for writing is refused by a rule below)
    "stat=4/- fstat=5/80 lstat=6/- newfstatat=262/79 statx=332/291 statfs=137/43 fstatfs=138/44 access=21/-",
    "faccessat=269/48 faccessat2=439/439 getcwd=79/17 chdir=80/49 fchdir=81/50 readlink=89/- readlinkat=267/78",
    "getdents=78/- getdents64=217/61 fadvise64=221/223 umask=95/166",
    # memory
    "mmap=9/222 mprotect=10/226 munmap=11/215 mremap=25/216 madvise=28/233 brk=12/214 membarrier=324/283",
    # the process itself
    "rt_sigaction=13/134 rt_sigprocmask=14/135 rt_sigreturn=15/139 rt_sigpending=127/136 rt_sigtimedwait=128/137",
    "rt_sigsuspend=130/133 sigaltstack=131/132 pause=34/- alarm=37/- setitimer=38/103 getitimer=36/102",
    "getpid=39/172 getppid=110/173 gettid=186/178 getuid=102/174 geteuid=107/175 getgid=104/176 getegid=108/177",
    "getresuid=118/148 getresgid=120/150 getgroups=115/158 getpgrp=111/- getpgid=121/155 getsid=124/156",
    "uname=63/160 sysinfo=99/179 getrusage=98/165 getrlimit=97/163 times=100/153 exit=60/93 exit_group=231/94",
    "arch_prctl=158/- set_tid_address=218/96 set_robust_list=273/99 get_robust_list=274/100 rseq=334/293",
    "restart_syscall=219/128 futex=202/98 sched_yield=24/124 sched_getaffinity=204/123 getcpu=309/168",
    # time and chance
    "gettimeofday=96/169 time=201/- clock_gettime=228/113 clock_getres=229/114 nanosleep=35/101",
    "clock_nanosleep=230/115 getrandom=318/278",
)
# Allowed for some arguments only: ``_rules``.
_CONDITIONAL = _table(
    "open=2/- openat=257/56 ioctl=16/29 fcntl=72/25 prlimit64=302/261 kill=62/129 tgkill=234/131",
    "socketpair=53/199 sendto=44/206 clone3=435/435",
)
# Used by the isolated side while it locks itself in.
_SETUP = _table(
    "capset=126/91 pivot_root=155/41 landlock_create_ruleset=444/444 landlock_add_rule=445/445",
    "landlock_restrict_self=446/446",
)
# What the kernel calls the machine in the data of a filter (AUDIT_ARCH_*), and the column of the tables.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}


def machine() -> tuple[int, int] | None:
    """The kernel's constant and the column of this machine; None if it is not in the tables."""
    return _MACHINES.get(platform.machine())


def _number(name: str) -> int:
    """The number of a call of ``_SETUP`` on this machine.

    Raises:
        OSError: the machine is not in the tables.
    """
    found = machine()
    if found is None:
        raise OSError(f"no system call numbers for {platform.machine()}")
    return _SETUP[name][found[1]] or 0


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAP_VERSION_3 = 0x2008_0522
_CLONE = {"mount": 0x0002_0000, "uts": 0x0400_0000, "ipc": 0x0800_0000, "user": 0x1000_0000}
_CLONE |= {"pid": 0x2000_0000, "net": 0x4000_0000}


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int) -> int:
    """``man 2 prctl``."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    return _check(_LIBC.prctl(option, *(ctypes.c_ulong(a) for a in padded)), f"prctl {option}")


def call(name: str, *arguments: object) -> int:
    """A system call of ``_SETUP`` by name."""
    return _check(_LIBC.syscall(ctypes.c_long(_number(name)), *arguments), name)


def unshare(*namespaces: str) -> None:
    """Leaves the given namespaces for new ones."""
    flags = 0
    for name in namespaces:
        flags |= _CLONE[name]
    _check(_LIBC.unshare(ctypes.c_int(flags)), "unshare " + "+".join(namespaces))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """``man 2 mount``."""
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    extra = None if options is None else options.encode()
    _check(_LIBC.mount(*words, ctypes.c_ulong(flags), extra), f"mount {target}")


def detach(target: str) -> None:
    """Unmounts as soon as nobody uses it (MNT_DETACH)."""
    _check(_LIBC.umount2(os.fsencode(target), 2), f"umount {target}")


def die_with_parent() -> None:
    """This process is killed when its parent ends."""
    prctl(_PR_SET_PDEATHSIG, 9)


def forget_privileges() -> None:
    """No capabilities, now or through a later program; not readable by other processes of the user."""
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # not held, or beyond the last one this kernel knows
            continue
    header = (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    prctl(_PR_SET_DUMPABLE, 0)


_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_O_PATH = 0o10000000
_VERSION_FLAG, _RULE_PATH_BENEATH = 1, 1


def landlock_version() -> int:
    """The kernel's Landlock version; 0 without Landlock."""
    try:
        return call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    except OSError:
        return 0


def _handled(abi: int) -> bytes:
    """struct landlock_ruleset_attr: everything that this version can take away."""
    files = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        if abi >= since:
            files |= 1 << bit
    if abi < 4:
        return struct.pack("Q", files)
    network = 0b11
    return struct.pack("QQ", files, network) if abi < 6 else struct.pack("QQQ", files, network, 0b11)


def restrict_files(readable: Iterable[str]) -> int:
    """Takes everything but reading beneath these paths away from this process and its children, for good.

    Returns:
        The Landlock version in force.

    Raises:
        OSError: no Landlock, or the kernel refuses.
    """
    abi = landlock_version()
    if abi < 1:
        raise OSError("this kernel has no Landlock")
    attributes = _handled(abi)
    ruleset = call("landlock_create_ruleset", attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    try:
        for path in readable:
            allowed = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
            beneath = os.open(path, _O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", allowed, beneath)
                call(
                    "landlock_add_rule",
                    ctypes.c_int(ruleset),
                    ctypes.c_int(_RULE_PATH_BENEATH),
                    rule,
                    ctypes.c_uint32(0),
                )
            finally:
                os.close(beneath)
        call("landlock_restrict_self", ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return abi


NOBODY = 65534
_ALL = ("mount", "pid", "net", "ipc", "uts")
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _REC, _PRIVATE = 4096, 16384, 1 << 18
# A mount that came from outside the user namespace keeps these; a remount has to name them again.
_KEPT = (_NOSUID, _NODEV, _NOEXEC, 1024, 2048, 1 << 21)
# The new root is built on top of one of these, in a mount namespace of its own; none is ever a source of a mount.
_STAGES = ("/proc", "/sys", "/mnt")


def standard_library() -> str:
    """The folder of Python's standard library."""
    return os.path.dirname(os.path.realpath(os.__file__))


def library_parts() -> list[str]:
    """What in the standard library's folder belongs to it: everything but installed packages."""
    packages = ("site-packages", "dist-packages")
    with os.scandir(standard_library()) as entries:
        # Distributions leave links in it that lead nowhere.
        return [entry.path for entry in entries if entry.name not in packages and os.path.exists(entry.path)]


def enter_namespaces() -> None:
    """Moves this process into new namespaces; children live in the new process namespace.

    Raises:
        OSError: the kernel, or the container around, refuses; the process must then be thrown away.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        if uid != 0:
            raise PermissionError
        unshare(*_ALL)
    except OSError:
        unshare("user", *_ALL)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _new_root([standard_library()])


def become_nobody() -> bool:
    """Root gives itself up, if the interpreter's files stay readable; True if it did or had nothing to give."""
    if os.geteuid() != 0:
        return True
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    except OSError:  # a user namespace maps one user only, a container may forbid it
        return False
    if not os.access(standard_library(), os.R_OK | os.X_OK, effective_ids=True):
        os.seteuid(0)
        return False
    os.seteuid(0)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    return True


def _new_root(sources: list[str]) -> None:
    mount(None, "/", None, _REC | _PRIVATE)
    stage = next((path for path in _STAGES if os.path.isdir(path)), None)
    if stage is None:
        raise OSError(f"none of {', '.join(_STAGES)} exists")
    mount("tmpfs", stage, "tmpfs", _NOSUID | _NODEV, "size=64k,nr_inodes=64,mode=755")
    for source in sources:
        target = stage + source
        os.makedirs(target)
        mount(source, target, None, _BIND | _REC)
        mount(None, target, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV | _locked_flags(target))
        for name in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{target}/{name}"):
                mount("tmpfs", f"{target}/{name}", "tmpfs", _RDONLY | _NOSUID | _NODEV, "size=4k,mode=755")
    mount(None, stage, None, _BIND | _REMOUNT | _RDONLY | _NOSUID | _NODEV)
    os.chdir(stage)
    call("pivot_root", b".", b".")
    detach(".")
    os.chdir("/")


def _locked_flags(path: str) -> int:
    found = os.statvfs(path).f_flag
    # statvfs uses the same bits as mount for these, except relatime (4096 there).
    flags = sum(flag for flag in _KEPT[:-1] if found & flag)
    return flags | (_KEPT[-1] if found & 4096 else 0)


_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_KILL, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# Where struct seccomp_data keeps the call's number, the machine and the lower half of an argument.
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32_BIT = 0x4000_0000

# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND: the same on both machines. O_TMPFILE includes O_RDWR or O_WRONLY.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no F_SETOWN, which sends signals to others.
_FCNTLS = (0, 1, 2, 3, 4, 1030)
_AF_UNIX = 1

Instruction = tuple[int, int, int, int]


def _statement(code: int, value: int) -> Instruction:
    return code, 0, 0, value


def _argument(index: int) -> Instruction:
    return _statement(_LOAD, _ARGUMENTS_AT + 8 * index)


_YES = _statement(_RETURN, _ALLOW)
_NO = _statement(_RETURN, _ERRNO | errno.EPERM)


def _one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allows the call if the argument's lower half is one of the values."""
    body = [_argument(index)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), _YES]
    return [*body, _NO]


def _rules(pid: int) -> dict[str, list[Instruction]]:
    """What decides about the calls that are allowed for some arguments."""
    return {
        "open": [_argument(1), (_ANY_BIT, 0, 1, _WRITING), _NO, _YES],
        "openat": [_argument(2), (_ANY_BIT, 0, 1, _WRITING), _NO, _YES],
        "ioctl": _one_of(1, _IOCTLS),
        "fcntl": _one_of(1, _FCNTLS),
        "prlimit64": _one_of(0, (0, pid)),
        "kill": _one_of(0, (pid,)),
        "tgkill": _one_of(0, (pid,)),
        "socketpair": _one_of(0, (_AF_UNIX,)),
        # An address to send to means a socket that is not connected: refused.
        "sendto": _one_of(4, (0,)),
        # Its arguments lie in memory, where a filter cannot look; "not there" makes the C library use clone, refused.
        "clone3": [_statement(_RETURN, _ERRNO | errno.ENOSYS)],
    }


def filter_program(pid: int, audit: int, column: int) -> bytes:
    """The filter's instructions.

    Args:
        pid: the process, as it sees itself; signals to it alone are allowed.
        audit: the kernel's constant of the machine.
        column: of the tables above.
    """
    body: list[Instruction] = [
        _statement(_LOAD, _MACHINE_AT),
        (_EQUAL, 1, 0, audit),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER_AT),
        (_GREATER_EQUAL, 0, 1, _X32_BIT),
        _statement(_RETURN, _KILL),
    ]
    for numbers in _ALLOWED.values():
        if numbers[column] is not None:
            body += [(_EQUAL, 0, 1, numbers[column] or 0), _YES]
    for name, rule in _rules(pid).items():
        call = _CONDITIONAL[name][column]
        if call is not None:
            body += [(_EQUAL, 0, len(rule), call), *rule]
    body.append(_NO)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in body)


class _Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def install_filter() -> None:
    """Puts the filter on this process.

    Raises:
        OSError: the kernel refuses, or the machine is neither x86_64 nor aarch64.
    """
    found = machine()
    if found is None:
        raise OSError(errno.ENOSYS, "no system call table for this machine")
    code = filter_program(os.getpid(), *found)
    buffer = ctypes.create_string_buffer(code, len(code))
    wanted = _Filter(len(code) // 8, ctypes.addressof(buffer))
    prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(wanted))
