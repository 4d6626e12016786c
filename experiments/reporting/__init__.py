"""The report: what is read of a run or a sweep, and how it becomes one HTML page."""
