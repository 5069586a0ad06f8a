"""Measuring an engine: workloads, each step's time, the floor that the device sets, a step's ops."""
