"""The steps of a run. Each takes values and gives values; commands put them in order."""
