"""Raises the limit of open files: every agent under way holds a connection, and the usual limit is 1,024."""

import resource

SPARE_FILES = 128
"""Files that are open besides: the journal, the terminal, connections that are just closing."""


class OpenFilesError(Exception):
    """The system does not allow that many connections."""


def allow_open_files(connections: int) -> None:
    """Raises this process's limit so that `connections` fit. Raises OpenFilesError if the system does not allow it."""
    needed = connections + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise OpenFilesError(
            f"{connections} agents at once need {needed} open files; this process may have {hard}. Replay fewer, or "
            f"raise the limit: ulimit -Hn {needed} as root, or LimitNOFILE= of the service"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
