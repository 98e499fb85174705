"""Progress of long work, on stderr.

work   work that says how far it is, and the bars or lines that show it
"""
