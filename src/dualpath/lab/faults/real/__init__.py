"""The real body: a `dualpath serve` of its own, seen as its users and its operator see it, and hurt from outside.

`served` is the cluster and where its processes are found, `asking` requests with known tokens, `stages` how a request
is brought into a phase, `harm` what a fault does, `trial` one combination with its checks.
"""
