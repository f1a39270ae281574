"""Tests of the passes, a file for each."""
