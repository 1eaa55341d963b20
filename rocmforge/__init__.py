"""ROCmForge: a paged key/value cache for large language models, on AMD GPUs and on CPUs."""

__version__ = "0.1.0"
