"""Which addresses are this host's alone."""

import ipaddress


def is_loopback(host: str) -> bool | None:
    """Returns whether an IP address, or ``localhost``, is; None for other names, which may be anything."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
