"""DualPath: every storage NIC of a prefill-decode-disaggregated cluster as one pool (arXiv 2602.21548)."""

__version__ = "0.1.0"
