"""Runs over data sets, their records, and the reports made from records."""
