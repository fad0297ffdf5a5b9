"""Records: read from files, checked all at once, tokenised exactly once, drafted where none are given."""
