"""Zoos: models of known truth, made from a manifest, and the demonstration on the shipped ones."""
