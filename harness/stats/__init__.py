"""Statistics: intervals, claims, ranking."""
