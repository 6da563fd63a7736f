"""Data sets, one per file: `decode(data, progress) -> Decoded` and `identity(data) -> str`."""
