"""A cluster's networks on one Linux host: a network namespace per node; the kernel keeps rates and DSCP classes."""
