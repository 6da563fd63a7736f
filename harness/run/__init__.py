"""The run directory and the machine: files, records, provenance, progress."""
