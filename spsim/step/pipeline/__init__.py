"""Pipeline schedules on a clock: the order of passes on each rank, its messages, and their times; no transformer, plan,
cost or memory.
"""
