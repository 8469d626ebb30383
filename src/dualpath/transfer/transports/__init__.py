"""Our transports, one file each; ``framed`` is the code that those over sockets share."""
