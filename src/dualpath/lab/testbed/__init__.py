"""A cluster's networks on one Linux host: a network namespace per node, kernel rates and DSCP classes on its NICs."""
