"""Finds the extra that installs a missing package, from our own metadata."""

import re
from importlib.metadata import PackageNotFoundError, requires

_OPTIONAL = re.compile(r"([A-Za-z0-9_.-]+).*extra == ['\"](\w+)['\"]")


def how_to_install(error: ModuleNotFoundError) -> str | None:
    """``"obstore is not installed; pip install 'dualpath[s3]' brings it"``; None if no extra has it."""
    module = (error.name or "").partition(".")[0]
    try:
        matches = [_OPTIONAL.match(line) for line in requires("dualpath") or ()]
    except PackageNotFoundError:
        return None
    extras = [match[2] for match in matches if match and match[1].replace("-", "_") == module and match[2] != "dev"]
    return f"{module} is not installed; pip install 'dualpath[{extras[0]}]' brings it" if extras else None
