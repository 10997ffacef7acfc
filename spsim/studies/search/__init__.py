"""The search for a plan: `space` says which plans there are, `blocks` and `bounds` what none of them can be better than
(`candidates` have both), `rounds` simulates what may be among the best, `outcome` is what was found. `longest` looks
for the longest sequence first, and `search` is the entry.
"""
