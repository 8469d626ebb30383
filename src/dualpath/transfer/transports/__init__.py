"""Our transports, one file each; ``framed`` is what the two over sockets share."""
