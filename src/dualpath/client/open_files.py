"""Every agent under way holds a connection, which is an open file; the usual limit is far below a thousand agents."""

import resource

SPARE_FILES = 128
"""For what is open besides: the journal, the terminal, connections that are just being closed."""


class OpenFilesError(Exception):
    """The system does not allow as many connections."""


def allow_open_files(connections: int) -> None:
    """Raise this process's limit so that `connections` fit. Raises OpenFilesError where it may not."""
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
