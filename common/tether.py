"""Run a program that ends with its parent: `tether.py PARENT SIGNAL USER PROGRAM...`.

A script for `python -I -S`, so that it costs milliseconds: it asks the kernel to send this
process SIGNAL when the process PARENT ends, whatever ends it, becomes USER (empty: stays who it
is), then turns into PROGRAM.
"""

import ctypes
import os
import sys
import warnings  # noqa: F401  # execvp imports it; as another user it may be out of reach

_PR_SET_PDEATHSIG = 1
NOT_STARTED = 126  # exit status when the program could not be started, as shells have it


def become(user: str) -> None:
    """Give up every right but those of a user."""
    import pwd

    entry = pwd.getpwnam(user)
    os.initgroups(entry.pw_name, entry.pw_gid)
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)
    os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)


def die_with(parent: int, signal_number: int) -> None:
    """Have this process sent a signal when its parent ends; on Linux alone."""
    if sys.platform == "linux":
        # changing the user clears this, so it comes after `become`
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        sys.exit("the process that started this one has ended")


def main() -> None:
    """Do as the module says."""
    parent, signal_number, user, *command = sys.argv[1:]
    try:
        if user:
            become(user)
        die_with(int(parent), int(signal_number))
        os.execvp(command[0], command)  # noqa: S606  # the caller's own command, no shell
    except (KeyError, OSError) as error:
        print(f"cannot start {command[0]}: {error}", file=sys.stderr)
        sys.exit(NOT_STARTED)


if __name__ == "__main__":
    main()
