"""What a run says: statistics, the JSON report, the HTML page, the comparison of two runs."""
