"""The sections of the page, one file each: report.json in, blocks out, or the reason why there is nothing to show."""
