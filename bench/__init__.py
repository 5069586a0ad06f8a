"""Measuring an engine: workloads, each step's time, the device's limits, a step's ops."""
