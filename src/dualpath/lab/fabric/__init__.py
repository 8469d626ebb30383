"""Quality of service on a fabric: what an operator installs, and whether it is there.

`infiniband`, `roce` and `htb` each render and check one kind; they are pure functions of text and parsed JSON.
`reading` runs the tools that read a fabric back. All follow `dualpath.core.traffic_classes`.
"""
