"""Runners: one interface over everything that can execute a model."""
