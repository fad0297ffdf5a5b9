"""One run: its folder, its job, its cache, and what can be checked of it afterwards."""
