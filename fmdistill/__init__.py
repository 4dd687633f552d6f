"""fmdistill compresses foundation vision models: cache the teacher once, distil, evaluate, export."""

__version__ = "0.1.0"
