"""Records as they come from files, one at a time and in constant memory.

In reading order:

raw         a record, or the reason why it could not be read
json_lines  JSON Lines
source      what the user named: its files, its fingerprint and its records
"""
